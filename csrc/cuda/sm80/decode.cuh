// The forward pass for few query rows and many keys (Dao et al. 2023, "Flash-Decoding"): one block per 16 query rows
// and part of the keys; combine.cuh merges the parts. The 16 rows are those of all query heads that read one key/value
// head (grouped-query attention), position by position, so that keys and values are read once for the whole group.
//
// Each warp goes through keys of its own, 16 at a time, with buffers, a running maximum and a sum of its own: what
// limits decoding is memory, and warps that never wait for each other keep more copies under way.
#pragma once

#include "../launch.h"
#include "key_splits.h"
#include "lane_scores.cuh"

namespace torch_attn::cuda::sm80 {

template <class T, int kDim>
struct DecodeShape {
  static constexpr int kKeys = 16;  // of a warp's step
  static constexpr int kKeysOfBlock = kKeys * kWarps;
  static constexpr int kStages = kDim * sizeof(T) <= 128 ? 4 : 2;
  static constexpr int kPitch = kDim + 8;  // of a warp's result in shared memory: no bank conflicts
};

template <class T, int kDim>
struct DecodeShared {
  using Shape = DecodeShape<T, kDim>;
  struct Stage {
    Tile<T, Shape::kKeys, kDim> key, value;
  };
  struct Results {
    float maximum[kWarps][kDecodeRows], sum[kWarps][kDecodeRows];
    alignas(16) float out[kWarps][kDecodeRows][Shape::kPitch];
  };
  Tile<T, kDecodeRows, kDim> query;
  union {
    Stage stage[kWarps][Shape::kStages];
    Results results;  // once all keys have been read
  };
};

// The row of a head and the head of a group to which a packed row belongs. Rows of one position are neighbours, so that
// the rows of a tile attend nearly the same keys.
struct PackedRow {
  int64_t row, head;

  TA_DEVICE PackedRow(const AttentionProblem& p, int64_t kv_head, int64_t packed)
      : row(packed / p.group_size()), head(kv_head * p.group_size() + packed % p.group_size()) {}
};

// Starts the block's copy of packed rows [first, first + 16); zeros outside.
template <class Tile>
TA_DEVICE void copy_packed_rows(Tile& tile, const AttentionProblem& p, int64_t batch, int64_t kv_head, int64_t first) {
  const int64_t queries = p.queries_of(batch), first_query = p.first_query(batch);
  using T = typename Tile::Element;
  constexpr int kPieces = Tile::kDim / kPiece<T>;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * kPieces; i += kThreads) {
    const int r = i / kPieces, column = i % kPieces * kPiece<T>;
    const PackedRow place(p, kv_head, first + r);
    const bool valid = place.row < queries && column < p.head_dim;
    const T* const data = static_cast<const T*>(p.query.data);
    ptx::cp_async_16(tile.piece(r, column),
                     valid ? data + batch * p.query.stride[0] + place.head * p.query.stride[1] +
                                 (first_query + place.row) * p.query.stride[2] + column
                           : data,
                     valid);
  }
}

template <class T, int kDim, bool kFull>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const __grid_constant__ AttentionProblem p, const Partials partials) {
  using Shape = DecodeShape<T, kDim>;
  using Softmax = OnlineSoftmax<Math<float>>;
  constexpr int kKeys = Shape::kKeys, kStages = Shape::kStages, kGroups = kKeys / 8;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<DecodeShared<T, kDim>*>(memory);

  const int64_t tiles = ceil_div(packed_rows(p), kDecodeRows);
  int64_t index = blockIdx.x;
  const int64_t first_packed = index % tiles * kDecodeRows;  // tiles that read the same keys run together
  index /= tiles;
  const int split = static_cast<int>(index % partials.splits);
  index /= partials.splits;
  const int64_t kv_head = index % p.kv_heads, batch = index / p.kv_heads;
  const int64_t queries = p.queries_of(batch), packed_count = p.group_size() * queries;
  if (first_packed >= packed_count) return;  // of a packed sequence shorter than others
  const int lane = lane_index(), warp = warp_index();

  const PackedRow place[2] = {{p, kv_head, first_packed + lane / 4}, {p, kv_head, first_packed + lane / 4 + 8}};
  const HeadScore<float> score[2] = {{p, batch, place[0].head}, {p, batch, place[1].head}};
  const int64_t keys = keys_to_read<kFull>(p, score[0], batch), first_key = p.first_key(batch);
  const KeysOf<T, kFull> key(p.key, batch, kv_head, keys, p.head_dim, first_key);
  const KeysOf<T, kFull> value(p.value, batch, kv_head, keys, p.value_dim, first_key);

  // This split's keys, in whole steps of the block; this warp's are every fourth 16 of them.
  const int64_t row_begin = first_packed / p.group_size();
  const int64_t last_packed = first_packed + kDecodeRows < packed_count ? first_packed + kDecodeRows : packed_count;
  const int64_t row_end = (last_packed - 1) / p.group_size() + 1;
  const KeyRange range = score[0].band.keys_of_any(row_begin, row_end);
  const int64_t aligned = range.begin / kKeys * kKeys;
  const int64_t all_steps = range.empty() ? 0 : ceil_div(range.end - aligned, Shape::kKeysOfBlock);
  const int64_t split_steps = ceil_div(all_steps, partials.splits);
  const int64_t begin = aligned + split * split_steps * Shape::kKeysOfBlock + warp * kKeys;
  const int64_t split_end = aligned + (split + 1) * split_steps * Shape::kKeysOfBlock;
  const int64_t end = split_end < range.end ? split_end : range.end;
  const int steps = begin < end ? static_cast<int>(ceil_div(end - begin, Shape::kKeysOfBlock)) : 0;

  const auto copy_step = [&](int step) {
    if (step < steps) {
      auto& stage = shared.stage[warp][step % kStages];
      copy_tile<32>(stage.key, key, begin + int64_t{step} * Shape::kKeysOfBlock);
      copy_tile<32>(stage.value, value, begin + int64_t{step} * Shape::kKeysOfBlock);
    }
    ptx::cp_async_commit();
  };
  copy_packed_rows(shared.query, p, batch, kv_head, first_packed);
  ptx::cp_async_commit();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copy_step(step);
  ptx::cp_async_wait<kStages - 1>();  // the queries
  __syncthreads();

  const float unit = kFull ? 1.0f : score[0].mod.scale, factor = unit * kLog2E;  // as in forward.cuh
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {}, result[1][kDim / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    const int64_t first = begin + int64_t{step} * Shape::kKeysOfBlock;
    ptx::cp_async_wait<kStages - 2>();  // this step's keys and values
    __syncwarp();                       // of all lanes, which also have read the stage that is filled next
    copy_step(step + kStages - 1);

    auto& stage = shared.stage[warp][step % kStages];
    float x[1][kGroups][4] = {};
    multiply_transposed<1>(x, shared.query, 0, stage.key);
    const bool tested =
        kFull ? first_packed + kDecodeRows > packed_count || !score[0].inside(row_begin, row_end, first, first + kKeys)
              : !score[0].covered(row_begin, row_end, first, first + kKeys);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kFull) {
        float scores[1][2 * kGroups];
#pragma unroll
        for (int i = 0; i < 2 * kGroups; ++i) scores[0][i] = x[0][i / 2][2 * half + i % 2];
        cap_scores(scores, score[half].mod);
        QueryRows<1, 2 * kGroups>(score[half], place[half].row, first, tested).finish(scores, {});
#pragma unroll
        for (int i = 0; i < 2 * kGroups; ++i) x[0][i / 2][2 * half + i % 2] = scores[0][i];
      } else if (tested) {
        set_unattended(x[0], half, TileRange::keys_of_row(score[half], place[half].row, first, kKeys), -INFINITY);
      }
      const float rescale = softmax_row<kFull>(x[0], half, maximum[half], sum[half], factor);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        result[0][n][2 * half] *= rescale;
        result[0][n][2 * half + 1] *= rescale;
      }
    }
    if (kFull && score[0].dropout_on) {
      // Neighbouring rows may be of different heads. Four lanes hold a call's keys, in both of their rows and groups:
      // each lane makes the call of one row and group, and bits go round (head_score.cuh).
      static_assert(kGroups == 2);
      const int half = lane & 1, group = lane / 2 & 1;
      const int64_t dropout_head = half ? score[1].dropout_head : score[0].dropout_head;
      const int64_t row = half ? place[1].row : place[0].row;
      uint32_t kept = kept_of_call(score[0].dropout, dropout_head, row, first + 8 * group) >> row % 2;
      kept = exchange_kept<1, 8>(kept);
      kept = exchange_kept<2, 2>(kept);
#pragma unroll
      for (int n = 0; n < kGroups; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (!(kept >> (e % 2 * 16 + e / 2 * 8 + n * 2) & 1)) x[0][n][e] = 0;
    }
    multiply<1, kDim>(result, x, stage.value, 0);
  }

  // The warps' results become the split's.
  auto& results = shared.results;
  __syncthreads();  // the stages are read no more
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = lane / 4 + 8 * half;
    const float total = row_sum(sum[half]);
    if (lane % 4 == 0) {
      results.maximum[warp][r] = maximum[half] * unit;
      results.sum[warp][r] = total;
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
      store_pair(&results.out[warp][r][8 * n + 2 * (lane % 4)], result[0][n][2 * half], result[0][n][2 * half + 1]);
  }
  __syncthreads();
  constexpr int kQuarters = kDim / 4;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kDecodeRows * kQuarters; i += kThreads) {
    const int r = i / kQuarters, c = i % kQuarters * 4;
    const PackedRow to(p, kv_head, first_packed + r);
    if (to.row >= queries) continue;
    float largest = results.maximum[0][r];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) largest = fmaxf(largest, results.maximum[w][r]);
    float total = 0, out[4] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float rescale = Softmax::rescale(results.maximum[w][r], largest);
      total += results.sum[w][r] * rescale;
#pragma unroll
      for (int e = 0; e < 4; ++e) out[e] += results.out[w][r][c + e] * rescale;
    }
    const int64_t at = split * partials.rows + (batch * p.heads + to.head) * p.query_length + to.row;
    if (c == 0) {
      partials.maximum[at] = largest;
      partials.sum[at] = total;
    }
    if (c < partials.value_dim && total != 0) {
      Bits128 bits;
      memcpy(&bits, out, sizeof(bits));
      *reinterpret_cast<Bits128*>(partials.out + at * partials.value_dim + c) = bits;
    }
  }
}

template <class T, int kDim, bool kFull>
void decode(const AttentionProblem& p, int splits, void* workspace, const Stream& stream) {
  const int64_t tiles = (packed_rows(p) + kDecodeRows - 1) / kDecodeRows;
  launch(decode_kernel<T, kDim, kFull>, p.batch * p.kv_heads * tiles * splits, kThreads, sizeof(DecodeShared<T, kDim>),
         stream, p, Partials(p, splits, workspace));
}

}  // namespace torch_attn::cuda::sm80

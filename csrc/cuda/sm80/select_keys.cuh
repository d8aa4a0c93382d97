// Hard attention's forward pass on tensor cores: one block per 64 query rows. Keys stream through two buffers; while
// one is used, cp.async fills the other. A quad of lanes shares two rows and what they choose.
#pragma once

#include "../choice.cuh"
#include "../launch.h"
#include "lane_scores.cuh"
#include "selection_variants.h"

namespace torch_attn::cuda::sm80 {

constexpr int kSelectRows = 16 * kWarps;
constexpr int kSelectKeys = SelectionNoise::kGroupsPerCall * SelectionNoise::kGroupKeys;

template <class T, int kDim>
struct SelectShared {
  static constexpr int kPitch = kSelectKeys + 8;
  Tile<T, kSelectRows, kDim> query;
  Tile<T, kSelectKeys, kDim> key[2];
  float scores[kSelectRows * kPitch];  // for draws with replacement; a quad reads what it has written
};

constexpr int kLaneKeys = kSelectKeys / 4;

// Gumbel noise of the lane's keys in its two rows, `row` and row + 8. The four keys of a Philox call belong to two
// lanes: each makes the call of one row and hands its neighbour's words over.
TA_DEVICE void gumbel_of_rows(const SelectionNoise& noise, int64_t noise_head, int64_t row, int64_t key,
                              float (&result)[2][kLaneKeys]) {
  const bool odd = lane_index() & 1;
#pragma unroll
  for (int i = 0; i < kLaneKeys; i += 2) {
    const int64_t first = key + i / 2 * 8 + lane_index() % 4 / 2 * SelectionNoise::kKeysPerCall;
    const auto words = noise.words(noise.key_counter(noise_head, row + (odd ? 8 : 0), first));
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t own = odd ? words.word[2 + e] : words.word[e];
      const uint32_t other = __shfl_xor_sync(~0u, odd ? words.word[e] : words.word[2 + e], 1);
      result[0][i + e] = gumbel_of<float>(odd ? other : own);
      result[1][i + e] = gumbel_of<float>(odd ? own : other);
    }
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads)
    select_keys_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ Selection selection,
                       const __grid_constant__ SelectionOutputs outputs, float* leads) {
  using Softmax = OnlineSoftmax<Math<float>>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<SelectShared<T, kDim>*>(memory);

  const int64_t tiles = ceil_div(p.query_length, kSelectRows);
  const int64_t row = (tiles - 1 - blockIdx.x % tiles) * kSelectRows;  // the longest rows of a causal mask first
  const int64_t head = blockIdx.x / tiles % p.heads, batch = blockIdx.x / tiles / p.heads;
  const int64_t row_end = row + kSelectRows < p.query_length ? row + kSelectRows : p.query_length;
  const int lane = lane_index(), tile_row = 16 * warp_index() + lane / 4;  // and the one eight below

  const HeadScore<float> score(p, batch, head);
  const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
  const Rows<T> key(p.key, batch, head / p.group_size(), p.key_length, p.head_dim);
  const SelectionNoise noise = selection_noise(p);
  const int64_t noise_head = dropout_batch_head(p, batch, head), first_row = score.batch_head * p.query_length;
  const auto leaders_of = [&](int64_t r) { return Leaders<float>(selection, outputs, leads, first_row + r); };

  // A sink is in the sums from the start, and joins the leaders at the end.
  const float sink = p.sinks.defined() ? per_head<float>(p.sinks, batch, head) : -INFINITY;
  float maximum[2], sum[2], weighted_sum[2];  // of w and w · (score − maximum)
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    maximum[half] = sink;
    sum[half] = sink != -INFINITY ? 1.0f : 0.0f;
    weighted_sum[half] = 0;
    const int64_t r = row + tile_row + 8 * half;
    if (r < p.query_length) leaders_of(r).clear(lane % 4, 4);
  }

  const KeyRange range = score.band.keys_of_any(row, row_end);
  const int64_t begin = range.begin / kSelectKeys * kSelectKeys;
  const int steps = range.empty() ? 0 : static_cast<int>(ceil_div(range.end - begin, kSelectKeys));
  if (steps > 0) {
    copy_tile(shared.query, query, row);
    copy_tile(shared.key[0], key, begin);
  }
  ptx::cp_async_commit();

  for (int step = 0; step < steps; ++step) {
    const int64_t first = begin + int64_t{step} * kSelectKeys;
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (step + 1 < steps) copy_tile(shared.key[(step + 1) % 2], key, first + kSelectKeys);
    ptx::cp_async_commit();

    const QueryRows<2, kLaneKeys> rows(score, row + tile_row, first,
                                       !score.inside(row, row + kSelectRows, first, first + kSelectKeys));
    const auto bool_rows = rows.bool_rows();
    float x[1][kSelectKeys / 8][4] = {};
    multiply_transposed<1>(x, shared.query, 16 * warp_index(), shared.key[step % 2]);
    float s[2][kLaneKeys], rescale[2], group_sums[2][2];  // [half], [half][group]
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) s[half][i] = x[0][i / 2][2 * half + i % 2];
    cap_scores(s, score.mod);
    rows.finish(s, bool_rows);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = maximum[half];
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) largest = fmaxf(largest, s[half][i]);
      largest = row_max(largest);
      const float safe = Softmax::safe_maximum(largest), shift = sum[half] == 0 ? 0.0f : maximum[half] - largest;
      float partial[2] = {}, weighted = 0;
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) {
        const float w = ptx::ex2_approx((s[half][i] - safe) * kLog2E);
        partial[i * 2 / kLaneKeys] += w;
        if (w != 0) weighted += w * (s[half][i] - safe);
      }
#pragma unroll
      for (int g = 0; g < 2; ++g) group_sums[half][g] = row_sum(partial[g]);
      rescale[half] = Softmax::rescale(maximum[half], largest);
      weighted_sum[half] = (weighted_sum[half] + shift * sum[half]) * rescale[half] + row_sum(weighted);
      sum[half] = sum[half] * rescale[half] + (group_sums[half][0] + group_sums[half][1]);
      maximum[half] = largest;
    }

    if (selection.rule == SelectionRule::kWithReplacement) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < kLaneKeys; ++i)
          shared.scores[(tile_row + 8 * half) * shared.kPitch + column_of_lane(i)] = s[half][i];
      __syncwarp();
      // The quad shares its two rows' draws: even lanes the upper row's, odd lanes the lower's.
      const bool low = lane & 1;
      const int64_t r = row + tile_row + (low ? 8 : 0);
      const float sums[2] = {low ? group_sums[1][0] : group_sums[0][0], low ? group_sums[1][1] : group_sums[0][1]};
#pragma unroll 1
      for (int64_t sample = lane % 4 / 2; sample < selection.count && r < p.query_length; sample += 2) {
        const auto words = noise.words(noise.group_counter(noise_head, r, first / SelectionNoise::kGroupKeys, sample));
        race(leaders_of(r), sample, words, first, shared.scores + (tile_row + (low ? 8 : 0)) * shared.kPitch, sums,
             Softmax::safe_maximum(low ? maximum[1] : maximum[0]), low ? rescale[1] : rescale[0]);
      }
    } else {
      float gumbel[2][kLaneKeys] = {};
      if (selection.rule == SelectionRule::kWithoutReplacement)
        gumbel_of_rows(noise, noise_head, row + tile_row, first, gumbel);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t r = row + tile_row + 8 * half;
        rank<4>(leaders_of(r), r < p.query_length, first, s[half], gumbel[half], Softmax::safe_maximum(maximum[half]),
                column_of_lane);
      }
    }
  }

  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + tile_row + 8 * half;
    if (p.sinks.defined() && lane % 4 == half && r < p.query_length)
      add_sink(leaders_of(r), noise, noise_head, r, p.key_length, sink, Softmax::safe_maximum(maximum[half]));
  }
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + tile_row + 8 * half;
    if (r >= p.query_length) continue;
    const Leaders<float> leaders = leaders_of(r);
    const float log_sum = Math<float>::log(sum[half]);
    for (int64_t place = lane % 4; place < selection.count; place += 4)
      static_cast<float*>(outputs.log_prob)[(first_row + r) * selection.count + place] =
          leaders.index[place] < 0 ? 0.0f : leaders.score[place] - maximum[half] - log_sum;
    if (lane % 4 != 0) continue;
    static_cast<float*>(outputs.logsumexp)[first_row + r] = Softmax::logsumexp(maximum[half], sum[half]);
    static_cast<float*>(outputs.entropy)[first_row + r] =
        sum[half] == 0 ? 0.0f : log_sum - weighted_sum[half] / sum[half];
  }
}

template <class T, int kDim>
void select_keys(const AttentionProblem& p, const Selection& selection, const SelectionOutputs& outputs,
                 void* workspace, const Stream& stream) {
  const int64_t tiles = (p.query_length + kSelectRows - 1) / kSelectRows;
  launch(select_keys_kernel<T, kDim>, p.batch * p.heads * tiles, kThreads, sizeof(SelectShared<T, kDim>), stream, p,
         selection, outputs, static_cast<float*>(workspace));
}

}  // namespace torch_attn::cuda::sm80

// What the tensor-core kernels of attention maps have in common: tiles of 64 rows by 64 keys, whose operands come in
// chunks of 64 columns, so that one instance of a kernel serves every head dimension.
#pragma once

#include "../map_rows.cuh"
#include "map_variants.h"
#include "score_tile.cuh"

namespace torch_attn::cuda::sm80 {

constexpr int kMapTile = 16 * kWarps;  // rows and keys
constexpr int kMapGroups = kMapTile / 8, kMapLaneKeys = kMapTile / 4;
constexpr int kChunkColumns = 64;

template <class T>
using Chunk = Tile<T, kMapTile, kChunkColumns>;
using MapAccumulators = float[1][kMapGroups][4];

inline int64_t map_tiles(int64_t size) { return (size + kMapTile - 1) / kMapTile; }
TA_DEVICE int chunks_of(int64_t columns) { return static_cast<int>(ceil_div(columns, kChunkColumns)); }

// kMapTile rows of all columns.
template <class T>
struct ChunkedTile {
  Chunk<T>* chunk;
  int count;

  // The nth of a block's shared memory, of tiles of so many chunks each.
  TA_DEVICE ChunkedTile(unsigned char* memory, int n, int chunks)
      : chunk(reinterpret_cast<Chunk<T>*>(memory) + n * chunks), count(chunks) {}

  TA_DEVICE void copy(const Rows<T>& rows, int64_t row) const {
    Rows<T> columns = rows;
#pragma unroll 1
    for (int c = 0; c < count; ++c) {
      copy_tile(chunk[c], columns, row);
      columns.data += kChunkColumns;
      columns.columns -= kChunkColumns;
    }
  }
};

// Bytes of so many of them.
template <class T>
size_t chunked_bytes(int64_t columns, int tiles) {
  return tiles * static_cast<size_t>((columns + kChunkColumns - 1) / kChunkColumns) * sizeof(Chunk<T>);
}

// x += (16 rows of a from `row` on) · (all rows of b)ᵀ.
template <class T>
TA_DEVICE void multiply_chunks(MapAccumulators& x, const ChunkedTile<T>& a, int row, const ChunkedTile<T>& b) {
#pragma unroll 1
  for (int c = 0; c < a.count; ++c) multiply_transposed<1>(x, a.chunk[c], row, b.chunk[c]);
}

// The tiles of keys that some row of a block may attend.
struct KeySteps {
  int64_t begin;
  int count;

  TA_DEVICE KeySteps(const MapScore<float>& score, int64_t row, int64_t row_end) {
    const KeyRange range = score.band.keys_of_any(row, row_end);
    begin = range.begin / kMapTile * kMapTile;
    count = range.empty() ? 0 : static_cast<int>(ceil_div(range.end - begin, kMapTile));
  }
};

// Adds attn_mask to a lane's scores: element i is number column_of_lane(i) of `stride` from `index` on. Only what
// contains(i) says is attended is read. The type is looked at once, so that the loads are under way together.
template <class Contains>
TA_DEVICE void add_mask(float (&scores)[kMapLaneKeys], const HeadMask& mask, int64_t index, int64_t stride,
                        const Contains& contains) {
  const auto add = [&](auto type, const auto& bias_of) {
    const auto* from = reinterpret_cast<const decltype(type)*>(mask.data) + index + 2 * (lane_index() % 4) * stride;
#pragma unroll
    for (int i = 0; i < kMapLaneKeys; i += 2, from += 8 * stride) {
      if (contains(i)) scores[i] += bias_of(from);
      if (contains(i + 1)) scores[i + 1] += bias_of(from + stride);
    }
  };
  const auto number = [](const auto* x) { return static_cast<float>(load(x)); };
  switch (mask.dtype) {
    case ScalarType::kBool:
      return add(uint8_t{}, [](const uint8_t* x) { return *x ? 0.0f : -INFINITY; });
    case ScalarType::kFloat64:
      return add(double{}, number);
    case ScalarType::kFloat32:
      return add(float{}, number);
    case ScalarType::kBFloat16:
      return add(BFloat16{}, number);
    case ScalarType::kFloat16:
      return add(Float16{}, number);
  }
}

// What becomes of a lane's capped q·k. distance(i): between position and key; mask_index and mask_stride as in
// add_mask.
template <class Contains, class Distance>
TA_DEVICE void finish_scores(float (&scores)[kMapLaneKeys], const HeadScore<float>& score, const Contains& contains,
                             const Distance& distance, int64_t mask_index, int64_t mask_stride) {
#pragma unroll
  for (int i = 0; i < kMapLaneKeys; ++i)
    if (!contains(i)) scores[i] = -INFINITY;
  if (score.mod.slope != 0) {
#pragma unroll
    for (int i = 0; i < kMapLaneKeys; ++i)
      scores[i] += score.mod.slope * ScoreMod<Math<float>>::alibi_derivative(distance(i));
  }
  if (score.mask.data) add_mask(scores, score.mask, mask_index, mask_stride, contains);
}

// A lane's scores of row `row`, half `half` of its accumulators, which hold q·k and become capped; `tested`: false
// where score.unmasked() holds. The keys are first + column_of_lane(i).
template <class Score>
TA_DEVICE void scores_of_row(float (&scores)[kMapLaneKeys], MapAccumulators& x, int half, const Score& score,
                             int64_t row, int64_t first, bool tested) {
  const TileRange attended = tested ? TileRange::keys_of_row(score, row, first, kMapTile) : TileRange{0, kMapTile};
  const float to_first = static_cast<float>(first - score.band.position(row));
#pragma unroll
  for (int i = 0; i < kMapLaneKeys; ++i) {
    float& element = x[0][i / 2][2 * half + i % 2];
    scores[i] = element = score.mod.capped(element);
  }
  finish_scores(
      scores, score, [&](int i) { return attended.contains(column_of_lane(i)); },
      [&](int i) { return to_first + static_cast<float>(column_of_lane(i)); },
      row * score.mask.row_stride + first * score.mask.key_stride, score.mask.key_stride);
}

// The same of tiles whose rows are keys: the scores of key `key` with the query rows row + column_of_lane(i).
TA_DEVICE void scores_of_key(float (&scores)[kMapLaneKeys], MapAccumulators& x, int half, const MapScore<float>& score,
                             int64_t key, int64_t row, bool tested) {
  const bool selected = score.selected();
  const TileRange attending =
      tested && !selected ? TileRange::rows_of_key(score, key, row, kMapTile) : TileRange{0, kMapTile};
  const float to_first = static_cast<float>(key - score.band.offset - row);
#pragma unroll
  for (int i = 0; i < kMapLaneKeys; ++i) {
    float& element = x[0][i / 2][2 * half + i % 2];
    scores[i] = element = score.mod.capped(element);
  }
  const auto row_of = [&](int i) { return row + column_of_lane(i); };
  finish_scores(
      scores, score,
      [&](int i) {
        if (selected) return row_of(i) < score.query_length && score.band.attends(row_of(i), key);
        return attending.contains(column_of_lane(i));
      },
      [&](int i) {
        if (selected) return static_cast<float>(key - score.band.position(row_of(i)));
        return to_first - static_cast<float>(column_of_lane(i));
      },
      row * score.mask.row_stride + key * score.mask.key_stride, score.mask.row_stride);
}

}  // namespace torch_attn::cuda::sm80

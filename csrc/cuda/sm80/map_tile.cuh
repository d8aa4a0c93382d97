// What the tensor-core kernels of attention maps have in common: tiles of 64 rows by 64 keys, whose operands come in
// chunks of 64 columns, so that one instance of a kernel serves every head dimension.
#pragma once

#include "../map_rows.cuh"
#include "lane_scores.cuh"
#include "map_variants.h"

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

// Half of the accumulators' q·k, which become capped, and a copy of them, which is to be finished.
TA_DEVICE void capped_half(float (&scores)[1][kMapLaneKeys], MapAccumulators& x, int half,
                           const HeadScore<float>& score) {
#pragma unroll
  for (int i = 0; i < kMapLaneKeys; ++i) scores[0][i] = x[0][i / 2][2 * half + i % 2];
  cap_scores(scores, score.mod);
#pragma unroll
  for (int i = 0; i < kMapLaneKeys; ++i) x[0][i / 2][2 * half + i % 2] = scores[0][i];
}

// A lane's scores of row `row`, half `half` of its accumulators; `tested`: false where score.inside() holds of the
// tile. The keys are first + column_of_lane(i).
TA_DEVICE void scores_of_row(float (&scores)[1][kMapLaneKeys], MapAccumulators& x, int half,
                             const HeadScore<float>& score, int64_t row, int64_t first, bool tested) {
  const QueryRows<1, kMapLaneKeys> rows(score, row, first, tested);
  capped_half(scores, x, half, score);
  rows.finish(scores, {});  // reading boolean masks ahead takes registers that the maps' options have
}

// The same of tiles whose rows are keys: the scores of key `key` with the query rows row + column_of_lane(i), which may
// be a selection.
TA_DEVICE void scores_of_key(float (&scores)[1][kMapLaneKeys], MapAccumulators& x, int half,
                             const MapScore<float>& score, int64_t key, int64_t row, bool tested) {
  capped_half(scores, x, half, score);
  if (!score.selected()) return finish_scores_of_keys(scores, score, key, row, tested);
  const MaskPlaces places = {row * score.mask.row_stride + key * score.mask.key_stride, 0, score.mask.row_stride};
  const auto row_of = [&](int i) { return row + column_of_lane(i); };
  finish_scores<false>(
      scores, score, places, {}, tested,
      [&](int, int i) { return row_of(i) < score.query_length && score.band.attends(row_of(i), key); },
      [&](int, int i) { return static_cast<float>(key - score.band.position(row_of(i))); });
}

}  // namespace torch_attn::cuda::sm80

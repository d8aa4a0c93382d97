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

// A lane's scores of row `row`, half `half` of its accumulators, which hold q·k and become capped; `tested`: false
// where score.unmasked() holds. The keys are first + column_of_lane(i).
TA_DEVICE void scores_of_row(float (&scores)[kMapLaneKeys], MapAccumulators& x, int half, const MapScore<float>& score,
                             int64_t row, int64_t first, bool tested) {
  const TileRange attended = tested ? TileRange::keys_of_row(score, row, first, kMapTile) : TileRange{0, kMapTile};
#pragma unroll
  for (int i = 0; i < kMapLaneKeys; ++i) {
    const int k = column_of_lane(i);
    float& element = x[0][i / 2][2 * half + i % 2];
    element = score.mod.capped(element);
    scores[i] = full_score(score, element, row, first + k, attended.contains(k));
  }
}

// The same of tiles whose rows are keys: which query rows of a tile attend a lane's two keys, `key` and key + 8.
struct RowsOfKeys {
  TileRange range[2];
  bool selected;

  TA_DEVICE RowsOfKeys(const MapScore<float>& score, int64_t key, int64_t row, bool tested)
      : selected(score.selected()) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      range[half] =
          tested && !selected ? TileRange::rows_of_key(score, key + 8 * half, row, kMapTile) : TileRange{0, kMapTile};
  }
  TA_DEVICE bool contain(const MapScore<float>& score, int half, int64_t key, int64_t row, int r) const {
    if (selected) return row + r < score.query_length && score.band.attends(row + r, key);
    return range[half].contains(r);
  }
};

}  // namespace torch_attn::cuda::sm80

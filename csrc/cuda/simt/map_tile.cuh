// Sizes of the blocks of map_*.cuh.
#pragma once

#include "../map_rows.cuh"
#include "map_variants.h"
#include "tile.cuh"

namespace torch_attn::cuda::simt {

// The tiles of 64 rows and of 64 keys; at least one chunk of columns.
inline int64_t tiles_of(int64_t size) { return (size + kTile - 1) / kTile; }
inline int64_t chunks_of(int64_t columns) { return columns > kTile ? tiles_of(columns) : 1; }

template <class Real>
using MapShared = Shared<Real, kTile>;

}  // namespace torch_attn::cuda::simt

// In which order a kernel's blocks go through heads and the tiles of each, of rows (forward.cuh) or keys
// (backward.cuh). Plain C++ for the host and the kernels.
#pragma once

#include "../kernels.h"

namespace torch_attn::cuda::sm90 {

// Quotients of numbers below 2^31 without a division, which takes a block longer than its first copies take to start.
struct Divisor {
  uint32_t value, factor, shift;

  static Divisor of(int64_t value) {
    Divisor d{static_cast<uint32_t>(value), 0, 31};
    while (int64_t{1} << (d.shift - 31) < value) ++d.shift;
    d.factor = static_cast<uint32_t>(((uint64_t{1} << d.shift) + d.value - 1) / d.value);
    return d;
  }
  TA_HOST_DEVICE int quotient(int x) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(x)} * factor >> shift);
  }
  TA_HOST_DEVICE int rest(int x, int quotient) const { return x - quotient * static_cast<int>(value); }
};

// A head's first tile is that with the most work under a causal mask. Heads of a batch of heads (`together`) come
// together: first the first tile of each of them, and at the end the last ones. So the multiprocessors finish at nearly
// the same time, as with any list that starts with its longest tasks, while what the blocks read and add to stays in
// the L2 cache. Where the number of heads is no multiple of `together`, the first batch is the small one.
struct BlockOrder {
  int tiles, small;                         // blocks of a head; heads of the small batch
  Divisor heads, together, together_tiles;  // heads: of a batch entry

  // head_bytes: what the blocks of a head read and write again and again.
  static BlockOrder make(const AttentionProblem& p, int64_t heads, int64_t tiles, int64_t head_bytes,
                         int multiprocessors) {
    const int64_t all = p.batch * heads;
    int64_t together = 1;
    if (p.window_right < p.key_length && all * tiles > 0) {  // else all tiles have as much work
      constexpr int64_t kCache = 32 << 20;
      const int64_t cached = head_bytes > 0 ? kCache / head_bytes : all;
      int64_t most = (2 * multiprocessors + tiles - 1) / tiles;  // at the end, two blocks for each to choose from
      if (most > cached) most = cached > 1 ? cached : 1;
      const int64_t batches = (all + most - 1) / most;
      together = (all + batches - 1) / batches;
    }
    const auto divisor = [](int64_t value) { return Divisor::of(value > 0 ? value : 1); };
    return {static_cast<int>(tiles), static_cast<int>(all % together), divisor(heads), divisor(together),
            divisor(together * tiles)};
  }

  struct Place {
    int batch, head, tile;
  };
  TA_HOST_DEVICE Place place_of(int block) const {
    const int before = small * tiles;
    if (block < before) return place(block % small, block / small);
    const int batch = together_tiles.quotient(block - before), index = together_tiles.rest(block - before, batch);
    const int tile = together.quotient(index);
    return place(small + batch * static_cast<int>(together.value) + together.rest(index, tile), tile);
  }

 private:
  TA_HOST_DEVICE Place place(int head, int tile) const {
    const int batch = heads.quotient(head);
    return {batch, heads.rest(head, batch), tile};
  }
};

}  // namespace torch_attn::cuda::sm90

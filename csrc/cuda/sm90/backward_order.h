// In which order the blocks of all_gradients (backward.cuh) go through heads and keys. Plain C++ for the host and the
// kernel.
#pragma once

#include "../kernels.h"

namespace torch_attn::cuda::sm90 {

// Heads are key/value heads of all batch entries. Those of a batch of heads (`together`) come together: first the keys
// that the most rows of a causal mask attend, of each of them, and at the end the ones with the fewest. So the
// multiprocessors finish at nearly the same time, as with any list that starts with its longest tasks, while what the
// blocks read and add to stays in the L2 cache. Where the number of heads is no multiple of `together`, the first batch
// is the small one.
struct BlockOrder {
  int heads, tiles, together;  // tiles: blocks of a head

  static BlockOrder make(const AttentionProblem& p, int64_t tiles, int dim, int multiprocessors) {
    const int64_t heads = p.batch * p.kv_heads;
    BlockOrder order{static_cast<int>(heads), static_cast<int>(tiles), 1};
    if (p.window_right >= p.key_length || heads * tiles == 0) return order;  // all keys have as many rows
    // Of a head's queries and grad_out, and of its sums, while one query head of a group after the other is gone
    // through.
    constexpr int64_t kCache = 32 << 20;
    const int64_t head_bytes = p.query_length * dim * 8, cached = head_bytes > 0 ? kCache / head_bytes : heads;
    int64_t most = (2 * multiprocessors + tiles - 1) / tiles;  // at the end, two blocks for each to choose from
    if (most > cached) most = cached > 1 ? cached : 1;
    const int64_t batches = (heads + most - 1) / most;
    order.together = static_cast<int>((heads + batches - 1) / batches);
    return order;
  }

  struct Place {
    int head, tile;
  };
  TA_HOST_DEVICE Place place_of(int block) const {
    const int rest = heads % together, before = rest * tiles;
    if (block < before) return {block % rest, block / rest};
    const int batch = (block - before) / (tiles * together), index = (block - before) % (tiles * together);
    return {rest + batch * together + index % together, index / together};
  }
};

}  // namespace torch_attn::cuda::sm90

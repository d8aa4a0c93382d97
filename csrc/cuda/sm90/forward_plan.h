// How the blocks of forward.cuh share out a call. Plain C++ for the host.
#pragma once

#include "../kernels.h"

namespace torch_attn::cuda::sm90 {

// Each of a block's warpgroups has 64 rows of its own, or some share them and each has a part of the keys.
struct ForwardBlocks {
  int log2_warpgroups, keys;  // keys: of a step of one warpgroup
  double traffic;  // what reading each key once a step and block takes of what the L2 cache can give to all blocks

  // How many warpgroups have rows of their own: as many as leave no multiprocessor idle.
  int log2_row_groups(const AttentionProblem& p, int multiprocessors) const {
    int best = log2_warpgroups;
    double least = 0;
    for (int log2_groups = log2_warpgroups; log2_groups >= 0; --log2_groups) {
      const double time = time_of(p, int64_t{64} << log2_groups, 1 << (log2_warpgroups - log2_groups), multiprocessors);
      if (log2_groups < log2_warpgroups && time >= least) continue;
      best = log2_groups;
      least = time;
    }
    return best;
  }

 private:
  // In steps. rows: of a block. parts: of the keys.
  double time_of(const AttentionProblem& p, int64_t rows, int parts, int multiprocessors) const {
    constexpr double kAround = 2.5, kJoin = 0.5;  // before a block's first step and after its last; the parts' results
    int64_t attended = p.key_length;              // by a block's rows
    if (p.window_left < attended - rows && p.window_right < attended - rows - p.window_left)
      attended = rows + p.window_left + p.window_right;
    // How many a multiprocessor has.
    const double blocks =
        static_cast<double>(p.batch * p.heads * ((p.query_length + rows - 1) / rows)) / multiprocessors;
    const double crowded = traffic * parts * (blocks < 1 ? blocks : 1);
    const double steps =
        static_cast<double>((attended + keys * parts - 1) / (keys * parts)) * (crowded > 1 ? crowded : 1);
    const double around = kAround + (parts > 1 ? kJoin : 0), longest = steps + around;
    if (p.window_right >= p.key_length) {  // all blocks take as long
      const auto whole = static_cast<double>(static_cast<int64_t>(blocks));
      return (whole < blocks ? whole + 1 : whole) * longest;
    }
    // They come from the longest to the shortest; without a window on the left these have nearly no steps.
    const double mean = (attended == p.key_length ? steps / 2 : steps) + around;
    return blocks * mean > longest ? blocks * mean : longest;
  }
};

}  // namespace torch_attn::cuda::sm90

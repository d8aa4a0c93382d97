// PyTorch's thread pool as csrc/cpu's kernels take it. Included by the files beside it.
#pragma once

#include <ATen/Parallel.h>

#include "cpu/kernels.h"

namespace torch_attn::ops {

inline cpu::Parallel torch_threads() {
  const auto run = [](void*, int64_t count, void (*task)(void*, int64_t), void* context) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(context, i);
    });
  };
  return {at::in_parallel_region() ? 1 : at::get_num_threads(), nullptr, run};
}

}  // namespace torch_attn::ops

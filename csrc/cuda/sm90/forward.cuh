// The forward pass on Hopper's warpgroup matrix instructions, for scaled scores with a band mask (causal, windows, key
// lengths). Each of a block's warpgroups has 64 query rows and walks over the keys that another one brings
// (forward_steps.cuh); where rows are few, some warpgroups share them and each has a part of the keys (forward_plan.h).
// While a warpgroup is at a step's softmax, the tensor cores are at its last step's output, or at another warpgroup's
// products, which are issued in turn (Shah et al. 2024, "FlashAttention-3", §3.1 and 3.2).
#pragma once

#include "forward_plan.h"
#include "forward_steps.cuh"
#include "short_forward.cuh"
#include "variants.h"

namespace torch_attn::cuda::sm90 {

using sm80::lane_index;
using sm80::row_max;
using sm80::row_sum;
using sm80::TileRange;

// A row's softmax and output over some of its keys: two rows of a lane, rows l / 4 and l / 4 + 8 of its warp.
template <int kDim>
struct RowResult {
  float maximum[2], sum[2], output[kDim / 8][4];  // sum: this lane's part

  static constexpr int kFloats = 4 + kDim / 2;  // of a thread

  // In shared memory that kWarpgroup threads have for this.
  TA_DEVICE void put(float* to) const {
    for (int half = 0; half < 2; ++half) {
      to[half * kWarpgroup] = maximum[half];
      to[(2 + half) * kWarpgroup] = sum[half];
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(4 + 4 * n + i) * kWarpgroup] = output[n][i];
  }
  // With what another thread put there, of other keys.
  TA_DEVICE void join(const float* other, float factor) {
    float mine[2], others[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float maximum_there = other[half * kWarpgroup], larger = fmaxf(maximum[half], maximum_there);
      const auto rescale = [&](float from) {
        return from == larger ? 1.0f : ptx::ex2_approx((from - larger) * factor);
      };
      mine[half] = rescale(maximum[half]);
      others[half] = rescale(maximum_there);
      maximum[half] = larger;
      sum[half] = sum[half] * mine[half] + other[(2 + half) * kWarpgroup] * others[half];
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        output[n][i] = output[n][i] * mine[i / 2] + other[(4 + 4 * n + i) * kWarpgroup] * others[i / 2];
  }
};

// Named barriers: of all consumers; the first warpgroup's turn and its end, before those of the others.
constexpr int kAllBarrier = 1, kTurnBarrier = 2, kEndBarrier = 8;

template <class T, int kDim>
__global__ void __launch_bounds__(ForwardShape<kDim>::kThreads, 1)
    forward_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ ForwardOutputs out,
                   const BlockOrder order, const int log2_groups) {
#if TA_HAS_WGMMA
  using Shape = ForwardShape<kDim>;
  using Softmax = OnlineSoftmax<Math<float>>;
  constexpr int kKeys = Shape::kKeys, kGroups = kKeys / 8;
  const T type{};
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<ForwardShared<T, kDim>*>(memory);

  const int groups = 1 << log2_groups, thread = static_cast<int>(threadIdx.x);
  const int warpgroup = __shfl_sync(~0u, thread / kWarpgroup, 0);
  if (thread == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      ptx::mbarrier_init(shared.full + i, kWarpgroup);
      ptx::mbarrier_init(shared.empty_key + i, groups * kWarpgroup / 32);
      ptx::mbarrier_init(shared.empty_value + i, groups * kWarpgroup / 32);
    }
    ptx::mbarrier_init_fence();
  }
  const ForwardBlock<kDim> block(p, order, groups);
  if (block.row >= p.queries_of(block.batch)) return;  // of a packed sequence shorter than others
  __syncthreads();

  if (warpgroup == Shape::kWarpgroups) {
    ptx::set_registers<Shape::kProducerRegisters, false>();
    bring_keys(shared, p, block, groups);
  } else {
    ptx::set_registers<Shape::kConsumerRegisters, true>();
    const int lane = lane_index(), warp_row = thread % kWarpgroup / 32 * 16;
    const int group = warpgroup & (groups - 1), part = warpgroup >> log2_groups;
    const int parts = Shape::kWarpgroups >> log2_groups;
    const int row = block.row + group * kWarpgroupRows, steps = block.steps;
    auto& query = shared.query[group];

    const HeadScore<float> score(p, block.batch, block.head);
    // weight = 2^((x − maximum) · factor), where x is q·k.
    const float factor = score.mod.scale * kLog2E;
    RowResult<kDim> result = {};
    const float sink = p.sinks.defined() && part == 0
                           ? per_head<float>(p.sinks, block.batch, block.head) / score.mod.scale
                           : -INFINITY;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      result.maximum[half] = sink;
      result.sum[half] = sink != -INFINITY && lane % 4 == 0 ? 1.0f : 0.0f;
    }
    const auto cut = [](int64_t key) { return static_cast<int>(key < 1 << 30 ? key : 1 << 30); };
    const KeyRange all = score.band.keys_of_all(row, row + kWarpgroupRows);
    const TileRange covered{cut(all.begin), cut(all.end)};

    float x[kGroups][4], rescale[2];
    uint32_t weights[kKeys / 16][4];
    StageRing<Shape::kStages> keys{part, 0}, values{part, 0};
    const auto release = [&](uint64_t* barrier) {
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(barrier);
    };
    const auto multiply_keys = [&] {  // x = queries · keysᵀ
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k)
        ptx::wgmma(x, query.rows(0, k), shared.key[keys.stage].rows(0, k), k > 0, type);
      ptx::wgmma_commit();
    };
    const auto multiply_values = [&] {  // output += weights · values
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
        ptx::wgmma(result.output, weights[k], shared.value[values.stage].columns(k), type);
      ptx::wgmma_commit();
    };
    const auto wait_for_keys = [&] { ptx::mbarrier_wait(shared.full + keys.stage, keys.parity); };
    const auto wait_for_values = [&](StageRing<Shape::kStages> of) {
      of.advance();  // they come with the next step's keys
      ptx::mbarrier_wait(shared.full + of.stage, of.parity);
    };
    const auto release_keys = [&] {
      release(shared.empty_key + keys.stage);
      keys.advance(parts);
    };
    const auto release_values = [&] {
      release(shared.empty_value + values.stage);
      values.advance(parts);
    };
    const auto softmax = [&](int step) {
      const int first = block.begin + step * kKeys;
      if (first < covered.begin || first + kKeys > covered.end) {
        const HeadScore<float> anew(p, block.batch, block.head);  // registers are short in the loop
#pragma unroll
        for (int half = 0; half < 2; ++half)
          sm80::set_unattended(
              x, half, TileRange::keys_of_row(anew, row + warp_row + 8 * half + lane / 4, first, kKeys), -INFINITY);
      }
      float largest[2][2];
#pragma unroll
      for (int n = 0; n < kGroups; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& of = largest[half][n % 2];
          const float pair = fmaxf(x[n][2 * half], x[n][2 * half + 1]);
          of = n < 2 ? pair : fmaxf(of, pair);
        }
      float shift[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float before = result.maximum[half];
        const float maximum = row_max(fmaxf(before, fmaxf(largest[half][0], largest[half][1])));
        rescale[half] = before == maximum ? 1.0f : ptx::ex2_approx((before - maximum) * factor);
        shift[half] = Softmax::safe_maximum(maximum) * factor;
        result.maximum[half] = maximum;
        result.sum[half] *= rescale[half];
      }
#pragma unroll
      for (int n = 0; n < kGroups; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[n][i] = ptx::ex2_approx(x[n][i] * factor - shift[i / 2]);
          result.sum[i / 2] += x[n][i];
        }
    };
    const auto round_weights = [&] { pack_weights<T>(x, 0, weights); };

    // Warpgroups issue their products one after the other, from the first to the last and again.
    const auto wait_for_turn = [&] { ptx::barrier_sync(kTurnBarrier + warpgroup, 2 * kWarpgroup); };
    const auto pass_turn = [&] {
      ptx::barrier_arrive(kTurnBarrier + (warpgroup + 1) % Shape::kWarpgroups, 2 * kWarpgroup);
    };
    if (warpgroup == 0) ptx::barrier_arrive(kTurnBarrier, 2 * kWarpgroup);
    const int rounds = (steps + parts - 1) * groups / Shape::kWarpgroups;
    if (part < steps) {
      wait_for_keys();
      ptx::hold(x);
      ptx::wgmma_fence();
      multiply_keys();
      ptx::wgmma_wait<0>();
      ptx::hold(x);
      release_keys();
      softmax(part);
      round_weights();
      wait_for_values(values);
      for (int step = part + parts; step < steps; step += parts) {
        wait_for_keys();
        wait_for_turn();
        ptx::hold(x);
        ptx::hold(result.output);
        ptx::wgmma_fence();
        multiply_keys();
        multiply_values();
        pass_turn();
        ptx::wgmma_wait<1>();
        ptx::hold(x);
        const StageRing<Shape::kStages> here = keys;
        release_keys();
        softmax(step);
        ptx::hold(x);
        wait_for_values(here);  // its loop keeps the compiler from moving the next wait up, before the softmax
        ptx::wgmma_wait<0>();
        ptx::hold(result.output);
        release_values();
        if (__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
          for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) result.output[n][i] *= rescale[i / 2];
        }
        round_weights();
      }
      if (rounds > 1 && part + (rounds - 1) * parts >= steps) {  // no step in the last round
        wait_for_turn();
        pass_turn();
      }
      ptx::hold(result.output);
      ptx::wgmma_fence();
      multiply_values();
      ptx::wgmma_wait<0>();
      ptx::hold(result.output);
    }
    if (warpgroup == 0) wait_for_turn();

    // The queries, and where parts are joined keys and values, are read no more.
    if (parts > 1) {
      static_assert(sizeof(shared.key) >= (Shape::kWarpgroups - 1) * RowResult<kDim>::kFloats * kWarpgroup * 4, "");
      const auto place = [&](int warpgroup) {
        return reinterpret_cast<float*>(shared.key) + (warpgroup - groups) * RowResult<kDim>::kFloats * kWarpgroup +
               thread % kWarpgroup;
      };
      ptx::barrier_sync(kAllBarrier, Shape::kConsumers);
      if (part > 0) result.put(place(warpgroup));
      ptx::barrier_sync(kAllBarrier, Shape::kConsumers);
      if (part > 0) return;
      for (int other = 1; other < parts; ++other) result.join(place(group + other * groups), factor);
    } else {
      ptx::barrier_sync(kEndBarrier + warpgroup, kWarpgroup);
    }
    float inverse[1][2];
    const int queries = score.query_length;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = row_sum(result.sum[half]);
      inverse[0][half] = Softmax::inverse_sum(total);
      const int r = row + warp_row + 8 * half + lane / 4;
      if (lane % 4 == 0 && r < queries)
        static_cast<float*>(out.logsumexp)[p.first_row(block.batch, block.head) + r] =
            Softmax::logsumexp(result.maximum[half] * score.mod.scale, total);
    }
    store_parts(Rows<T>(out.out, block.batch, block.head, queries, p.value_dim, p.first_query(block.batch)),
                row + warp_row, result.output, inverse, query, warp_row);
  }
#endif
}

template <class T, int kDim>
void forward(const AttentionProblem& p, const ForwardOutputs& out, const Stream& stream) {
  using Shape = ForwardShape<kDim>;
  const int multiprocessors = device_facts(stream.device).multiprocessors;
  if constexpr (kDim == ShortForwardShape::kDim) {
    if (ShortForwardShape::suits(p, multiprocessors)) return short_forward<T, kDim>(p, out, stream);
  }
  const ForwardBlocks blocks{Shape::kLog2Warpgroups, Shape::kKeys, Shape::kTraffic};
  const int log2_groups = blocks.log2_row_groups(p, multiprocessors);
  const int64_t rows = kWarpgroupRows << log2_groups, tiles = (p.query_length + rows - 1) / rows;
  // A head's keys and values, which the query heads of a group share.
  const BlockOrder order =
      BlockOrder::make(p, p.heads, tiles, p.key_length * kDim * 4 / p.group_size(), multiprocessors);
  launch(forward_kernel<T, kDim>, p.batch * p.heads * tiles, Shape::kThreads, sizeof(ForwardShared<T, kDim>), stream, p,
         out, order, log2_groups);
}

}  // namespace torch_attn::cuda::sm90

// Hard attention's forward pass in the portable tier: one block per 64 query rows, which gathers the softmax's sum and
// entropy and keeps the keys that lead in each row.
#pragma once

#include "../choice.cuh"
#include "../launch.h"
#include "selection_variants.h"
#include "tile.cuh"

namespace torch_attn::cuda::simt {

// Gumbel noise of this thread's keys x + 16j in one row of a tile that starts at `key`. Four neighbours need four
// Philox calls between them: each makes one and they exchange the words.
template <class Real>
TA_DEVICE void gumbel_of_row(const SelectionNoise& noise, int64_t noise_head, int64_t row, int64_t key,
                             Real (&result)[kPerThread]) {
  constexpr int kGroup = SelectionNoise::kKeysPerCall;
  static_assert(kGroup == kPerThread, "a thread's j-th key lies in its j-th neighbour's call");
  const int x = thread_x(), place = x % kGroup;
  auto words = noise.words(noise.key_counter(noise_head, row, key + x / kGroup * kGroup + place * kSide));
  // A transposition: word i of the j-th neighbour becomes word j of the i-th.
#pragma unroll
  for (int step = 1; step < kGroup; step *= 2) {
    const bool upper = place & step;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i & step) continue;
      uint32_t &low = words.word[i], &high = words.word[i + step];
      const uint32_t other = __shfl_xor_sync(~0u, upper ? low : high, step);
      low = upper ? other : low;
      high = upper ? high : other;
    }
  }
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) result[j] = gumbel_of<Real>(words.word[j]);
}

// values[i] without an address: arrays that are indexed by a variable do not stay in registers.
template <class Real>
TA_DEVICE Real pick(const Real (&values)[kPerThread], int i) {
  Real picked = values[0];
#pragma unroll
  for (int j = 1; j < kPerThread; ++j) picked = i == j ? values[j] : picked;
  return picked;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T>)
    select_keys_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ Selection selection,
                       const __grid_constant__ SelectionOutputs outputs, Accumulator<T>* leads) {
  using Real = Accumulator<T>;
  using Softmax = OnlineSoftmax<Math<Real>>;
  constexpr int kGroups = SelectionNoise::kGroupsPerCall;
  static_assert(kTile == kGroups * SelectionNoise::kGroupKeys, "a tile holds the groups of one Philox call");
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Shared<Real, kTile>*>(memory);

  const int64_t tiles = ceil_div(p.query_length, kTile);
  const int64_t row = (tiles - 1 - blockIdx.x % tiles) * kTile;  // the longest rows of a causal mask first
  const int64_t head = blockIdx.x / tiles % p.heads, batch = blockIdx.x / tiles / p.heads;
  const int64_t row_end = row + kTile < p.query_length ? row + kTile : p.query_length;

  const HeadScore<Real> score(p, batch, head);
  const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
  const Rows<T> key(p.key, batch, head / p.group_size(), p.key_length, p.head_dim);
  const SelectionNoise noise = selection_noise(p);
  const int64_t noise_head = dropout_batch_head(p, batch, head), first_row = score.batch_head * p.query_length;
  const auto leaders_of = [&](int64_t r) { return Leaders<Real>(selection, outputs, leads, first_row + r); };

  // A sink is in the sums from the start, and joins the leaders at the end.
  const Real sink = p.sinks.defined() ? per_head<Real>(p.sinks, batch, head) : Math<Real>::negative_infinity();
  Real maximum[kPerThread], sum[kPerThread], weighted_sum[kPerThread];  // of w and w · (score − maximum)
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    maximum[i] = sink;
    sum[i] = Math<Real>::exp(sink - Softmax::safe_maximum(sink));
    weighted_sum[i] = 0;
    const int64_t r = row + thread_y() * kPerThread + i;
    if (r < p.query_length) leaders_of(r).clear(thread_x(), kSide);
  }

  const KeyRange range = score.band.keys_of_any(row, row_end);
  for (int64_t first = range.begin / kTile * kTile; first < range.end; first += kTile) {
    Real s[kPerThread][kPerThread] = {}, rescale[kPerThread], group_sums[kGroups][kPerThread];
    multiply_transposed(s, shared, query, row, key, first);
    const bool tested = !score.unmasked(row, row_end, first, first + kTile);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t r = row + thread_y() * kPerThread + i;
      Real largest = maximum[i];
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        s[i][j] = score.score(score.mod.capped(s[i][j]), r, first + thread_x() + kSide * j, tested);
        largest = s[i][j] > largest ? s[i][j] : largest;
      }
      largest = row_max(largest);
      const Real safe = Softmax::safe_maximum(largest), shift = sum[i] == 0 ? Real(0) : maximum[i] - largest;
      Real partial[kGroups] = {}, weighted = 0;
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const Real w = Math<Real>::exp(s[i][j] - safe);
        partial[j * kGroups / kPerThread] += w;
        if (w != 0) weighted += w * (s[i][j] - safe);
      }
      Real tile_sum = 0;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) tile_sum += group_sums[g][i] = row_sum(partial[g]);
      rescale[i] = Softmax::rescale(maximum[i], largest);
      weighted_sum[i] = (weighted_sum[i] + shift * sum[i]) * rescale[i] + row_sum(weighted);
      sum[i] = sum[i] * rescale[i] + tile_sum;
      maximum[i] = largest;
    }

    // Through shared memory, so that rows can be taken one after the other, which saves registers.
    Real* const scores = shared.weights + thread_y() * kPerThread * shared.kWeightPitch;  // of this thread's rows
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) scores[i * shared.kWeightPitch + thread_x() + kSide * j] = s[i][j];
    if (selection.rule == SelectionRule::kWithReplacement) {
      __syncwarp();
      // The 16 threads that share four rows share their draws.
#pragma unroll 1
      for (int64_t item = thread_x(); item < kPerThread * selection.count; item += kSide) {
        const int i = static_cast<int>(item % kPerThread);
        const int64_t sample = item / kPerThread, r = row + thread_y() * kPerThread + i;
        if (r >= p.query_length) continue;
        Real sums[kGroups];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) sums[g] = pick(group_sums[g], i);
        const auto words = noise.words(noise.group_counter(noise_head, r, first / SelectionNoise::kGroupKeys, sample));
        race(leaders_of(r), sample, words, first, scores + i * shared.kWeightPitch, sums,
             Softmax::safe_maximum(pick(maximum, i)), pick(rescale, i));
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t r = row + thread_y() * kPerThread + i;
        Real of_row[kPerThread], gumbel[kPerThread] = {};
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) of_row[j] = scores[i * shared.kWeightPitch + thread_x() + kSide * j];
        if (selection.rule == SelectionRule::kWithoutReplacement) gumbel_of_row(noise, noise_head, r, first, gumbel);
        rank<kSide>(leaders_of(r), r < p.query_length, first, of_row, gumbel, Softmax::safe_maximum(pick(maximum, i)),
                    [](int j) { return thread_x() + kSide * j; });
      }
    }
  }

  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t r = row + thread_y() * kPerThread + i;
    if (p.sinks.defined() && thread_x() == i && r < p.query_length)
      add_sink(leaders_of(r), noise, noise_head, r, p.key_length, sink, Softmax::safe_maximum(maximum[i]));
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t r = row + thread_y() * kPerThread + i;
    if (r >= p.query_length) continue;
    const Leaders<Real> leaders = leaders_of(r);
    const Real log_sum = Math<Real>::log(sum[i]);
    for (int64_t place = thread_x(); place < selection.count; place += kSide)
      static_cast<Real*>(outputs.log_prob)[(first_row + r) * selection.count + place] =
          leaders.index[place] < 0 ? Real(0) : leaders.score[place] - maximum[i] - log_sum;
    if (thread_x() != 0) continue;
    static_cast<Real*>(outputs.logsumexp)[first_row + r] = Softmax::logsumexp(maximum[i], sum[i]);
    static_cast<Real*>(outputs.entropy)[first_row + r] = sum[i] == 0 ? Real(0) : log_sum - weighted_sum[i] / sum[i];
  }
}

template <class T>
void select_keys(const AttentionProblem& p, const Selection& selection, const SelectionOutputs& outputs,
                 void* workspace, const Stream& stream) {
  const int64_t tiles = (p.query_length + kTile - 1) / kTile;
  launch(select_keys_kernel<T>, p.batch * p.heads * tiles, kThreads, sizeof(Shared<Accumulator<T>, kTile>), stream, p,
         selection, outputs, static_cast<Accumulator<T>*>(workspace));
}

}  // namespace torch_attn::cuda::simt

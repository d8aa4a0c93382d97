// How a tile of scores changes the keys that lead in a row: the device side of core/selection.h's rules, for the
// kernels that stream over the keys.
#pragma once

#include "../core/selection.h"
#include "head_score.cuh"

namespace torch_attn::cuda {

TA_DEVICE SelectionNoise selection_noise(const AttentionProblem& p) {
  if (!p.rng_state) return {p.philox_seed, p.philox_offset};
  return {static_cast<uint64_t>(p.rng_state[0]), static_cast<uint64_t>(p.rng_state[1])};
}

template <class Real>
TA_DEVICE Real exponential_of(uint32_t word) {
  return exponential_variate<Math<Real>>(static_cast<Real>(word));
}
template <class Real>
TA_DEVICE Real gumbel_of(uint32_t word) {
  return -Math<Real>::log(exponential_of<Real>(word));
}

// The keys that lead so far in one row. They live in the outputs themselves, so that their number has no bound; `lead`
// is scratch memory:
//   with replacement     the draw's arrival time, relative to the running maximum: E · exp(maximum) / Σ exp(score);
//   without replacement  the key's Gumbel noise, which is added to score − maximum when keys are compared, so that it
//                        does not drown in rows whose every score is as large as −1e9;
//   the highest          not used.
template <class Real>
struct Leaders {
  SelectionRule rule;
  int64_t count;
  int64_t* index;
  Real *score, *lead;

  TA_DEVICE Leaders(const Selection& selection, const SelectionOutputs& outputs, Real* leads, int64_t row_of_all)
      : rule(selection.rule),
        count(selection.count),
        index(outputs.indices + row_of_all * count),
        score(static_cast<Real*>(outputs.scores) + row_of_all * count),
        lead(rule == SelectionRule::kHighest ? nullptr : leads + row_of_all * count) {}

  // The highest scores of one row.
  TA_DEVICE Leaders(int64_t count, int64_t* index, Real* score)
      : rule(SelectionRule::kHighest), count(count), index(index), score(score), lead(nullptr) {}

  // Threads `lane` of `lanes` share the work.
  TA_DEVICE void clear(int lane, int lanes) const {
    for (int64_t i = lane; i < count; i += lanes) {
      index[i] = -1;
      score[i] = Math<Real>::negative_infinity();
      if (lead) lead[i] = rule == SelectionRule::kWithReplacement ? static_cast<Real>(INFINITY) : Real(0);
    }
  }

  // What keys are ranked by. `subtracted` is the running maximum.
  TA_DEVICE Real rank_of(Real key_score, Real noise, Real subtracted) const {
    return lead ? key_score - subtracted + noise : key_score;
  }
  TA_DEVICE Real rank_at(int64_t place, Real subtracted) const {
    return rank_of(score[place], lead ? lead[place] : Real(0), subtracted);
  }
  // What a newcomer must exceed.
  TA_DEVICE Real last_rank(Real subtracted) const { return rank_at(count - 1, subtracted); }

  // Puts a key that exceeds the last one into its place, behind equal ones.
  TA_DEVICE void insert(int64_t key, Real key_score, Real noise, Real subtracted) const {
    const Real rank = rank_of(key_score, noise, subtracted);
    int64_t place = count - 1;
    for (; place > 0 && rank > rank_at(place - 1, subtracted); --place) {
      index[place] = index[place - 1];
      score[place] = score[place - 1];
      if (lead) lead[place] = lead[place - 1];
    }
    index[place] = key;
    score[place] = key_score;
    if (lead) lead[place] = noise;
  }
};

// One draw with replacement, by one thread: the two groups of a tile join the race. `scores` are the tile's, in shared
// memory, `sums` the groups' sums of exp(score − subtracted), `rescale` what the old maximum's sums were multiplied by.
template <class Real>
TA_DEVICE void race(const Leaders<Real>& leaders, int64_t sample, const Philox4x32::Words& words, int64_t first_key,
                    const Real* scores, const Real (&sums)[SelectionNoise::kGroupsPerCall], Real subtracted,
                    Real rescale) {
  Real best = leaders.lead[sample] / rescale;
  int winner = -1;
  const auto join = [&](int first_of_group, uint32_t time_word, uint32_t member_word, Real sum) {
    const Real time = exponential_of<Real>(time_word) / sum;
    if (!(time < best)) return;
    best = time;
    // The member of the group at which the line of weights reaches the uniform number.
    const Real threshold = static_cast<Real>(member_word >> 8) * kUniformUnit<Real> * sum;
    Real reached = 0;
#pragma unroll 1
    for (int k = first_of_group; k < first_of_group + SelectionNoise::kGroupKeys; ++k) {
      const Real weight = Math<Real>::exp(scores[k] - subtracted);
      if (!(weight > 0)) continue;  // never a masked key, however sums are rounded
      winner = k;
      reached += weight;
      if (reached > threshold) break;
    }
  };
  join(0, words.word[0], words.word[1], sums[0]);
  join(SelectionNoise::kGroupKeys, words.word[2], words.word[3], sums[1]);
  leaders.lead[sample] = best;
  if (winner < 0) return;
  leaders.index[sample] = first_key + winner;
  leaders.score[sample] = scores[winner];
}

// Ranks a tile's keys, by the kLanes neighbouring threads that share the row, each with kKeys scores and noises; their
// numbers in the tile are key_of(i). Every thread of the warp calls it; rows beyond the query pass is_row = false.
template <int kLanes, class Real, int kKeys, class KeyOf>
TA_DEVICE void rank(const Leaders<Real>& leaders, bool is_row, int64_t first_key, const Real (&score)[kKeys],
                    const Real (&noise)[kKeys], Real subtracted, KeyOf key_of) {
  constexpr int kNoKey = 1 << 30;
  uint32_t taken = 0;
  while (true) {
    Real best = Math<Real>::negative_infinity(), best_score = best, best_noise = 0;
    int key = kNoKey, place = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const Real value = leaders.rank_of(score[i], noise[i], subtracted);
      if (!(taken >> i & 1) && value > best) {
        best = value, best_score = score[i], best_noise = noise[i];
        key = key_of(i), place = i;
      }
    }
    int winner = key;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const Real other = __shfl_xor_sync(~0u, best, step);
      const int other_key = __shfl_xor_sync(~0u, winner, step);
      if (other > best || (other == best && other_key < winner)) best = other, winner = other_key;
    }
    const bool joins = is_row && winner != kNoKey && best > leaders.last_rank(subtracted);
    int any = joins;
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2) any |= __shfl_xor_sync(~0u, any, step);
    if (!any) return;
    __syncwarp();  // all have read the last rank
    if (joins && key == winner) {
      leaders.insert(first_key + key, best_score, best_noise, subtracted);
      taken |= 1u << place;
    }
    __syncwarp();
  }
}

// The sink, a candidate after the last of `keys` keys, by one thread.
template <class Real>
TA_DEVICE void add_sink(const Leaders<Real>& leaders, const SelectionNoise& noise, int64_t noise_head, int64_t row,
                        int64_t keys, Real sink, Real subtracted) {
  if (leaders.rule == SelectionRule::kWithReplacement) {
    const int64_t group = SelectionNoise::groups(keys);
    for (int64_t sample = 0; sample < leaders.count; ++sample) {
      const auto words = noise.words(noise.group_counter(noise_head, row, group, sample));
      const uint32_t word = group % SelectionNoise::kGroupsPerCall == 0 ? words.word[0] : words.word[2];
      const Real time = exponential_of<Real>(word) / Math<Real>::exp(sink - subtracted);
      if (!(time < leaders.lead[sample])) continue;
      leaders.index[sample] = keys;
      leaders.score[sample] = sink;
    }
    return;
  }
  Real gumbel = 0;
  if (leaders.rule == SelectionRule::kWithoutReplacement) {
    const auto words = noise.words(noise.key_counter(noise_head, row, keys));
#pragma unroll
    for (int i = 0; i < SelectionNoise::kKeysPerCall; ++i)
      if (keys % SelectionNoise::kKeysPerCall == i) gumbel = gumbel_of<Real>(words.word[i]);
  }
  if (leaders.rank_of(sink, gumbel, subtracted) > leaders.last_rank(subtracted))
    leaders.insert(keys, sink, gumbel, subtracted);
}

}  // namespace torch_attn::cuda

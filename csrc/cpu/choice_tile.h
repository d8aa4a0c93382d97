// How one tile of scores changes the keys that lead in each row. Included by select_keys.h.
#pragma once

#include "../core/online_softmax.h"
#include "noise_tile.h"
#include "scratch.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// The keys that lead so far: for each place (a draw, or a rank) and row, what they are compared by, score and index.
// Before the first key: no lead, −∞, −1.
//
// Compared are: arrival times relative to the running maximum, exp(maximum) · E / Σ exp(score), where the lowest leads;
// or ranks, where the highest leads: the score, or score − maximum + Gumbel noise. Being relative keeps the noise from
// drowning in rows whose every score is as large as −1e9.
template <class Real>
struct Leaders {
  using IntElement = typename VecTypes<Real>::IntElement;
  int64_t places, lanes;
  Real *lead, *score;  // [place][lane]
  IntElement* index;

  Leaders() = default;
  Leaders(const Selection& selection, int64_t block_lanes, Scratch& scratch)
      : places(selection.count), lanes(block_lanes) {
    const int64_t size = places * lanes;
    lead = scratch.take<Real>(size);
    score = scratch.take<Real>(size);
    index = scratch.take<IntElement>(size);
    const Real infinity = static_cast<Real>(__builtin_inf());
    for (int64_t i = 0; i < size; ++i) {
      lead[i] = selection.rule == SelectionRule::kWithReplacement ? infinity : -infinity;
      score[i] = -infinity;
      index[i] = -1;
    }
  }

  // Those of the rows from lane offset on.
  TA_INLINE Leaders at(int64_t offset) const {
    Leaders moved = *this;
    moved.lead += offset, moved.score += offset, moved.index += offset;
    return moved;
  }
  TA_INLINE int64_t index_of(int64_t place, int64_t lane) const { return index[place * lanes + lane]; }
  TA_INLINE Real score_of(int64_t place, int64_t lane) const { return score[place * lanes + lane]; }

  TA_INLINE IntVec<Real> indices(int64_t place, int64_t lane) const {
    return (IntVec<Real>)load(reinterpret_cast<const Real*>(index + place * lanes + lane));
  }
  TA_INLINE void set_indices(int64_t place, int64_t lane, IntVec<Real> value) const {
    store(reinterpret_cast<Real*>(index + place * lanes + lane), (Vec<Real>)value);
  }
};

// One panel's scores with the keys [begin, end) of a block, [key][lane].
template <class Real>
struct ChoiceTile {
  int64_t begin, end;  // as indices into the block
  int64_t key, row;    // the block's first key, the panel's first row
  int64_t batch_head;
  const Real* scores;
  Real* weights;  // exp(score − maximum), from sum_weights
  const Real *old_maximum, *maximum;
  Real* rescale;  // exp(old_maximum − maximum), from sum_weights
};

// Brings the running Σ w and Σ w · (score − maximum), where w = exp(score − maximum), up to date, and gives the sums of
// w over the tile's groups, [group][lane]. A group's sum is taken in the order of its keys, from zero, wherever the
// tile starts.
template <class Real, int kVectors>
TA_NOINLINE void sum_weights(const ChoiceTile<Real>& tile, Real* sum, Real* weighted_sum, Real* group_sums) {
  using Math = VectorMath<Real>;
  using Softmax = OnlineSoftmax<Math>;
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  constexpr int64_t group_keys = SelectionNoise::kGroupKeys;
  // Where the weight is flushed to 0, so must be its product with an infinite distance.
  const Vec<Real> lowest = splat(2 * ExpConstants<Real>::kLowest);
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    const int lane = n * n_lanes;
    const Vec<Real> old_maximum = load(tile.old_maximum + lane), maximum = load(tile.maximum + lane);
    const Vec<Real> subtracted = Softmax::safe_maximum(maximum), rescale = Softmax::rescale(old_maximum, maximum);
    Vec<Real> tile_sum{}, tile_weighted{};
    for (int64_t first = round_down(tile.begin, group_keys); first < tile.end; first += group_keys) {
      Vec<Real> group_sum{};
      for (int64_t j = larger(first, tile.begin); j < smaller(first + group_keys, tile.end); ++j) {
        const Vec<Real> distance = load(tile.scores + j * width + lane) - subtracted;
        const Vec<Real> weight = Math::exp(distance);
        store(tile.weights + j * width + lane, weight);
        group_sum += weight;
        tile_weighted += weight * max(lowest, distance);
      }
      store(group_sums + first / group_keys * width + lane, group_sum);
      tile_sum += group_sum;
    }
    const Vec<Real> old_sum = load(sum + lane);
    const Vec<Real> shift = Math::select_equal(old_sum, splat(Real{0}), splat(Real{0}), old_maximum - maximum);
    store(weighted_sum + lane, (load(weighted_sum + lane) + shift * old_sum) * rescale + tile_weighted);
    store(sum + lane, old_sum * rescale + tile_sum);
    store(tile.rescale + lane, rescale);
  }
}

// The member of a group that the uniform number picks, [begin, end) being the group's keys in the tile: how many keys'
// weights lie below it on the line.
template <class Real>
TA_NOINLINE IntVec<Real> member_of_group(const Real* weights, int64_t width, int64_t begin, int64_t end,
                                         Vec<Real> threshold) {
  Vec<Real> reached{};
  IntVec<Real> member = splat_int<Real>(begin);
  for (int64_t j = begin; j + 1 < end; ++j) {
    reached += load(weights + j * width);
    member -= reached <= threshold;  // true is −1
  }
  return member;
}

// Draws with replacement: lets the tile's groups join each draw's race.
template <class Real, int kVectors>
TA_NOINLINE void race(const ChoiceTile<Real>& tile, const SelectionNoise& noise, const Real* group_sums,
                      Leaders<Real> leaders) {
  using IntElement = typename VecTypes<Real>::IntElement;
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  constexpr int64_t group_keys = SelectionNoise::kGroupKeys;
  const int64_t first_group = tile.key / group_keys;
  for (int64_t sample = 0; sample < leaders.places; ++sample) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      const int lane = n * n_lanes;
      const NoiseWords<Real> words(noise.group_counter(tile.batch_head, tile.row + lane, first_group, sample),
                                   noise.seed);
      Vec<Real> best = load(leaders.lead + sample * leaders.lanes + lane) / load(tile.rescale + lane);
      for (int64_t group = tile.begin / group_keys; group * group_keys < tile.end; ++group) {
        const int word = static_cast<int>(group % SelectionNoise::kGroupsPerCall) * 2;
        const Vec<Real> sum = load(group_sums + group * width + lane);
        const Vec<Real> time = exponential_of(words, word) / sum;
        const IntVec<Real> leads = time < best;
        if (lane_bits(leads) == 0) continue;
        const int64_t begin = larger(group * group_keys, tile.begin);
        const int64_t end = smaller((group + 1) * group_keys, tile.end);
        const IntVec<Real> member =
            member_of_group(tile.weights + lane, width, begin, end, uniform_of(words, word + 1) * sum);
        best = leads ? time : best;
        const IntVec<Real> index = member + static_cast<IntElement>(tile.key);
        leaders.set_indices(sample, lane, leads ? index : leaders.indices(sample, lane));
        Real* score = leaders.score + sample * leaders.lanes + lane;
        for (int i = 0; i < n_lanes; ++i) {
          if (leads[i]) score[i] = tile.scores[member[i] * width + lane + i];
        }
      }
      store(leaders.lead + sample * leaders.lanes + lane, best);
    }
  }
}

// Puts one key's values into the ranks of a vector of rows, behind equal ones.
template <class Real>
TA_INLINE void insert(const Leaders<Real>& leaders, int64_t lane, Vec<Real> value, Vec<Real> score,
                      IntVec<Real> index) {
  const int64_t last = leaders.places - 1;
  if (lane_bits(value > load(leaders.lead + last * leaders.lanes + lane)) == 0) return;
  IntVec<Real> inserted{};
  for (int64_t place = 0; place < leaders.places; ++place) {
    Real *lead = leaders.lead + place * leaders.lanes + lane, *scores = leaders.score + place * leaders.lanes + lane;
    const Vec<Real> lead_here = load(lead), score_here = load(scores);
    const IntVec<Real> index_here = leaders.indices(place, lane);
    inserted |= value > lead_here;
    store(lead, inserted ? value : lead_here);
    store(scores, inserted ? score : score_here);
    leaders.set_indices(place, lane, inserted ? index : index_here);
    value = inserted ? lead_here : value;
    score = inserted ? score_here : score;
    index = inserted ? index_here : index;
  }
}

// The highest scores, or with kNoise draws without replacement.
template <class Real, int kVectors, bool kNoise>
TA_NOINLINE void rank(const ChoiceTile<Real>& tile, const SelectionNoise& noise, Leaders<Real> leaders) {
  using Math = VectorMath<Real>;
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  constexpr int64_t step = kNoise ? SelectionNoise::kKeysPerCall : 1;
  for (int n = 0; n < kVectors; ++n) {
    const int lane = n * n_lanes;
    const Vec<Real> maximum = load(tile.maximum + lane), subtracted = OnlineSoftmax<Math>::safe_maximum(maximum);
    if constexpr (kNoise) {
      const Vec<Real> old_maximum = load(tile.old_maximum + lane);
      const Vec<Real> shift = Math::select_equal(old_maximum, maximum, splat(Real{0}), old_maximum - maximum);
      for (int64_t place = 0; place < leaders.places; ++place) {
        Real* lead = leaders.lead + place * leaders.lanes + lane;
        store(lead, load(lead) + shift);
      }
    }
    for (int64_t first = round_down(tile.begin, step); first < tile.end; first += step) {
      if constexpr (kNoise) {
        const NoiseWords<Real> words(noise.key_counter(tile.batch_head, tile.row + lane, tile.key + first), noise.seed);
#pragma GCC unroll 4
        for (int i = 0; i < step; ++i) {
          const int64_t j = first + i;
          if (j < tile.begin || j >= tile.end) continue;
          const Vec<Real> score = load(tile.scores + j * width + lane);
          const Vec<Real> value = score - subtracted - NoiseMath<Real>::log(exponential_of(words, i));
          insert(leaders, lane, value, score, splat_int<Real>(tile.key + j));
        }
      } else {
        const Vec<Real> score = load(tile.scores + first * width + lane);
        insert(leaders, lane, score, score, splat_int<Real>(tile.key + first));
      }
    }
  }
}

// One more candidate after the last of `keys` keys, the same for a vector of rows: the sink.
template <class Real>
TA_NOINLINE void add_candidate(SelectionRule rule, const SelectionNoise& noise, int64_t batch_head, int64_t row,
                               int64_t keys, Vec<Real> score, Vec<Real> maximum, Leaders<Real> leaders) {
  using Math = VectorMath<Real>;
  const IntVec<Real> index = splat_int<Real>(keys);
  const Vec<Real> distance = score - OnlineSoftmax<Math>::safe_maximum(maximum);
  if (rule == SelectionRule::kHighest) return insert(leaders, 0, score, score, index);
  if (rule == SelectionRule::kWithoutReplacement) {
    const NoiseWords<Real> words(noise.key_counter(batch_head, row, keys), noise.seed);
    const Vec<Real> e = exponential_of(words, static_cast<int>(keys % SelectionNoise::kKeysPerCall));
    return insert(leaders, 0, distance - NoiseMath<Real>::log(e), score, index);
  }
  const int64_t group = SelectionNoise::groups(keys);
  for (int64_t sample = 0; sample < leaders.places; ++sample) {
    const NoiseWords<Real> words(noise.group_counter(batch_head, row, group, sample), noise.seed);
    const Vec<Real> e = exponential_of(words, static_cast<int>(group % SelectionNoise::kGroupsPerCall) * 2);
    Real* scores = leaders.score + sample * leaders.lanes;
    const IntVec<Real> leads = e / Math::exp(distance) < load(leaders.lead + sample * leaders.lanes);
    store(scores, leads ? score : load(scores));
    leaders.set_indices(sample, 0, leads ? index : leaders.indices(sample, 0));
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA

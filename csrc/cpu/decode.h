// The forward pass for very few query rows, as when a model generates text: lanes run along the columns of key and
// value, which are read once for all rows of the heads that share them, as fast as memory delivers. Where there are
// fewer key/value heads than threads, the keys are split as well and the pieces merged (Dao et al. 2023,
// "Flash-Decoding"). Included by forward.h.
#pragma once

#include "../core/dropout.h"
#include "../core/online_softmax.h"
#include "decode_vectors.h"
#include "kernels.h"
#include "score_tile.h"
#include "tasks.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// With more rows than this, a panel of forward.h fills its lanes.
template <class Real>
constexpr int64_t kDecodeRows = larger(1, kLanes<Real> / 2);

constexpr int64_t kSplitKeys = 512;  // fewest keys per piece

// Up to twice as many do with caches that come from memory, not from the L2 cache: there decoding, which asks for lines
// ahead, reads 12 and 16 rows of float32 1.3 times as fast as a panel with AVX-512, and 1.2 times slower where they are
// in L2.
constexpr int64_t kCacheInMemory = int64_t{8} << 20;  // bytes of keys and values

TA_INLINE bool comes_from_memory(const AttentionProblem& p) {
  return p.batch * p.kv_heads * p.key_length * (p.head_dim + p.value_dim) * element_size(p.dtype) >= kCacheInMemory;
}

template <class Real>
TA_INLINE bool suits_decoding(const AttentionProblem& p) {
  if (p.query_length <= kDecodeRows<Real>) return true;
  if (TA_VECTOR_BYTES < 64 || sizeof(Real) != 4 || p.group_size() * p.query_length > 2 * kDecodeRows<Real>)
    return false;
  return comes_from_memory(p);
}

// Products: DecodeVectors, or those of bfloat16/. A block has Products::kKeys keys. Those that weigh (kWeighs) ask for
// lines themselves, and take the softmax of blocks that all rows attend alike in their own layout.
template <class Products>
struct Decode {
  using Real = typename Products::Real;
  using Math = VectorMath<Real>;
  using Softmax = OnlineSoftmax<Math>;
  static constexpr int kLaneCount = kLanes<Real>;
  static constexpr int64_t kKeys = Products::kKeys;

  const AttentionProblem& p;
  const ForwardOutputs& outputs;
  Dropout dropout;
  int64_t group, rows, all_rows;  // rows: of all heads of a group; all_rows: padded
  int64_t value_dim;              // padded
  int64_t pieces, piece_keys;
  int64_t state_size;        // of one row: maximum, sum, output
  Real* states = nullptr;    // [batch · kv head][piece][row][state], if pieces > 1
  bool* infinite = nullptr;  // set where numbers in pieces are: the results are of no use

  Decode(const AttentionProblem& problem, const ForwardOutputs& out, int64_t threads)
      : p(problem),
        outputs(out),
        dropout(Dropout::make(problem.dropout_p, problem.philox_seed, problem.philox_offset)) {
    group = p.heads / p.kv_heads;
    rows = group * p.query_length;
    all_rows = round_up(rows, Products::kRowGranule);
    value_dim = round_up(p.value_dim, Products::kColumnGranule);
    state_size = 2 * kLaneCount + value_dim;
    const int64_t heads = p.batch * p.kv_heads;
    const int64_t wanted = heads >= threads ? 1 : (2 * threads + heads - 1) / heads;
    const int64_t most = larger<int64_t>(1, p.key_length / kSplitKeys);
    piece_keys = larger(kKeys, round_up((p.key_length + smaller(wanted, most) - 1) / smaller(wanted, most), kKeys));
    pieces = larger<int64_t>(1, (p.key_length + piece_keys - 1) / piece_keys);
  }

  int64_t items() const { return p.batch * p.kv_heads * pieces; }

  int64_t head_of(int64_t kv_head, int64_t row) const { return kv_head * group + row / p.query_length; }

  // One piece of the keys for all rows that read one key/value head.
  void run(int64_t item, Scratch& scratch) const {
    const int64_t piece = item % pieces, kv_head = item / pieces % p.kv_heads, batch = item / pieces / p.kv_heads;
    Real* state = states == nullptr ? scratch.take<Real>(all_rows * state_size) : states + item * all_rows * state_size;
    Real* scores = scratch.take<Real>(all_rows * kKeys);
    Real* rescale = scratch.take<Real>(all_rows);
    Real* bias = scratch.take<Real>(kKeys);
    Products products(p, batch, kv_head, rows, scratch);
    for (int64_t row = 0; row < all_rows; ++row) {
      start(state + row * state_size, batch, head_of(kv_head, row < rows ? row : 0), piece == 0);
      rescale[row] = 1;
    }
    const ScoreStage<Real> of_group(p, batch, head_of(kv_head, 0));  // whose band and kinds of options all heads share
    const KeyRange any = of_group.band.keys_of_any(0, p.query_length);
    const KeyRange all = of_group.band.keys_of_all(0, p.query_length);
    const bool plain = of_group.only_scales() && p.dropout_p == 0;
    const int64_t begin = larger(piece * piece_keys, any.begin), end = smaller((piece + 1) * piece_keys, any.end);
    for (int64_t key = begin; key < end; key += kKeys) {
      const int64_t keys = smaller(kKeys, end - key);
      // Each product asks memory for what the next one reads.
      LinesAhead values_ahead(p.value, batch, kv_head, key, keys, p.value_dim);
      LinesAhead keys_ahead(p.key, batch, kv_head, key + keys, smaller(kKeys, end - key - keys), p.head_dim);
      if constexpr (Products::kWeighs) {
        products.dots(key, keys, scores, plain && all.begin <= key && all.end >= key + keys);
        if (products.weighs) {
          products.weigh(keys, rescale, state, state_size);
          products.combine(key, keys, scores, rescale, state + 2 * kLaneCount, state_size);
          continue;
        }
      } else {
        products.dots(key, keys, scores, values_ahead);
      }
      if constexpr (Products::kAsksBesideSoftmax) {
        values_ahead.divide(rows);
        keys_ahead.divide(5 * rows);  // the rest beside the values
      }
      for (int64_t row = 0; row < rows; ++row) {
        if constexpr (Products::kAsksBesideSoftmax) {
          values_ahead.ask();
          keys_ahead.ask();
        }
        const ScoreStage<Real> stage(p, batch, head_of(kv_head, row));
        rescale[row] = add_keys(stage, batch, head_of(kv_head, row), row % p.query_length, key, keys,
                                scores + row * kKeys, bias, state + row * state_size);
      }
      if constexpr (Products::kWeighs) {
        products.combine(key, keys, scores, rescale, state + 2 * kLaneCount, state_size);
      } else {
        products.combine(key, keys, scores, rescale, state + 2 * kLaneCount, state_size, keys_ahead);
      }
    }
    if constexpr (Products::kWeighs) {
      if (products.has_infinite()) __atomic_store_n(infinite, true, __ATOMIC_RELAXED);  // as other threads may
    }
    if (pieces > 1) return;
    for (int64_t row = 0; row < rows; ++row)
      finish(batch, head_of(kv_head, row), row % p.query_length, state + row * state_size);
  }

  // The sink joins the first piece only.
  void start(Real* state, int64_t batch, int64_t head, bool first_piece) const {
    const Real lowest = -static_cast<Real>(__builtin_inf());
    const Real sink = p.sinks.defined() && first_piece ? head_number<Real>(p.sinks, batch, head) : lowest;
    store(state, splat(sink));
    store(state + kLaneCount, Vec<Real>{});
    state[kLaneCount] = sink == lowest ? 0 : 1;
    fill<Real>(state + 2 * kLaneCount, 0, value_dim);
  }

  // The score and softmax stages of one row, with lanes along the keys. A state's maximum is the same in all lanes; its
  // sum is that over all lanes. Scores become weights; returns what the output so far is multiplied by.
  TA_NOINLINE Real add_keys(const ScoreStage<Real>& stage, int64_t batch, int64_t head, int64_t row, int64_t key,
                            int64_t keys, Real* scores, Real* bias, Real* state) const {
    using Int = IntVec<Real>;
    const KeyRange range = stage.band.keys_of_row(row);
    const auto clamp = [&](int64_t x) { return x < 0 ? int64_t{0} : x > keys ? keys : x; };
    const Int first = splat_int<Real>(clamp(range.begin - key)), last = splat_int<Real>(clamp(range.end - key)) - 1;
    const Vec<Real> position = splat(static_cast<Real>(stage.band.position(row) - key));
    if (stage.mask) {
      const MaskRows& mask = stage.mask_rows;
      load_row(bias, mask.dtype, mask.at(row, key), mask.column_stride, keys);
    }
    const Vec<Real> old_maximum = load(state);
    Vec<Real> highest = old_maximum;
    for (int64_t j = 0; j < keys; j += kLaneCount) {
      const Int number = lane_numbers<Real>() + static_cast<typename VecTypes<Real>::IntElement>(j);
      Vec<Real> score = stage.mod.capped(load(scores + j));
      if (stage.alibi) {
        const Vec<Real> distance = __builtin_convertvector(number, Vec<Real>) - position;
        score += ScoreMod<Math>::alibi_derivative(distance) * stage.mod.slope;
      }
      if (stage.mask) {
        const Vec<Real> added = load(bias + j);
        score = Math::select_equal(added, Math::negative_infinity(), Math::negative_infinity(), score + added);
      }
      score = (number < first) | (number > last) ? Math::negative_infinity() : score;
      store(scores + j, score);
      highest = max(highest, score);
    }
    Real maximum = highest[0];
    for (int i = 1; i < kLaneCount; ++i) maximum = highest[i] > maximum ? highest[i] : maximum;
    const Vec<Real> new_maximum = splat(maximum), subtracted = Softmax::safe_maximum(new_maximum);
    const Vec<Real> rescale = Softmax::rescale(old_maximum, new_maximum);
    Vec<Real> sum = load(state + kLaneCount) * rescale;
    for (int64_t j = 0; j < keys; j += kLaneCount) {
      const Vec<Real> weight = Math::exp(load(scores + j) - subtracted);
      sum += weight;
      store(scores + j, weight);
    }
    store(state, new_maximum);
    store(state + kLaneCount, sum);
    if (p.dropout_p > 0) drop(p.dropout_batch_head(batch, head), row, key, keys, scores);
    return rescale[0];
  }

  void drop(int64_t batch_head, int64_t row, int64_t key, int64_t keys, Real* weights) const {
    constexpr int64_t kGroup = Dropout::kKeysPerCall;
    const Real keep_scale = static_cast<Real>(Dropout::keep_scale(p.dropout_p));
    const int row_in_call = static_cast<int>(row % Dropout::kRowsPerCall);
    for (int64_t group = round_down(key, kGroup); group < key + keys; group += kGroup) {
      const auto call = dropout.call(batch_head, row, group);
      for (int64_t j = larger(group, key); j < smaller(group + kGroup, key + keys); ++j) {
        weights[j - key] *= dropout.keeps(call, row_in_call, static_cast<int>(j - group)) ? keep_scale : Real{0};
      }
    }
  }

  // Merges the pieces of one (batch, key/value head), into the first, and writes its rows out.
  void merge(int64_t item) const {
    Real* first_piece = states + item * pieces * all_rows * state_size;
    for (int64_t row = 0; row < rows; ++row) {
      Real* state = first_piece + row * state_size;
      for (int64_t piece = 1; piece < pieces; ++piece) {
        const Real* other = first_piece + (piece * all_rows + row) * state_size;
        const Vec<Real> maximum = max(load(state), load(other));
        const Vec<Real> rescale = Softmax::rescale(load(state), maximum),
                        other_rescale = Softmax::rescale(load(other), maximum);
        store(state, maximum);
        for (int64_t i = kLaneCount; i < state_size; i += kLaneCount) {
          store(state + i, load(state + i) * rescale + load(other + i) * other_rescale);
        }
      }
      finish(item / p.kv_heads, head_of(item % p.kv_heads, row), row % p.query_length, state);
    }
  }

  void finish(int64_t batch, int64_t head, int64_t row, Real* state) const {
    const Vec<Real> sum = splat(sum_of_lanes<Real>(load(state + kLaneCount)));
    const Vec<Real> inverse = Softmax::inverse_sum(sum);
    static_cast<Real*>(outputs.logsumexp)[p.first_row(batch, head) + row] = Softmax::logsumexp(load(state), sum)[0];
    Real* out = state + 2 * kLaneCount;
    for (int64_t i = 0; i < value_dim; i += kLaneCount) store(out + i, load(out + i) * inverse);
    store_rows(outputs.out, element(outputs.out, batch, head, row), out, value_dim, 1, p.value_dim);
  }
};

// Returns whether the results stand, see Decode::infinite.
template <class Products>
bool decode_with(const AttentionProblem& problem, const ForwardOutputs& outputs, const Parallel& parallel) {
  using Real = typename Products::Real;
  Decode<Products> decode(problem, outputs, parallel.threads < 1 ? 1 : parallel.threads);
  bool infinite = false;
  decode.infinite = &infinite;
  Scratch shared;
  if (decode.pieces > 1) decode.states = shared.take<Real>(decode.items() * decode.all_rows * decode.state_size);
  for_each_item(parallel, decode.items(), [&](int64_t item, Scratch& scratch) { decode.run(item, scratch); });
  if (decode.pieces > 1) {
    for_each_item(parallel, problem.batch * problem.kv_heads, [&](int64_t item, Scratch&) { decode.merge(item); });
  }
  return !infinite;
}

template <class Real>
void decode_as(const AttentionProblem& problem, const ForwardOutputs& outputs, const Parallel& parallel) {
  if constexpr (sizeof(Real) == 8) {
    decode_with<DecodeVectors<Real, double>>(problem, outputs, parallel);
  } else if (problem.dtype == ScalarType::kBFloat16) {
    decode_with<DecodeVectors<Real, BFloat16>>(problem, outputs, parallel);
  } else if (problem.dtype == ScalarType::kFloat16) {
    decode_with<DecodeVectors<Real, Float16>>(problem, outputs, parallel);
  } else {
    decode_with<DecodeVectors<Real, float>>(problem, outputs, parallel);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA

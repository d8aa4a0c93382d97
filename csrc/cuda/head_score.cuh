// One head's scores: what turns q·k into the number that the softmax sees, and the weight's dropout bit. The device
// side of core/score_mod.h, mask.h and dropout.h, shared by all tiers.
#pragma once

#include "../core/dropout.h"
#include "../core/mask.h"
#include "../core/online_softmax.h"
#include "../core/score_mod.h"
#include "numeric.cuh"

namespace torch_attn::cuda {

// attn_mask of one (batch, head): what it adds to the score of (row, key).
struct HeadMask {
  const unsigned char* data;  // null: no mask, whose strides are 0. Never chosen by a branch: loads stay global ones
  int64_t row_stride, key_stride;
  ScalarType dtype;

  template <class Real>
  TA_DEVICE Real bias(int64_t row, int64_t key) const {
    const int64_t i = row * row_stride + key * key_stride;
    switch (dtype) {
      case ScalarType::kBool:
        return data[i] ? Real(0) : Math<Real>::negative_infinity();
      case ScalarType::kFloat64:
        return static_cast<Real>(reinterpret_cast<const double*>(data)[i]);
      case ScalarType::kFloat32:
        return static_cast<Real>(reinterpret_cast<const float*>(data)[i]);
      case ScalarType::kBFloat16:
        return static_cast<Real>(load(reinterpret_cast<const BFloat16*>(data) + i));
      case ScalarType::kFloat16:
        return static_cast<Real>(load(reinterpret_cast<const Float16*>(data) + i));
    }
    return 0;
  }
};

TA_DEVICE int element_size(ScalarType type) {
  switch (type) {
    case ScalarType::kFloat64:
      return 8;
    case ScalarType::kFloat32:
      return 4;
    case ScalarType::kBool:
      return 1;
    default:
      return 2;
  }
}

TA_DEVICE Dropout make_dropout(const AttentionProblem& p) {
  const uint64_t seed = p.rng_state ? static_cast<uint64_t>(p.rng_state[0]) : p.philox_seed;
  const uint64_t offset = p.rng_state ? static_cast<uint64_t>(p.rng_state[1]) : p.philox_offset;
  return Dropout::make(p.dropout_p, seed, offset);
}

// AttentionProblem::dropout_batch_head, wherever the period is kept.
TA_DEVICE int64_t dropout_batch_head(const AttentionProblem& p, int64_t batch, int64_t head) {
  const int64_t batches = p.rng_state ? p.rng_state[2] : p.dropout_batches;
  return (batches > 0 ? batch % batches : batch) * p.heads + head;
}

// The weights that the Philox call of (row, key) keeps: bit 16 · (key % 2) + 8 · (key % 4 / 2) + 2 · (key % 8 / 4) +
// row % 2. Dropout::keeps for the four bytes of a word at once: whether a byte is at least `least`, from 0 to 256, says
// the majority of its top bit, that of the lower seven bits plus an addend of at most 0x80, and whether least < 128.
TA_DEVICE uint32_t kept_of_call(const Dropout& dropout, int64_t dropout_head, int64_t row, int64_t key) {
  const auto call = dropout.call(dropout_head, row, key);
  const bool small = dropout.least_kept() < 128;
  const int more = static_cast<int32_t>(call.shared) < dropout.shared_limit() ? 1 : 0;
  const uint32_t addend = static_cast<uint32_t>((small ? 128 : 256) - dropout.least_kept() - more) * 0x01010101u;
  const uint32_t third = small ? ~0u : 0u;
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = call.words.word[i ^ 1], sum = (word & 0x7F7F7F7Fu) + addend;
    bits |= (((word & sum) | (word & third) | (sum & third)) & 0x80808080u) >> (7 - i);
  }
  return bits;
}

// Lanes that need parts of one another's calls: where a call's bits come in fields of kWidth that belong in turn to the
// lanes with and without bit kLane in their number, the fields come to belong to those lanes' calls, and all are the
// lane's own. So lane bits take the places of row's and key's bits in kept_of_call's numbering.
template <int kLane, int kWidth>
TA_DEVICE uint32_t exchange_kept(uint32_t bits) {
  constexpr uint32_t kFields = ~0u / ((1u << kWidth) + 1);  // every second one
  const int own = threadIdx.x % 32 & kLane ? kWidth : 0, other = kWidth - own;
  const uint32_t received = __shfl_xor_sync(~0u, bits >> other, kLane) << other, fields = kFields << own;
  return (bits & fields) | (received & ~fields);
}

// alibi_slopes or sinks of one (batch, head).
template <class Real>
TA_DEVICE Real per_head(const TensorView& view, int64_t batch, int64_t head) {
  return static_cast<const Real*>(view.data)[batch * view.stride[0] + head * view.stride[1]];
}

// Query rows [begin, end).
struct RowRange {
  int64_t begin, end;
};

template <class Real>
struct HeadScore {
  BandMask band;
  ScoreMod<Math<Real>> mod;
  HeadMask mask;
  bool dropout_on;
  Real keep_scale;
  Dropout dropout;
  int64_t batch_head;
  int64_t dropout_head;  // what the dropout bits count as batch_head
  int query_length;      // of the batch entry, which fits: more rows would fill a GPU's memory
  int64_t first_row;     // AttentionProblem::first_row

  TA_DEVICE HeadScore(const AttentionProblem& p, int64_t batch, int64_t head)
      : band(band_mask(p, batch)),
        mod{static_cast<Real>(p.scale), static_cast<Real>(p.softcap), 0},
        mask{static_cast<const unsigned char*>(p.attn_mask.data) +
                 (batch * p.attn_mask.stride[0] + head * p.attn_mask.stride[1]) * element_size(p.attn_mask.dtype),
             p.attn_mask.stride[2], p.attn_mask.stride[3], p.attn_mask.dtype},
        dropout_on(p.dropout_p > 0),
        keep_scale(static_cast<Real>(Dropout::keep_scale(p.dropout_p))),
        dropout{},
        batch_head(batch * p.heads + head),
        dropout_head(0),
        query_length(static_cast<int>(p.queries_of(batch))),
        first_row(p.first_row(batch, head)) {
    const int64_t keys = p.keys_of(batch);
    if (band.key_length > keys) band.key_length = keys;  // key_lengths on a GPU is not checked before
    if (p.alibi_slopes.defined()) mod.slope = per_head<Real>(p.alibi_slopes, batch, head);
    if (dropout_on) {
      dropout = make_dropout(p);
      dropout_head = dropout_batch_head(p, batch, head);
    }
  }

  // Whether all of these rows, should they exist, attend all of these keys, but for the mask.
  TA_DEVICE bool covered(int64_t row_begin, int64_t row_end, int64_t key_begin, int64_t key_end) const {
    const KeyRange all = band.keys_of_all(row_begin, row_end);
    return all.begin <= key_begin && key_end <= all.end;
  }
  // Whether they need neither a test nor the mask.
  TA_DEVICE bool unmasked(int64_t row_begin, int64_t row_end, int64_t key_begin, int64_t key_end) const {
    return !mask.data && covered(row_begin, row_end, key_begin, key_end);
  }
  // Whether they all exist, too, so that the mask can be read without a test.
  TA_DEVICE bool inside(int64_t row_begin, int64_t row_end, int64_t key_begin, int64_t key_end) const {
    return row_end <= query_length && covered(row_begin, row_end, key_begin, key_end);
  }

  // Rows that may attend some key of [key_begin, key_end): BandMask::keys_of_any, turned around.
  TA_DEVICE RowRange rows_of_any(int64_t key_begin, int64_t key_end) const {
    if (key_begin >= band.key_length) return {0, 0};
    const int64_t first = key_begin - band.window_right - band.offset;
    const int64_t last = key_end - 1 + band.window_left - band.offset;
    return {first < 0 ? 0 : first, last + 1 < query_length ? last + 1 : query_length};
  }

  // The score of an already capped q·k; −inf where not attended. `tested`: false when unmasked() holds.
  TA_DEVICE Real score(Real capped, int64_t row, int64_t key, bool tested) const {
    Real result = capped;
    if (mod.slope != 0) result += mod.slope * alibi_derivative(row, key);
    if (!tested) return result;
    if (row >= query_length || !band.attends(row, key)) return Math<Real>::negative_infinity();
    return mask.data ? result + mask.template bias<Real>(row, key) : result;
  }
  // The gradient of a weight before dropout, from that of the weight after it.
  TA_DEVICE Real dropped(Real gradient, bool kept) const {
    if (!dropout_on) return gradient;
    return kept ? gradient * keep_scale : Real(0);
  }
  TA_DEVICE Real alibi_derivative(int64_t row, int64_t key) const {
    return ScoreMod<Math<Real>>::alibi_derivative(static_cast<Real>(key - band.position(row)));
  }
};

}  // namespace torch_attn::cuda

// The softmax stage of a panel's tile: from dots to the weights that the second product reads. Included by
// forward_stages.h and softmax_weights.h.
#pragma once

#include "../../core/online_softmax.h"
#include "dropout_beside.h"
#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// maximum[lane] is raised to include factor times the dots of keys [begin, end); factor > 0.
TA_NOINLINE inline void raise_maximum(int64_t begin, int64_t end, float factor, const float* dots, float* maximum) {
  Vec<float> highest[2 * kAmxVectors];
#pragma GCC unroll 4
  for (int n = 0; n < 2 * kAmxVectors; ++n) highest[n] = load(dots + begin * kAmxLanes + n * kLanes<float>);
  for (int64_t j = begin + 2; j < end; j += 2) {
#pragma GCC unroll 4
    for (int n = 0; n < 2 * kAmxVectors; ++n)
      highest[n] = max(highest[n], load(dots + j * kAmxLanes + n * kLanes<float>));
  }
#pragma GCC unroll 2
  for (int n = 0; n < kAmxVectors; ++n) {
    float* place = maximum + n * kLanes<float>;
    store(place, max(load(place), max(highest[n], highest[n + kAmxVectors]) * factor));
  }
}

// How far (as a logarithm) weights may exceed 1 before the maximum that is subtracted from the scores is moved. None in
// bfloat16, where a row's largest weight is then 1 and not rounded: with 8, output errs by 1.00 to 1.04 times PyTorch's
// error (root mean square), now by 0.98 to 1.0, and the forward pass is 3 to 10 % faster. Pieces are exact enough.
template <class Stored>
constexpr float kMaximumSlack = kPiecesOf<Stored> == 1 ? 0.0f : 8.0f;

// Keeps the old maximum where the new one is hardly larger: any number near the maximum serves as well, and with it the
// output so far stays as it is. Sets rescale[lane], what the output is multiplied by; returns a bit for each vector of
// lanes in which that is not 1 everywhere.
template <class Stored>
TA_INLINE uint32_t settle_maximum(const float* old_maximum, float* maximum, float* rescale) {
  uint32_t changed = 0;
  for (int n = 0; n < kAmxVectors; ++n) {
    const Vec<float> before = load(old_maximum + n * kLanes<float>), highest = load(maximum + n * kLanes<float>);
    const Vec<float> now = highest > before + kMaximumSlack<Stored> ? highest : before;
    store(maximum + n * kLanes<float>, now);
    store(rescale + n * kLanes<float>, OnlineSoftmax<VectorMath<float>>::rescale(before, now));
    if (_mm512_cmp_ps_mask(before, now, _CMP_NEQ_UQ) != 0) changed |= 1u << n;
  }
  return changed;
}

// A panel's output, [column][lane], times rescale[lane] in the vectors that changed.
TA_NOINLINE inline void rescale_output(uint32_t changed, const float* rescale, int64_t columns, float* out) {
  for (int n = 0; n < kAmxVectors; ++n) {
    if ((changed >> n & 1) == 0) continue;
    const Vec<float> factor = load(rescale + n * kLanes<float>);
    for (int64_t i = n * kLanes<float>; i < columns * kAmxLanes; i += kAmxLanes) store(out + i, load(out + i) * factor);
  }
}

// Scores (divided by factor) of keys [begin, end) become weights, stored as the pairs of a B operand that starts at key
// begin and has pieces of kAmxKeys keys; sums are brought up to date. words are KeptTile's, from key begin on. Done in
// parts beside tile products, of which each step of one 2 × 2 block takes kParts: pairs of keys, for one vector of
// lanes. With kKeeps, weights replace the scores as well.
template <class Stored, bool kDropout, int kParts = 0, bool kKeeps = false>
class SoftmaxPairs {
 public:
  TA_INLINE SoftmaxPairs(int64_t begin, int64_t end, float factor, float* scores, const uint32_t* words,
                         const float* maximum, uint16_t* pairs)
      : factor_(factor), scores_(scores + begin * kAmxLanes), words_(words), pairs_(pairs), count_((end - begin) / 2) {
#pragma GCC unroll 2
    for (int n = 0; n < kAmxVectors; ++n) {
      subtracted_[n] = OnlineSoftmax<VectorMath<float>>::safe_maximum(load(maximum + n * kLanes<float>));
    }
  }
  // Nothing to be done.
  TA_INLINE SoftmaxPairs() = default;

  template <int kSlot, int kSlots>
  TA_INLINE void slot() {
    add_parts<parts_before(kSlot, kSlots, kParts), parts_before(kSlot + 1, kSlots, kParts)>();
  }
  TA_INLINE void finish(const float* rescale, float* sum) {
    while (done_ < count_) add_parts<0, kPairsPerWord * kAmxVectors>();
#pragma GCC unroll 2
    for (int n = 0; n < kAmxVectors; ++n) {
      float* total = sum + n * kLanes<float>;
      store(total, load(total) * load(rescale + n * kLanes<float>) + (even_sum_[n] + odd_sum_[n]));
    }
  }

 private:
  static constexpr int kPairsPerWord = Dropout::kKeysPerWord / 2;
  static_assert(kParts % (kPairsPerWord * kAmxVectors) == 0);

  template <int kFirst, int kLast>
  TA_INLINE void add_parts() {
    if constexpr (kFirst < kLast) {
      if (done_ < count_) add_pair<kFirst % kAmxVectors, kFirst / kAmxVectors % kPairsPerWord>();
      if constexpr (kFirst % kAmxVectors == kAmxVectors - 1) ++done_;
      add_parts<kFirst + 1, kLast>();
    }
  }

  template <int n, int kPair>
  TA_INLINE void add_pair() {
    constexpr int n_lanes = kLanes<float>;
    constexpr int64_t kPieceStride = kAmxKeys * kAmxLanes;
    const int64_t place = 2 * done_ * kAmxLanes + n * n_lanes;
    const Vec<float> even = exp_for<Stored>(load(scores_ + place) * factor_ - subtracted_[n]);
    const Vec<float> odd = exp_for<Stored>(load(scores_ + place + kAmxLanes) * factor_ - subtracted_[n]);
    if constexpr (kKeeps) {
      store(scores_ + place, even);
      store(scores_ + place + kAmxLanes, odd);
    }
    even_sum_[n] += even;
    odd_sum_[n] += odd;
    uint16_t* to = pairs_ + 2 * done_ * kAmxLanes + 2 * n * n_lanes;
    if constexpr (kDropout) {
      store_pairs<Stored>(to, kPieceStride, even, odd,
                          kept_pairs<kPair>(words_ + done_ / kPairsPerWord * kAmxLanes + n * n_lanes));
    } else {
      store_pairs<Stored>(to, kPieceStride, even, odd);
    }
  }

  float factor_ = 0;
  float* scores_ = nullptr;
  const uint32_t* words_ = nullptr;
  uint16_t* pairs_ = nullptr;
  int64_t count_ = 0, done_ = 0;
  Vec<float> subtracted_[kAmxVectors]{}, even_sum_[kAmxVectors]{}, odd_sum_[kAmxVectors]{};
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA

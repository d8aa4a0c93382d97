// From a panel's scores to what the products of the backward pass read. Included by walk.h.
#pragma once

#include "../gradient_tile.h"
#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// What the products read of a panel's tile: weights after dropout and score gradients by rows (store_lanes), and the
// gradients also as the pairs of a B operand, which starts at the tile's first key.
struct HalfTiles {
  uint16_t *weights, *gradients;  // [key][lane]
  int64_t piece_stride;
  uint16_t* pairs;

  static constexpr int64_t kPairsPieceStride = kAmxKeys * kAmxLanes;

  // The weights of key j.
  template <class Stored>
  TA_INLINE void store_weights(int64_t j, Vec<float> low, Vec<float> high) const {
    store_lanes<Stored>(weights + j * kAmxLanes, piece_stride, low, high);
  }

  // The gradients, by key and vector, of keys j and j + 1; pairs starts at key begin.
  template <class Stored>
  TA_INLINE void store_gradients(int64_t j, int64_t begin, Vec<float> (&x)[2][2]) const {
    constexpr int n_lanes = kLanes<float>;
    uint16_t *by_rows = gradients + j * kAmxLanes, *by_pairs = pairs + (j - begin) * kAmxLanes;
    if constexpr (kPiecesOf<Stored> == 1) {
      store_halves(by_rows, x[0][0], x[0][1]);
      store_halves(by_rows + kAmxLanes, x[1][0], x[1][1]);
      store_pairs(by_pairs, x[0][0], x[1][0]);
      store_pairs(by_pairs + 2 * n_lanes, x[0][1], x[1][1]);
      return;
    }
#pragma GCC unroll 3
    for (int piece = 0; piece < kPiecesOf<Stored>; ++piece) {
      const Vec<float> a = take_piece(x[0][0]), b = take_piece(x[0][1]), c = take_piece(x[1][0]),
                       d = take_piece(x[1][1]);
      uint16_t *rows = by_rows + piece * piece_stride, *columns = by_pairs + piece * kPairsPieceStride;
      _mm512_storeu_si512(rows, upper_halves(a, b));
      _mm512_storeu_si512(rows + kAmxLanes, upper_halves(c, d));
      _mm512_storeu_si512(columns, upper_halves(a, c));
      _mm512_storeu_si512(columns + 2 * n_lanes, upper_halves(b, d));
    }
  }
};

// The tiles of keys [begin, end), as float, become HalfTiles.
template <class Stored>
TA_NOINLINE void halve_tiles(int64_t begin, int64_t end, const float* weights, const float* gradients,
                             const HalfTiles& to) {
  constexpr int n_lanes = kLanes<float>;
  for (int64_t j = begin; j < end; j += 2) {
    const int64_t even = j * kAmxLanes, odd = even + kAmxLanes;
    to.store_weights<Stored>(j, load(weights + even), load(weights + even + n_lanes));
    to.store_weights<Stored>(j + 1, load(weights + odd), load(weights + odd + n_lanes));
    Vec<float> gradient[2][2] = {{load(gradients + even), load(gradients + even + n_lanes)},
                                 {load(gradients + odd), load(gradients + odd + n_lanes)}};
    to.store_gradients<Stored>(j, begin, gradient);
  }
}

// weights_and_gradients without weight_scale or derivative, and halve_tiles in one pass: nothing else needs the float
// tiles. Dropout's scale costs no instruction: weights get it in their exponents, P · (keep · g − delta) is
// (scale · P) · (g or 0 − delta / scale), and both ways to drop are masks of instructions that are there anyway, but
// where weights are split. Done in parts beside tile products, of which each step of one 2 × 2 block takes kParts:
// pairs of keys.
template <class Stored, bool kDropout, int kParts>
class PlainHalfTiles {
 public:
  // logsumexp and delta are the panel's.
  TA_INLINE PlainHalfTiles(const KeySpan& span, float score_factor, const float* scores, const float* value_dots,
                           const float* logsumexp, const float* delta, float factor,
                           KeptTile<float, kAmxVectors> dropout, const HalfTiles& to)
      : to_(to),
        dropout_(dropout),
        scores_(scores),
        value_dots_(value_dots),
        score_factor_(score_factor),
        factor_(factor),
        begin_(span.begin),
        next_(span.begin),
        end_(span.end) {
    const float log_scale = kDropout ? __builtin_logf(dropout.scale) : 0;
#pragma GCC unroll 2
    for (int n = 0; n < kAmxVectors; ++n) {
      logsumexp_[n] = load(logsumexp + n * kLanes<float>) - log_scale;
      delta_[n] = load(delta + n * kLanes<float>) / dropout.scale;
    }
  }
  // Nothing to be done.
  TA_INLINE PlainHalfTiles() = default;

  template <int kSlot, int kSlots>
  TA_INLINE void slot() {
    static_assert(kParts <= kSlots);
    if constexpr (parts_before(kSlot, kSlots, kParts) < parts_before(kSlot + 1, kSlots, kParts)) {
      if (next_ < end_) add_pair();
    }
  }
  TA_INLINE void finish() {
    while (next_ < end_) add_pair();
  }

 private:
  TA_INLINE void add_pair() {
    constexpr int n_lanes = kLanes<float>;
    const int64_t j = next_;
    Vec<float> weight[2][kAmxVectors], gradient[2][kAmxVectors];  // [key][vector]
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __mmask16 kept[kAmxVectors];
#pragma GCC unroll 2
      for (int n = 0; n < kAmxVectors; ++n) {
        const int64_t place = (j + i) * kAmxLanes + n * n_lanes;
        weight[i][n] = exp_for<Stored>(load(scores_ + place) * score_factor_ - logsumexp_[n]);
        Vec<float> difference = load(value_dots_ + place) - delta_[n];
        if constexpr (kDropout) {
          kept[n] = dropout_.at(j + i, n).lanes;
          difference = _mm512_mask_sub_ps(-delta_[n], kept[n], load(value_dots_ + place), delta_[n]);
        }
        gradient[i][n] = weight[i][n] * difference * factor_;
      }
      if constexpr (!kDropout) {
        to_.store_weights<Stored>(j + i, weight[i][0], weight[i][1]);
      } else if constexpr (kPiecesOf<Stored> == 1) {
        store_halves(to_.weights + (j + i) * kAmxLanes, weight[i][0], weight[i][1], _mm512_kunpackw(kept[1], kept[0]));
      } else {
        to_.store_weights<Stored>(j + i, _mm512_maskz_mov_ps(kept[0], weight[i][0]),
                                  _mm512_maskz_mov_ps(kept[1], weight[i][1]));
      }
    }
    to_.store_gradients<Stored>(j, begin_, gradient);
    next_ += 2;
  }

  HalfTiles to_{};
  KeptTile<float, kAmxVectors> dropout_{};
  const float *scores_ = nullptr, *value_dots_ = nullptr;
  float score_factor_ = 0, factor_ = 0;
  int64_t begin_ = 0, next_ = 0, end_ = 0;
  Vec<float> logsumexp_[kAmxVectors]{}, delta_[kAmxVectors]{};
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA

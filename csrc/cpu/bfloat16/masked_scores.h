// attn_mask on a panel's scores where nothing else changes them: beside the product of the panel before, so that
// neither a tile of the mask nor a pass over the scores is needed. What this file does not serve (see
// MaskedPanel::serves) goes through ../score_tile.h. Included by forward_stages.h and walk.h.
#pragma once

#include "../score_tile.h"
#include "attended_bits.h"
#include "mask_beside.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Whether a floating mask is −∞ in all of a panel's rows and so many keys. Ends at the first other number: nearly every
// tile's first.
template <class Stored>
TA_NOINLINE bool excludes_all(const char* first, int64_t row_stride, int64_t keys) {
  for (int64_t i = 0; i < kAmxLanes; ++i) {
    const auto* row = reinterpret_cast<const Stored*>(first + i * row_stride);
    for (int64_t j = 0; j < keys; j += kLanes<float>) {
      const Vec<float> negative_infinity = splat(-__builtin_inff());
      if (_mm512_cmp_ps_mask(load_as(row + j), negative_infinity, _CMP_NEQ_UQ) != 0) return false;
    }
  }
  return true;
}

// The mask of one panel and the keys of one span, which it changes alone.
class MaskedPanel {
 public:
  // Whole panels and tiles of a mask whose rows are contiguous.
  static TA_INLINE bool serves(const ScoreStage<float>& stage, int64_t rows, const KeySpan& span) {
    return serves(stage) && !span.has_edges() && rows == kAmxLanes;
  }
  // Whether apply can ask for the next tile.
  static TA_INLINE bool asks_ahead(const ScoreStage<float>& stage) {
    return serves(stage) && stage.mask_rows.dtype != ScalarType::kBool;
  }

  // The mask from the panel's first row and span's first key on. shared: its bits from there on, if there are any.
  MaskEffect load(const MaskRows& mask, const uint32_t* shared, int64_t row, int64_t key, const KeySpan& span) {
    first_ = mask.at(row, key + span.begin);
    row_stride_ = mask.row_stride;
    dtype_ = mask.dtype;
    const int64_t keys = span.end - span.begin;
    const auto effect = [&](bool excludes) { return excludes ? MaskEffect::kExcludesAll : MaskEffect::kSome; };
    switch (dtype_) {
      case ScalarType::kBool:
        if (shared == nullptr) load_attended_bits(first_, row_stride_, kAmxLanes, keys, bits_);
        attended_ = shared == nullptr ? bits_ : shared;
        return effect_of_bits(attended_, keys);
      case ScalarType::kBFloat16:
        return effect(excludes_all<BFloat16>(first_, row_stride_, keys));
      case ScalarType::kFloat16:
        return effect(excludes_all<Float16>(first_, row_stride_, keys));
      default:
        return effect(excludes_all<float>(first_, row_stride_, keys));
    }
  }

  // How often apply calls between, where there is no product.
  int64_t squares(const KeySpan& span) const {
    if (dtype_ == ScalarType::kBool) return 0;
    return kAmxVectors * (span.end - span.begin) * element_size(dtype_) / 64;
  }

  // Scores, divided by factor, become those with the mask; with kMaximum, maximum is raised to include them. Returns
  // what the scores are divided by then. multiply(beside) is a product whose columns, of head_dim or value_dim, are
  // dim; next is the element that the next tile's mask starts with, if that is to be asked for; staging holds 16
  // vectors. between is called now and then, where there is no product.
  template <bool kMaximum, class Multiply, class Between = NothingBetween>
  float apply(const KeySpan& span, float factor, float* scores, float* maximum, int64_t dim, const char* next,
              float* staging, const Multiply& multiply, const Between& between = {}) const {
    const auto beside = [&](auto parts) TA_INLINE_LAMBDA {
      multiply(parts);
      parts.finish(between);
    };
    const auto add = [&]<class Stored>() TA_INLINE_LAMBDA {
      const auto add_in = [&]<int kSquares>() TA_INLINE_LAMBDA {
        beside(AddedBeside<Stored, kMaximum, kSquares>(first_, row_stride_, next == nullptr ? 0 : next - first_,
                                                       span.begin, span.end, factor, scores, maximum, staging));
      };
      // A tile of 64 keys and 64 columns has 4 steps.
      dim <= 64 && sizeof(Stored) == 4 ? add_in.template operator()<2>() : add_in.template operator()<1>();
      return 1.0f;
    };
    switch (dtype_) {
      case ScalarType::kBool:
        if (dim <= 64) {
          beside(AttendedBeside<kMaximum, 8>(attended_, span.begin, span.end, factor, scores, maximum));
        } else {
          beside(AttendedBeside<kMaximum, 4>(attended_, span.begin, span.end, factor, scores, maximum));
        }
        return factor;
      case ScalarType::kBFloat16:
        return add.template operator()<BFloat16>();
      case ScalarType::kFloat16:
        return add.template operator()<Float16>();
      default:
        return add.template operator()<float>();
    }
  }

 private:
  static TA_INLINE bool serves(const ScoreStage<float>& stage) {
    return stage.mask && !stage.softcap && !stage.alibi && stage.mask_rows.row_stride != 0 &&
           stage.mask_rows.column_stride == 1 && stage.mask_rows.dtype != ScalarType::kFloat64 &&
           stage.dot_factor() > 0;
  }

  const char* first_ = nullptr;
  int64_t row_stride_ = 0;
  ScalarType dtype_ = ScalarType::kBool;
  const uint32_t* attended_ = nullptr;
  alignas(64) uint32_t bits_[kAmxKeys];
};

// Where the mask of a tile starts that begins with a row and a key; null if it is not read there, or none is.
TA_INLINE const char* next_mask_of(const ScoreStage<float>& stage, int64_t row, int64_t key) {
  const MaskRows& mask = stage.mask_rows;
  const bool is_read = mask.data != nullptr && mask.row_stride != 0 && mask.column_stride == 1 && key < mask.keys;
  return is_read ? mask.at(row, key) : nullptr;
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA

// A boolean mask as bits in the order of a panel's scores: for each key one number, whose bit i is set where the
// panel's row i attends it. A mask that heads or batch entries share becomes bits once a call. Included by
// masked_scores.h.
#pragma once

#include <optional>

#include "../../core/mask.h"
#include "../mask_tile.h"
#include "../tasks.h"
#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

static_assert(kAmxLanes == 32, "a key's bits are one uint32_t");

// bits[key] of so many rows and keys. Reads as many keys of a row at a time as make memory fast.
TA_NOINLINE inline void load_attended_bits(const char* first, int64_t row_stride, int64_t rows, int64_t keys,
                                           uint32_t* bits) {
  constexpr int64_t kLines = 4, kLine = 64;
  for (int64_t key = 0; key < keys; key += kLines * kLine) {
    const int64_t lines = smaller(kLines, (keys - key + kLine - 1) / kLine);
    alignas(64) uint8_t bytes[kLines][4][kLine];  // [line][row / 8][key], bit row % 8
    for (int64_t row = 0; row < kAmxLanes; row += 8) {
      for (int64_t line = 0; line < lines; ++line) {
        const int64_t left = keys - key - line * kLine;
        const __mmask64 wanted = left < kLine ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
        const char* place = first + row * row_stride + key + line * kLine;
        __m512i eight = _mm512_setzero_si512();
        const auto add = [&](int i) TA_INLINE_LAMBDA {
          const __m512i values = _mm512_maskz_loadu_epi8(wanted, place + i * row_stride);
          const __m512i bit = _mm512_set1_epi8(static_cast<char>(1 << i));
          eight = _mm512_mask_add_epi8(eight, _mm512_test_epi8_mask(values, values), eight, bit);
        };
        if (rows - row >= 8) {
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) add(i);
        } else {
          for (int i = 0; i < rows - row; ++i) add(i);
        }
        _mm512_store_si512(bytes[line][row / 8], eight);
      }
    }
    for (int64_t line = 0; line < lines; ++line) {
      const __m512i a = _mm512_load_si512(bytes[line][0]), b = _mm512_load_si512(bytes[line][1]);
      const __m512i c = _mm512_load_si512(bytes[line][2]), d = _mm512_load_si512(bytes[line][3]);
      const __m512i low_ab = _mm512_unpacklo_epi8(a, b), high_ab = _mm512_unpackhi_epi8(a, b);
      const __m512i low_cd = _mm512_unpacklo_epi8(c, d), high_cd = _mm512_unpackhi_epi8(c, d);
      // Quarter i of number j holds keys 16 · i + 4 · j and the next three.
      const __m512i number[] = {_mm512_unpacklo_epi16(low_ab, low_cd), _mm512_unpackhi_epi16(low_ab, low_cd),
                                _mm512_unpacklo_epi16(high_ab, high_cd), _mm512_unpackhi_epi16(high_ab, high_cd)};
      const __m512i low01 = _mm512_shuffle_i32x4(number[0], number[1], 0x44);
      const __m512i high01 = _mm512_shuffle_i32x4(number[0], number[1], 0xEE);
      const __m512i low23 = _mm512_shuffle_i32x4(number[2], number[3], 0x44);
      const __m512i high23 = _mm512_shuffle_i32x4(number[2], number[3], 0xEE);
      const __m512i sixteen[] = {_mm512_shuffle_i32x4(low01, low23, 0x88), _mm512_shuffle_i32x4(low01, low23, 0xDD),
                                 _mm512_shuffle_i32x4(high01, high23, 0x88),
                                 _mm512_shuffle_i32x4(high01, high23, 0xDD)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t left = keys - key - line * kLine - 16 * i;
        const __mmask16 stored = left >= 16 ? 0xFFFF : left > 0 ? static_cast<__mmask16>((1u << left) - 1) : 0;
        _mm512_mask_storeu_epi32(bits + key + line * kLine + 16 * i, stored, sixteen[i]);
      }
    }
  }
}

enum class MaskEffect { kNone, kSome, kExcludesAll };

// keys is a multiple of 16.
TA_INLINE MaskEffect effect_of_bits(const uint32_t* bits, int64_t keys) {
  __m512i any = _mm512_setzero_si512(), every = _mm512_set1_epi32(-1);
  for (int64_t key = 0; key < keys; key += 16) {
    const __m512i of_keys = _mm512_loadu_si512(bits + key);
    any = _mm512_or_si512(any, of_keys);
    every = _mm512_and_si512(every, of_keys);
  }
  if (_mm512_test_epi32_mask(any, any) == 0) return MaskEffect::kExcludesAll;
  const bool all = _mm512_cmpneq_epi32_mask(every, _mm512_set1_epi32(-1)) == 0;
  return all ? MaskEffect::kNone : MaskEffect::kSome;
}

// The bits of a whole call's mask, where several heads or batch entries read the same rows of it, and where they take
// no more memory than query, key and value.
class AttendedBits {
 public:
  AttendedBits(const AttentionProblem& p, const Parallel& parallel) {
    const TensorView& mask = p.attn_mask;
    if (!mask.defined() || mask.dtype != ScalarType::kBool || mask.stride[3] != 1 || mask.stride[2] == 0) return;
    if (p.softcap != 0 || p.alibi_slopes.defined()) return;  // see MaskedPanel::serves
    const int64_t batches = mask.stride[0] == 0 ? 1 : p.batch, heads = mask.stride[1] == 0 ? 1 : p.heads;
    const int64_t panels = p.query_length / kAmxLanes;
    row_keys_ = p.key_length;
    head_stride_ = mask.stride[1] == 0 ? 0 : panels * row_keys_;
    batch_stride_ = mask.stride[0] == 0 ? 0 : heads * panels * row_keys_;
    const int64_t numbers = batches * heads * panels * row_keys_;
    const int64_t inputs =
        p.batch * element_size(p.dtype) *
        (p.heads * p.query_length * p.head_dim + p.kv_heads * p.key_length * (p.head_dim + p.value_dim));
    if (batches * heads == p.batch * p.heads || numbers == 0) return;
    if (numbers * static_cast<int64_t>(sizeof(uint32_t)) > inputs) return;
    bits_ = scratch_.emplace().take<uint32_t>(numbers);
    for_each_item(parallel, batches * heads * panels, [&](int64_t item, Scratch&) {
      const int64_t row = item % panels * kAmxLanes, head = item / panels % heads, batch = item / panels / heads;
      const KeyRange keys = keys_of(p, row, batch, batches == 1 ? p.batch : batch + 1);
      if (keys.empty()) return;
      load_attended_bits(element(mask, batch, head, row) + keys.begin, mask.stride[2], kAmxLanes, keys.end - keys.begin,
                         bits_ + item * row_keys_ + keys.begin);
    });
  }

  TA_INLINE bool defined() const { return bits_ != nullptr; }

  // Of the panel that starts at row, from key on; null: there are none.
  TA_INLINE const uint32_t* at(int64_t batch, int64_t head, int64_t row, int64_t key) const {
    if (bits_ == nullptr) return nullptr;
    return bits_ + batch * batch_stride_ + head * head_stride_ + row / kAmxLanes * row_keys_ + key;
  }

 private:
  // The keys that the band leaves to some row of a panel in one of these batch entries.
  static KeyRange keys_of(const AttentionProblem& p, int64_t row, int64_t batch, int64_t last) {
    KeyRange all = band_mask_of_selected_rows(p, batch).keys_of_any(row, row + kAmxLanes);
    for (int64_t i = batch + 1; i < last; ++i) {
      const KeyRange keys = band_mask_of_selected_rows(p, i).keys_of_any(row, row + kAmxLanes);
      all = {smaller(all.begin, keys.begin), larger(all.end, keys.end)};
    }
    return all;
  }

  std::optional<Scratch> scratch_;
  uint32_t* bits_ = nullptr;
  int64_t row_keys_ = 0, head_stride_ = 0, batch_stride_ = 0;
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA

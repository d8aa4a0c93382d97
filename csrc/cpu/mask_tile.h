// attn_mask's values for one tile of scores, whose lanes are the mask's rows: the mask is transposed on its way in. A
// boolean mask becomes one bit per key in each lane's word, a floating one a number per key and lane. Included by
// score_tile.h.
#pragma once

#include "../core/problem.h"
#include "pack.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// One bit per key, in as many words as lanes.
template <class Real>
constexpr int64_t kKeysPerWord = 8 * static_cast<int64_t>(sizeof(Real));
template <class Real>
using Word = typename VecTypes<Real>::WordElement;

// What the mask adds to a tile. All null: nothing.
template <class Real>
struct BiasTile {
  const Real* per_key = nullptr;
  const Real* per_lane = nullptr;        // [key][lane]
  const Word<Real>* attended = nullptr;  // [key / kKeysPerWord][lane], bit key % kKeysPerWord: whether it is attended

  TA_INLINE bool empty() const { return per_key == nullptr && per_lane == nullptr && attended == nullptr; }
};

// The mask of one (batch, head).
struct MaskRows {
  const char* data = nullptr;  // the element (0, 0)
  ScalarType dtype = ScalarType::kBool;
  int64_t row_stride = 0, column_stride = 0;  // in bytes; in elements
  int64_t keys = 0;                           // a row's length

  TA_INLINE const char* at(int64_t row, int64_t key) const {
    return data + row * row_stride + key * column_stride * element_size(dtype);
  }
};

// The values for rows [row, row + rows) and keys [key, key + keys), as far as there are any. A tile's rows lie far
// apart, so that the hardware does not foresee them. Asked for one tile before they are read; two would be too early,
// since at strides like 4 KiB all rows share a few sets of the caches.
TA_INLINE void add_bias(const MaskRows& mask, int64_t row, int64_t rows, int64_t key, int64_t keys, RowsAhead& ahead) {
  if (mask.data == nullptr || mask.row_stride == 0 || mask.column_stride != 1 || key >= mask.keys) return;
  ahead.add(mask.at(row, key), mask.row_stride, smaller(keys, mask.keys - key) * element_size(mask.dtype), rows);
}

// The same at once, for the tile after the one at lane offset of a block of rows and a block of keys, where all panels
// have that width: the next panel's, or after the last panel the next keys'.
TA_INLINE void prefetch_next_bias(const MaskRows& mask, int64_t row, int64_t rows, int64_t offset, int64_t width,
                                  int64_t key, int64_t keys) {
  const bool last = offset + width >= rows;
  const int64_t first = last ? 0 : offset + width;
  RowsAhead ahead;
  add_bias(mask, row + first, smaller(width, rows - first), last ? key + keys : key, keys, ahead);
  ahead.ask_for_rest();
}

// Whether all of them are −∞.
template <class Real>
TA_NOINLINE bool all_masked(const Real* bias, int64_t count) {
  const Real nothing = -static_cast<Real>(__builtin_inf());
  for (int64_t i = 0; i < count; ++i) {
    if (!(bias[i] == nothing)) return false;
  }
  return true;
}

// Loads the values for keys [key, key + keys), as far as they exist, as one per key. False if they mask every key.
template <class Real>
TA_NOINLINE bool load_bias_per_key(const MaskRows& mask, int64_t key, int64_t keys, Real* out, BiasTile<Real>& bias) {
  keys = smaller(keys, mask.keys - key);
  if (mask.dtype == ScalarType::kBool && mask.column_stride == 1) {
    const char* attended = mask.at(0, key);
    int64_t count = 0;
    for (int64_t i = 0; i < keys; ++i) count += attended[i] != 0;
    if (count == 0 || count == keys) return count > 0;
  }
  load_row(out, mask.dtype, mask.at(0, key), mask.column_stride, keys);
  bias.per_key = out;
  return !all_masked(out, keys);
}

// Bit i: whether byte i of count ≤ 64 is not 0.
TA_INLINE uint64_t bits_of_bytes(const char* bytes, int64_t count) {
#if defined(__AVX512BW__)
  const __m512i values = _mm512_maskz_loadu_epi8(count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1, bytes);
  return _mm512_test_epi8_mask(values, values);
#else
  char padded[64];
  if (count < 64) {
    __builtin_memset(padded, 0, sizeof padded);
    __builtin_memcpy(padded, bytes, count);
    bytes = padded;
  }
  uint64_t bits = 0;
#if defined(__AVX2__)
  for (int i = 0; i < 64; i += 32) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i));
    const auto zero = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(values, _mm256_setzero_si256())));
    bits |= uint64_t{~zero} << i;
  }
#elif defined(__x86_64__)
  for (int i = 0; i < 64; i += 16) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i));
    const auto zero = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(values, _mm_setzero_si128())));
    bits |= uint64_t{~zero & 0xFFFFu} << i;
  }
#else
  for (int i = 0; i < 64; ++i) bits |= uint64_t{bytes[i] != 0} << i;
#endif
  return bits;
#endif
}

// A boolean mask whose rows are contiguous. Lanes from rows on attend everything.
template <class Real>
TA_NOINLINE bool load_attended(const MaskRows& mask, int64_t row, int64_t rows, int64_t width, int64_t key,
                               int64_t begin, int64_t end, Real* out, BiasTile<Real>& bias) {
  auto* words = reinterpret_cast<Word<Real>*>(out);
  constexpr int64_t kWords = 64 / kKeysPerWord<Real>;
  uint64_t any = 0, every = ~uint64_t{0};
  for (int64_t first = round_down(begin, 64); first < end; first += 64) {
    const int64_t count = smaller<int64_t>(64, mask.keys - key - first);
    // The bits of keys that exist and lie in [begin, end).
    uint64_t wanted = ~uint64_t{0};
    if (first < begin) wanted <<= begin - first;
    if (smaller(first + count, end) < first + 64) wanted &= (uint64_t{1} << (smaller(first + count, end) - first)) - 1;
    const char* place = mask.at(row, key + first);
    Word<Real>* group = words + first / kKeysPerWord<Real> * width;
    for (int64_t i = 0; i < width; ++i) {
      uint64_t bits = ~uint64_t{0};
      if (i < rows) {
        bits = bits_of_bytes(place + i * mask.row_stride, count);
        any |= bits & wanted;
        every &= bits | ~wanted;
      }
#pragma GCC unroll 2
      for (int64_t w = 0; w < kWords; ++w) {
        group[w * width + i] = static_cast<Word<Real>>(bits >> (w * kKeysPerWord<Real> % 64));
      }
    }
  }
  if (every != ~uint64_t{0}) bias.attended = words;
  return any != 0;
}

// tile[k][i] = the i-th row's number k as an accumulator, for as many rows and numbers as lanes.
template <class Real, class Stored>
TA_INLINE void load_transposed(Vec<Real> (&tile)[kLanes<Real>], const char* first, int64_t row_stride) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<Real>; ++i) tile[i] = load_as(reinterpret_cast<const Stored*>(first + i * row_stride));
  transpose_in_registers<Real>(tile);
}

#if defined(__AVX512F__)
// 32-bit elements: rows enter in quarters, as one operand of an insertion, and half of the steps of
// transpose_in_registers are left. At strides like 4 KiB all rows share one set of the L1 cache, whose ways are fewer:
// so the quarters of a row are read one after the other.
struct Quarters {
  __m512 of[4][4];  // [quarter of the columns][row % 4]: of rows r, r + 4, r + 8, r + 12

  TA_INLINE Quarters(const char* first, int64_t row_stride) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      __m512 row[4];
      load(first + r * row_stride, 4 * row_stride, row);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) of[c][r] = row[c];
    }
  }

  // out[quarter of the columns] of four rows.
  static TA_INLINE void load(const char* first, int64_t row_stride, __m512 (&out)[4]) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const auto quarter = [&](int i) TA_INLINE_LAMBDA {
        return _mm_loadu_ps(reinterpret_cast<const float*>(first + i * row_stride) + 4 * c);
      };
      const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(quarter(0)), quarter(1), 1);
      const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(quarter(2)), quarter(3), 1);
      out[c] = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    }
  }

  // The columns of a quarter, of[c].
  static TA_INLINE void columns(const __m512 (&x)[4], Vec<float> (&out)[4]) {
    const __m512 low01 = _mm512_unpacklo_ps(x[0], x[1]), high01 = _mm512_unpackhi_ps(x[0], x[1]);
    const __m512 low23 = _mm512_unpacklo_ps(x[2], x[3]), high23 = _mm512_unpackhi_ps(x[2], x[3]);
    out[0] = _mm512_shuffle_ps(low01, low23, 0x44);
    out[1] = _mm512_shuffle_ps(low01, low23, 0xEE);
    out[2] = _mm512_shuffle_ps(high01, high23, 0x44);
    out[3] = _mm512_shuffle_ps(high01, high23, 0xEE);
  }

  // Calls visit(number, column) for each column.
  template <class Visit>
  TA_INLINE void for_each_column(const Visit& visit) const {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      Vec<float> four[4];
      columns(of[c], four);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) visit(4 * c + i, four[i]);
    }
  }
};

TA_INLINE void load_transposed_words(Vec<float> (&tile)[16], const char* first, int64_t row_stride) {
  Quarters(first, row_stride).for_each_column([&](int i, Vec<float> column) TA_INLINE_LAMBDA { tile[i] = column; });
}

template <>
TA_INLINE void load_transposed<float, float>(Vec<float> (&tile)[16], const char* first, int64_t row_stride) {
  load_transposed_words(tile, first, row_stride);
}
#endif

// Keys per step of load_added: bfloat16 is transposed in pairs where that is cheaper.
template <class Real, class Stored>
constexpr int kKeysAtOnce = kLanes<Real>;
#if defined(__AVX512F__)
template <>
constexpr int kKeysAtOnce<float, BFloat16> = 32;
#endif

// out[k][lane] of a whole square of the mask.
template <class Real, class Stored>
TA_INLINE void load_square(const char* first, int64_t row_stride, int64_t count, int64_t width, Real* out) {
  constexpr int n = kLanes<Real>;
  const auto put = [&](int k, Vec<Real> values) TA_INLINE_LAMBDA {
    if (k < count) store(out + k * width, values);
  };
  Vec<Real> tile[n];
#if defined(__AVX512F__)
  if constexpr (kKeysAtOnce<Real, Stored> == 2 * n) {
    load_transposed_words(tile, first, row_stride);
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) {
      const auto pair = (typename VecTypes<Real>::Unsigned)tile[k];
      put(2 * k, (Vec<Real>)(pair << 16));
      put(2 * k + 1, (Vec<Real>)(pair & 0xFFFF0000u));
    }
    return;
  }
#endif
  load_transposed<Real, Stored>(tile, first, row_stride);
#pragma GCC unroll 16
  for (int k = 0; k < n; ++k) put(k, tile[k]);
}

// Whether one of out[k][lane] of a square is not −∞.
template <class Real>
TA_INLINE bool any_attended(const Real* out, int64_t count, int64_t width) {
  const IntVec<Real> nothing = (IntVec<Real>)splat(-static_cast<Real>(__builtin_inf()));
  IntVec<Real> different{};
  for (int64_t k = 0; k < count; ++k) different |= (IntVec<Real>)load(out + k * width) ^ nothing;
  return lane_bits(different != 0) != 0;
}

// A floating mask whose rows are contiguous.
template <class Real, class Stored>
TA_NOINLINE bool load_added(const MaskRows& mask, int64_t row, int64_t rows, int64_t width, int64_t key, int64_t begin,
                            int64_t end, Real* out) {
  constexpr int n = kLanes<Real>, at_once = kKeysAtOnce<Real, Stored>;
  end = smaller(end, mask.keys - key);
  bool attended = false;
  for (int64_t i = 0; i < width; i += n) {
    const int64_t row_count = smaller<int64_t>(rows - i, n);
    if (row_count <= 0) {
      for (int64_t j = begin; j < end; ++j) store(out + j * width + i, Vec<Real>{});
      continue;
    }
    for (int64_t j = begin; j < end; j += at_once) {
      const int64_t count = smaller<int64_t>(end - j, at_once);
      const char* first = mask.at(row + i, key + j);
      Real* place = out + j * width + i;
      if (row_count == n && count == at_once) {
        load_square<Real, Stored>(first, mask.row_stride, at_once, width, place);
      } else {
        alignas(64) Stored square[n][at_once];  // lanes without a row repeat the first
        for (int64_t r = 0; r < n; ++r) {
          __builtin_memcpy(static_cast<void*>(square[r]), first + (r < row_count ? r : 0) * mask.row_stride,
                           count * sizeof(Stored));
        }
        load_square<Real, Stored>(reinterpret_cast<const char*>(square), sizeof square[0], count, width, place);
      }
      attended = attended || any_attended(place, count, width);
    }
  }
  return attended;
}

// Loads the values for rows [row, row + rows) and the keys [begin, end) of the block that starts at key; bias counts
// keys from the block's first. staging and out each hold width × the block's keys in whole vectors. False if they mask
// everything.
template <class Real>
TA_NOINLINE bool load_bias_per_lane(const MaskRows& mask, int64_t row, int64_t rows, int64_t width, int64_t key,
                                    int64_t begin, int64_t end, Real* staging, Real* out, BiasTile<Real>& bias) {
  if (mask.column_stride == 1) {
    if (mask.dtype == ScalarType::kBool) return load_attended(mask, row, rows, width, key, begin, end, out, bias);
    bias.per_lane = out;
    if constexpr (sizeof(Real) == 8) {
      if (mask.dtype == ScalarType::kFloat64)
        return load_added<Real, double>(mask, row, rows, width, key, begin, end, out);
    } else if (mask.dtype == ScalarType::kFloat32) {
      return load_added<Real, float>(mask, row, rows, width, key, begin, end, out);
    } else if (mask.dtype == ScalarType::kBFloat16) {
      return load_added<Real, BFloat16>(mask, row, rows, width, key, begin, end, out);
    } else if (mask.dtype == ScalarType::kFloat16) {
      return load_added<Real, Float16>(mask, row, rows, width, key, begin, end, out);
    }
  }
  bias.per_lane = out;
  const int64_t keys = smaller(end, mask.keys - key) - begin, stride = round_up(keys, kLanes<Real>);
  bool nothing_attended = true;
  for (int64_t i = 0; i < rows; ++i) {
    Real* values = staging + i * stride;
    load_row(values, mask.dtype, mask.at(row + i, key + begin), mask.column_stride, keys);
    nothing_attended = nothing_attended && all_masked(values, keys);
    for (int64_t j = keys; j < stride; ++j) values[j] = 0;
  }
  pack_panel(out + begin * width, width, staging, stride, rows, keys);
  return !nothing_attended;
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA

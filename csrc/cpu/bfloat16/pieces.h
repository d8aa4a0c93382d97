// Numbers as sums of bfloat16 numbers, their pieces: one for bfloat16, two for float16 (11 bits of 16), three for
// float32, which they make up exactly (24 bits of 24). A product of two numbers is then the sum of products of their
// pieces, and those too small to matter are left out: of three pieces six of nine remain, with an error of 2^-24, as by
// Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
// Computations". Included by layouts.h.
//
// Numbers below 2^-110 lose bits: tile products take denormal pieces as 0.
#pragma once

#include "../convert.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

template <class Stored>
constexpr int kPiecesOf = 1;
template <>
constexpr int kPiecesOf<Float16> = 2;
template <>
constexpr int kPiecesOf<float> = 3;

// Which products of a number's pieces make up a product: A's piece a times B's piece b where a + b < orders.
struct PieceProducts {
  int pieces, orders;

  struct Pair {
    int a, b;
  };
  constexpr int with(int b) const { return orders - b < pieces ? orders - b : pieces; }
  constexpr int count() const {
    int sum = 0;
    for (int b = 0; b < pieces; ++b) sum += with(b);
    return sum;
  }
  // In an order in which neighbours share an operand.
  constexpr Pair operator[](int number) const {
    int b = 0;
    while (number >= with(b)) number -= with(b), ++b;
    return {b % 2 == 0 ? with(b) - 1 - number : number, b};
  }
};
constexpr PieceProducts kOneProduct{1, 1};

// Products that are summed over keys or rows, of which one is a weight or a gradient of a score.
template <class Stored>
constexpr PieceProducts kSums{kPiecesOf<Stored>, kPiecesOf<Stored>};
// Products of stored numbers: logsumexp is float32 whatever they are, and has float32's precision with all four
// products of float16's pieces.
template <class Stored>
constexpr PieceProducts kDots{kPiecesOf<Stored>, larger(3, kPiecesOf<Stored>)};

// Takes the leading 8 bits off x, as a number.
TA_INLINE Vec<float> take_piece(Vec<float>& x) {
  const Vec<float> piece = (Vec<float>)((IntVec<float>)x & static_cast<int32_t>(0xFFFF0000));
  x -= piece;
  return piece;
}
// An infinity's other pieces would be NaN, and its products with pieces that are 0 are anyway: calls with infinite
// numbers are left to vectors. Which lanes are infinite:
TA_INLINE __mmask16 infinite_lanes(Vec<float> x) {
  constexpr int kPositive = 0x08, kNegative = 0x10;
  return _mm512_fpclass_ps_mask(x, kPositive | kNegative);
}

// Lane by lane: the upper half of low next to that of high.
TA_INLINE __m512i upper_halves(Vec<float> low, Vec<float> high) {
  constexpr uint32_t kOdd = 0xAAAAAAAA;
  return _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32((__m512i)low, 16), (__m512i)high);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA

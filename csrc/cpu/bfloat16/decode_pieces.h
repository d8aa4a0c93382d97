// The two products of ../decode.h for float16 on AMX's tiles, as sums of two bfloat16 pieces (pieces.h), whose time
// hardly depends on the number of rows up to 16. Included by kernels.h.
//
// A step is 64 keys by 32 columns, or 32 keys by 64 columns of values: four tiles. Its numbers are split beside the
// products of the step before. A tile cannot be loaded while stores to an address that agrees in its last 12 bits wait:
// so the tiles of a step are stored and loaded in such an order that they are never the same.
#pragma once

#include "../../core/online_softmax.h"
#include "../isa.h"
#include "../math.h"
#include "decode_tiles.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// A block's lines, asked for into the L2 cache one by one, beside what is split. Unlike LinesAhead it does not branch,
// and does not notice the block's end: with branches, which wait for the loads of tiles, 4 and 16 rows read at 0.75 and
// 0.82 of the speed.
class LineByLine {
 public:
  // Asks for `otherwise`, and what follows it, where the rows cross a page.
  TA_INLINE LineByLine(const TensorView& view, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t columns,
                       const void* otherwise)
      : line_(static_cast<const char*>(otherwise)) {
    if (rows <= 0 || !is_one_run(view, row, rows)) return;
    line_ = element(view, batch, head, row);
    bytes_ = columns * element_size(view.dtype);
    gap_ = view.stride[2] * element_size(view.dtype) - bytes_;
  }
  TA_INLINE void ask() {
    constexpr int kIntoL2 = 2;  // __builtin_prefetch's locality
    __builtin_prefetch(line_, 0, kIntoL2);
    offset_ += 64;
    const bool end = offset_ == bytes_;
    line_ += 64 + (end ? gap_ : 0);
    offset_ = end ? 0 : offset_;
  }

 private:
  const char* line_;
  int64_t bytes_ = 64, gap_ = 0, offset_ = 0;
};

// For up to kMostRows rows: 8, so that one tile holds both of their pieces, or 16 and more.
template <int kMostRows>
struct DecodePieces {
  using Real = float;
  // What a block costs beside its keys, some 1.5 µs, made 256 keys 1.08 times slower.
  static constexpr int64_t kKeys = 512;
  static constexpr int64_t kRowGranule = kTileSide;
  static constexpr int64_t kColumnGranule = 64;
  static constexpr int64_t kGroup = 64;  // keys, or columns of values, whose sums are in tiles at once
  static constexpr bool kAsksBesideSoftmax = false;
  static constexpr bool kWeighs = true;
  static constexpr bool kStacked = kMostRows <= kTileSide / 2;
  static constexpr int64_t kTile = kTileSide * kTileDepth;  // numbers of an operand's tile
  static constexpr int64_t kPiece = 4 * kTile, kStep = 2 * kPiece;

  // Rows are read in place, but for those at the end. Up to 4 query rows vectors are as fast where the cache lies in
  // L2, and few keys do not make up for what a call starts with (a product of 1024: 0.9 of the speed).
  static bool suits(const AttentionProblem& p) {
    const int64_t rows = p.query_length * p.group_size();
    const bool in_place = p.head_dim % kTileDepth == 0 && p.value_dim % kColumnGranule == 0 && p.head_dim > 0 &&
                          p.value_dim > 0 && p.key.pages == nullptr && p.value.pages == nullptr;
    if (!in_place || p.query_length > kTileSide) return false;
    if (is_isa_forced()) return true;
    if (rows < kFewestRows) return false;
    return rows > kRowsAsFast ? rows * p.key_length >= kFewestScores : comes_from_memory(p);
  }
  static constexpr int64_t kFewestRows = 4, kRowsAsFast = 4, kFewestScores = 2048;

  const AttentionProblem& p;
  int64_t batch, kv_head, rows, all_rows;
  TileSession session;
  uint16_t* query;      // B operands: [row / 16][step][piece][pair][row % 16][2], or kStacked [pair][piece][row][2]
  float* lanes;         // scores: [row / 16][key][row % 16], or kStacked the sums with both pieces of 8 rows
  float* sums;          // of values: [row][column]
  uint16_t* weights;    // A operands: [row / 16][step][piece][row % 16][32], or kStacked [piece][row][32]
  uint16_t* split[2];   // of a step: [piece][tile][16][32]
  uint16_t* padded;     // a block of keys or values that cannot be read in place
  bool weighs = false;  // this block's softmax is weigh's
  Vec<float> poison{};  // NaN once a sum was: a number is infinite

  DecodePieces(const AttentionProblem& problem, int64_t batch_index, int64_t head_index, int64_t row_count,
               Scratch& scratch)
      : p(problem),
        batch(batch_index),
        kv_head(head_index),
        rows(row_count),
        all_rows(round_up(rows, kTileSide)),
        query(scratch.take<uint16_t>(2 * all_rows * p.head_dim)),
        lanes(scratch.take<float>(all_rows * kKeys)),
        sums(scratch.take<float>(kTileSide * kGroup)),
        weights(scratch.take<uint16_t>(2 * all_rows * kKeys)),
        padded(scratch.take<uint16_t>(kKeys * larger(p.head_dim, p.value_dim))) {
    constexpr uintptr_t kPage = 4096;
    const auto place = reinterpret_cast<uintptr_t>(scratch.take<uint16_t>(2 * kStep + kPage / 2));
    split[0] = reinterpret_cast<uint16_t*>((place + kPage - 1) / kPage * kPage);
    split[1] = split[0] + kStep;
    fill<uint16_t>(weights, 0, 2 * all_rows * kKeys);
    fill<uint16_t>(query, 0, 2 * all_rows * p.head_dim);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = kv_head * (p.heads / p.kv_heads) + row / p.query_length;
      const auto* from = reinterpret_cast<const Float16*>(element(p.query, batch, head, row % p.query_length));
      uint16_t* tile = query + row / kTileSide * kTileSide * 2 * p.head_dim + row % kTileSide * 2;
      for (int64_t d = 0; d < p.head_dim; d += kTileDepth, tile += 2 * kTile) {
        alignas(64) uint16_t pairs[2][kTileDepth];
        store_pairs<Float16>(pairs[0], kTileDepth, load_as(from + d), load_as(from + d + kTileSide));
        for (int64_t i = 0; i < kTileSide; ++i) {
          __builtin_memcpy(tile + i * kTileDepth, pairs[0] + 2 * i, 4);
          __builtin_memcpy(tile + i * kTileDepth + (kStacked ? kTileSide : kTile), pairs[1] + 2 * i, 4);
        }
      }
    }
  }

  bool has_infinite() const { return sum_of_lanes<float>(poison) != 0; }

  // Splits a step's numbers, one line of the operand after the other, and asks for as many lines. Pairs are a key's
  // columns 16 apart, or a column's keys.
  template <bool kValues>
  struct Splitter {
    const Float16* from;
    int64_t stride;
    uint16_t* to;
    LineByLine& ahead;
    static constexpr int kLines = 64;

    // Twice as many beside each of the last four of twelve: so they are as far from the tiles that are loaded.
    static constexpr int lines_before(int slot, int slots) {
      return slots == 12 ? (slot < 8 ? slot * 4 : slot * 8 - kLines / 2) : slot * kLines / slots;
    }
    template <int kSlot, int kSlots>
    TA_INLINE void slot() const {
      split_lines<lines_before(kSlot, kSlots), lines_before(kSlot + 1, kSlots)>();
      asm volatile("" ::: "memory");
    }
    template <int kFirst, int kLast>
    TA_INLINE void split_lines() const {
      if constexpr (kFirst < kLast) {
        ahead.ask();
        const Float16* place = from + (kValues ? kFirst % 16 * stride + kFirst / 16 * 16 : kFirst * stride);
        store_pairs<Float16>(to + kFirst * kTileDepth, kPiece, load_as(place),
                             load_as(place + (kValues ? 16 * stride : 16)));
        split_lines<kFirst + 1, kLast>();
      }
    }
  };

  // A block cut into steps: `inner` of them inner_apart, and the next as many outer_apart. Columns of keys lie within
  // groups of keys, keys of values within groups of columns.
  struct Steps {
    const Float16* row;
    int64_t stride, inner, inner_apart, outer_apart;
    int64_t at = 0;

    TA_INLINE const Float16* next() {
      if (++at == inner) at = 0, row += outer_apart;
      return row + at * inner_apart;
    }
  };

  template <bool kValues>
  TA_NOINLINE void split_first(const Steps& steps, LineByLine& ahead) const {
    LineByLine asked = ahead;  // in registers
    Splitter<kValues>{steps.row, steps.stride, split[0], asked}.template split_lines<0, Splitter<kValues>::kLines>();
    ahead = asked;
  }

  // Sums += a step's keys (A) times query (B), or weights (A) times a step's values (B).
  template <bool kValues, class Beside>
  static TA_INLINE void multiply_step(const uint16_t* of_rows, const uint16_t* step, const Beside& beside) {
    constexpr bool kLastPairs = !kValues;  // of weights and values, those of both second pieces are left out
    constexpr int kSlots = kStacked ? 8 : kLastPairs ? 16 : 12, kTwo = kStacked ? 2 : 4;
    _tile_loadd(4, of_rows, 64);
    if constexpr (!kStacked) _tile_loadd(5, of_rows + kTile, 64);
#define TORCH_ATTN_MULTIPLY(SUM, STEP, ROWS, SLOT) \
  if constexpr (kValues) {                         \
    _tile_dpbf16ps(SUM, ROWS, STEP);               \
  } else {                                         \
    _tile_dpbf16ps(SUM, STEP, ROWS);               \
  }                                                \
  beside.template slot<SLOT, kSlots>()
#define TORCH_ATTN_TWO_TILES(FIRST, SECOND, PIECE, SLOT)      \
  _tile_loadd(6, step + PIECE * kPiece + FIRST * kTile, 64);  \
  TORCH_ATTN_MULTIPLY(FIRST, 6, 4, SLOT);                     \
  _tile_loadd(7, step + PIECE * kPiece + SECOND * kTile, 64); \
  TORCH_ATTN_MULTIPLY(SECOND, 7, 4, SLOT + 1);                \
  if constexpr (!kStacked && (PIECE == 0 || kLastPairs)) {    \
    TORCH_ATTN_MULTIPLY(FIRST, 6, 5, SLOT + 2);               \
    TORCH_ATTN_MULTIPLY(SECOND, 7, 5, SLOT + 3);              \
  }
    TORCH_ATTN_TWO_TILES(0, 1, 0, 0)
    TORCH_ATTN_TWO_TILES(2, 3, 0, kTwo)
    TORCH_ATTN_TWO_TILES(2, 3, 1, 2 * kTwo)
    TORCH_ATTN_TWO_TILES(0, 1, 1, kSlots - (kLastPairs ? kTwo : 2))
#undef TORCH_ATTN_TWO_TILES
#undef TORCH_ATTN_MULTIPLY
  }

  // `outer` times: clears the sums, multiplies the inner steps of numbers with those of the rows, and calls
  // stored(number) for the sums.
  template <bool kValues, class Stored>
  TA_INLINE void multiply(const uint16_t* of_rows, Steps steps, int64_t outer, LineByLine& lines,
                          const Stored& stored) {
    split_first<kValues>(steps, lines);
    LineByLine ahead = lines;  // in registers
    int now = 0;
    for (int64_t i = 0; i < outer; ++i) {
      asm volatile("" ::: "memory");  // GCC's tile intrinsics do not tell that they read and write memory
      DecodeTiles::zero_sums();
      for (int64_t step = 0; step < steps.inner; ++step, now ^= 1) {
        const uint16_t* rows_tile = of_rows + step * 2 * kTile;
        if (i + 1 == outer && step + 1 == steps.inner) {
          multiply_step<kValues>(rows_tile, split[now], NothingBeside());
        } else {
          const Float16* next = steps.next();
          multiply_step<kValues>(rows_tile, split[now], Splitter<kValues>{next, steps.stride, split[now ^ 1], ahead});
        }
      }
      stored(i);
    }
    lines = ahead;
  }

  // whole: the block's keys are attended by all rows, and nothing but the scale changes their scores.
  void dots(int64_t key, int64_t keys, float* scores, bool whole) {
    const int64_t all_keys = round_up(keys, kGroup);
    const HalfRows in = half_rows(p.key, batch, kv_head, key, keys, p.head_dim, all_keys, p.head_dim, padded);
    const Steps steps{reinterpret_cast<const Float16*>(in.data), in.stride, p.head_dim / kTileDepth, kTileDepth,
                      kGroup * in.stride};
    LineByLine ahead(p.value, batch, kv_head, key, keys, p.value_dim, in.data);
    for (int64_t row = 0; row < all_rows; row += kTileSide) {
      multiply<false>(query + row * 2 * p.head_dim, steps, all_keys / kGroup, ahead, [&](int64_t i) TA_INLINE_LAMBDA {
        DecodeTiles::store_sums(lanes + row * kKeys + i * kGroup * kTileSide, kTileSide, kTileSide * kTileSide);
      });
    }
    asm volatile("" ::: "memory");
    weighs = whole && keys == all_keys;
    if (!weighs) score_rows(all_keys, scores);
  }

  // scores[row][key] of lanes[row / 16][key][row % 16].
  TA_NOINLINE void score_rows(int64_t all_keys, float* scores) {
    for (int64_t row = 0; row < all_rows; row += kTileSide) {
      for (int64_t j = 0; j < all_keys; j += kTileSide) {
        Vec<float> square[16];
        load_transposed_words(square, reinterpret_cast<const char*>(lanes + row * kKeys + j * kTileSide),
                              kTileSide * 4);
        constexpr int kOut = kStacked ? kTileSide / 2 : kTileSide;
#pragma GCC unroll 16
        for (int r = 0; r < kOut; ++r) {
          const Vec<float> sum = kStacked ? square[r] + square[(r + 8) % 16] : square[r];
          store(scores + (row + r) * kKeys + j, sum);
          poison += sum * 0.0f;
        }
      }
    }
  }

  // What Decode::add_keys does, for all rows at once, whose lanes are: weights, ready for combine, and how much what is
  // there is multiplied by.
  TA_NOINLINE void weigh(int64_t keys, float* rescale, float* states, int64_t state_size) {
    using Softmax = OnlineSoftmax<VectorMath<float>>;
    constexpr int n = kLanes<float>;
    const float factor = static_cast<float>(p.scale);
    for (int64_t row = 0; row < all_rows; row += kTileSide) {
      float* scores = lanes + row * kKeys;
      const int64_t count = smaller(rows - row, kTileSide);
      Vec<float> highest[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) highest[i] = VectorMath<float>::negative_infinity();
      for (int64_t j = 0; j < keys; j += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          Vec<float> score = load(scores + (j + i) * n);
          if constexpr (kStacked) {
            score += (Vec<float>)_mm512_shuffle_f32x4((__m512)score, (__m512)score, 0x4E);
            store(scores + (j + i) * n, score);
          }
          highest[i] = max(highest[i], score);
        }
      }
      alignas(64) float old[n] = {};
      for (int64_t r = 0; r < count; ++r) old[r] = states[(row + r) * state_size];
      Vec<float> old_maximum = load(old);
      if constexpr (kStacked)
        old_maximum = (Vec<float>)_mm512_shuffle_f32x4((__m512)old_maximum, (__m512)old_maximum, 0x44);
      const Vec<float> maximum =
          max(old_maximum, max(max(highest[0], highest[1]), max(highest[2], highest[3])) * factor);
      const Vec<float> subtracted = Softmax::safe_maximum(maximum), scaled = Softmax::rescale(old_maximum, maximum);
      Vec<float> sum[2] = {};
      for (int64_t j = 0; j < keys; j += kTileDepth) {
        alignas(64) uint16_t first[kTile], second[kTile];  // [pair][row]
#pragma GCC unroll 2
        for (int k = 0; k < kTileSide; ++k) {
          Vec<float> low = VectorMath<float>::exp(load(scores + (j + k) * n) * factor - subtracted);
          Vec<float> high = VectorMath<float>::exp(load(scores + (j + k + kTileSide) * n) * factor - subtracted);
          sum[0] += low, sum[1] += high;
          const __m512i upper = upper_halves(low, high);
          take_piece(low), take_piece(high);
          const __m512i lower = upper_halves(low, high);
          if constexpr (kStacked) {
            _mm512_store_si512(first + k * kTileDepth, _mm512_mask_blend_epi32(0xFF00, upper, lower));
          } else {
            _mm512_store_si512(first + k * kTileDepth, upper);
            _mm512_store_si512(second + k * kTileDepth, lower);
          }
        }
        uint16_t* tile = weights + row * 2 * kKeys + j * 2 * kTileSide;
        Vec<float> square[16];
        load_transposed_words(square, reinterpret_cast<const char*>(first), 64);
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) store(reinterpret_cast<float*>(tile) + r * n, square[r]);
        if constexpr (!kStacked) {
          load_transposed_words(square, reinterpret_cast<const char*>(second), 64);
#pragma GCC unroll 16
          for (int r = 0; r < 16; ++r) store(reinterpret_cast<float*>(tile + kTile) + r * n, square[r]);
        }
      }
      alignas(64) float sums_of_rows[n], maxima[n], rescales[n];
      store(sums_of_rows, sum[0] + sum[1]);
      store(maxima, maximum);
      store(rescales, scaled);
      poison += (sum[0] + sum[1]) * 0.0f;
      for (int64_t r = 0; r < count; ++r) {
        float* state = states + (row + r) * state_size;
        store(state, splat(maxima[r]));
        const Vec<float> before = load(state + n) * rescales[r];
        store(state + n,
              (Vec<float>)_mm512_mask_add_ps((__m512)before, 1, (__m512)before, _mm512_set1_ps(sums_of_rows[r])));
        rescale[row + r] = rescales[r];
      }
    }
  }

  void combine(int64_t key, int64_t keys, const float* float_weights, const float* rescale, float* out,
               int64_t out_stride) {
    const int64_t all_keys = round_up(keys, kTileDepth);
    const HalfRows in = half_rows(p.value, batch, kv_head, key, keys, p.value_dim, all_keys, p.value_dim, padded);
    const Steps steps{reinterpret_cast<const Float16*>(in.data), in.stride, all_keys / kTileDepth,
                      kTileDepth * in.stride, kGroup};
    LineByLine ahead(p.key, batch, kv_head, key + keys, smaller(kKeys, p.key_length - key - keys), p.head_dim, in.data);
    if (!weighs) split_weights(keys, float_weights);
    for (int64_t row = 0; row < all_rows; row += kTileSide) {
      const int64_t count = smaller(rows - row, kTileSide);
      multiply<true>(weights + row * 2 * kKeys, steps, p.value_dim / kGroup, ahead, [&](int64_t i) TA_INLINE_LAMBDA {
        DecodeTiles::store_sums(sums, kGroup, kTileSide);
        asm volatile("" ::: "memory");
        for (int64_t r = 0; r < count; ++r)
          add_sums(sums + r * kGroup, rescale[row + r], out + (row + r) * out_stride + i * kGroup);
      });
    }
  }

 private:
  void split_weights(int64_t keys, const float* from) {
    for (int64_t row = 0; row < rows; ++row) {
      uint16_t* tile = weights + row / kTileSide * kTileSide * 2 * kKeys + row % kTileSide * kTileDepth;
      for (int64_t j = 0; j < keys; j += kTileDepth, tile += 2 * kTile) {
        const float* place = from + row * kKeys + j;
        store_pairs<Float16>(tile, kStacked ? kTile / 2 : kTile, load(place),
                             j + kLanes<float> < keys ? load(place + kLanes<float>) : Vec<float>{});
      }
    }
  }

  TA_INLINE void add_sums(const float* row_sums, float rescale, float* out) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < kGroup; c += kLanes<float>) {
      Vec<float> sum = load(row_sums + c);
      if constexpr (kStacked) sum += load(row_sums + kTileSide / 2 * kGroup + c);
      poison += sum * 0.0f;
      store(out + c, load(out + c) * rescale + sum);
    }
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA

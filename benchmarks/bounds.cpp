// The parts of attention on AMX, each alone, by the kernels' own code: the tile products with their operands where
// attention has them, and what vectors do to a panel's scores. Compiled by benchmarks/bounds.py. Every function does
// its part for `rounds` times kRows query rows and kKeys keys of one head.
#define TORCH_ATTN_ISA amx
#include <bit>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>

#include "../csrc/cpu/bfloat16/half_tiles.h"
#include "../csrc/cpu/bfloat16/softmax_pairs.h"

using namespace torch_attn::cpu;
using namespace torch_attn::cpu::amx;

namespace {

constexpr int64_t kRows = 512, kKeys = 2048, kBlock = 64, kPanels = kRows / kAmxLanes, kGroup = 8;

// Arrays one behind the other, as the kernels' scratch memory has them. Their numbers are between ½ and 2 of both
// signs: with zeros the clock would fall less.
class Memory {
 public:
  Memory() : data_(static_cast<char*>(std::aligned_alloc(kPage, kSize))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  template <class T>
  T* take(int64_t count) {
    T* begin = reinterpret_cast<T*>(data_.get() + used_);
    used_ += round_up(count * int64_t{sizeof(T)}, 64);
    if (used_ > kSize) throw std::bad_alloc();
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (sizeof(T) == 2) {
        begin[i] = random_half();
      } else {
        begin[i] = std::bit_cast<float>(uint32_t{random_half()} << 16);
      }
    }
    return begin;
  }

 private:
  uint16_t random_half() {
    state_ = state_ * 1664525 + 1013904223;
    return static_cast<uint16_t>(0x3F00 | (state_ >> 24) | (state_ >> 8 & 0x8000));
  }

  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  static constexpr int64_t kPage = int64_t{1} << 21, kSize = 32 * kPage;
  std::unique_ptr<char, Free> data_;
  int64_t used_ = 0;
  uint32_t state_ = 1;
};

// The operands of a block of rows and all keys of a head.
template <class Stored>
struct Operands {
  static constexpr int64_t kPieces = kPiecesOf<Stored>;
  Memory memory;
  int64_t dim;
  uint16_t *keys, *values, *transposed;    // of a block of keys: by rows, by columns
  uint16_t *query, *grad_out;              // panels
  uint16_t *query_pairs, *grad_pairs;      // rows in pairs
  float *out, *key_sums, *value_sums;      // sums of products
  float *scores, *gradients, *row_values;  // a panel's
  uint16_t* weight_pairs;
  HalfTiles half;
  mutable WaitingSums waiting;

  explicit Operands(int64_t head_dim) : dim(head_dim) {
    for (uint16_t** x : {&keys, &values, &transposed}) *x = memory.take<uint16_t>(kPieces * kBlock * dim);
    for (uint16_t** x : {&query, &grad_out, &query_pairs, &grad_pairs})
      *x = memory.take<uint16_t>(kPieces * kRows * dim);
    out = memory.take<float>(kRows * dim);
    key_sums = memory.take<float>(kKeys * dim), value_sums = memory.take<float>(kKeys * dim);
    for (float** x : {&scores, &gradients}) *x = memory.take<float>(kBlock * kAmxLanes);
    row_values = memory.take<float>(kAmxLanes);
    weight_pairs = memory.take<uint16_t>(kPieces * kAmxKeys * kAmxLanes);
    half.piece_stride = kGroup * kBlock * kAmxLanes;
    half.weights = memory.take<uint16_t>(kPieces * half.piece_stride);
    half.gradients = memory.take<uint16_t>(kPieces * half.piece_stride);
    half.pairs = memory.take<uint16_t>(kPieces * HalfTiles::kPairsPieceStride);
  }

  // Each block of keys is brought to the same place.
  TileOperand key_rows(const uint16_t* block) const {
    return {block, kTileDepth * 2, kBlock * kTileDepth * 2, kBlock * dim * 2};
  }
  TileOperand key_columns(const uint16_t* block) const {
    return {block, kTileDepth * 2, dim * kTileDepth * 2, kBlock * dim * 2};
  }
  TileOperand panel(const uint16_t* all, int64_t index) const {
    return {all + index * kAmxLanes * dim, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4, kRows * dim * 2};
  }
  static TileOperand pairs_of_keys(const uint16_t* pairs) {
    return {pairs, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4, kAmxKeys * kAmxLanes * 2};
  }
  void dots(const TileOperand& rows, const TileOperand& panel, float* to) const {
    tile_product<false, kDots<Stored>>(kBlock / kTileSide, kAmxVectors, dim / kTileDepth, rows, panel, to, kAmxLanes,
                                       waiting);
  }
  void sums_over_keys(const uint16_t* block, const uint16_t* pairs, int64_t index) const {
    tile_product<true, kSums<Stored>>(dim / kTileSide, kAmxVectors, kBlock / kTileDepth, key_columns(block),
                                      pairs_of_keys(pairs), out + index * kAmxLanes * dim, kAmxLanes, waiting);
  }
  void sums_over_rows(const uint16_t* tiles, const uint16_t* row_pairs, int64_t first, float* sums) const {
    for (int64_t key = 0; key < kBlock; key += kTileDepth) {
      tile_product<true, kSums<Stored>>(
          kTileDepth / kTileSide, dim / kTileSide, kGroup,
          {tiles + key * kAmxLanes, kAmxLanes * 2, kBlock * kAmxLanes * 2, half.piece_stride * 2},
          {row_pairs + first * kAmxLanes * dim, dim * 4, kTileDepth / 2 * dim * 4, kRows * dim * 2}, sums + key * dim,
          dim, waiting);
    }
  }
};

// Forward's two products.
template <class Stored>
void forward_products(int64_t dim, int64_t rounds) {
  const TileSession session;
  const Operands<Stored> x(dim);
  for (int64_t i = 0; i < rounds * kKeys / kBlock; ++i) {
    for (int64_t panel = 0; panel < kPanels; ++panel) {
      x.dots(x.key_rows(x.keys), x.panel(x.query, panel), x.scores);
      x.sums_over_keys(x.values, x.weight_pairs, panel);
    }
  }
}

// Backward's five.
template <class Stored>
void backward_products(int64_t dim, int64_t rounds) {
  const TileSession session;
  const Operands<Stored> x(dim);
  for (int64_t i = 0; i < rounds * kKeys / kBlock; ++i) {
    const int64_t block = i % (kKeys / kBlock);
    for (int64_t first = 0; first < kPanels; first += kGroup) {
      for (int64_t panel = first; panel < first + kGroup; ++panel) {
        x.dots(x.key_rows(x.keys), x.panel(x.query, panel), x.scores);
        x.dots(x.key_rows(x.values), x.panel(x.grad_out, panel), x.gradients);
        x.sums_over_keys(x.transposed, x.half.pairs, panel);
      }
      x.sums_over_rows(x.half.weights, x.grad_pairs, first, x.value_sums + block * kBlock * dim);
      x.sums_over_rows(x.half.gradients, x.query_pairs, first, x.key_sums + block * kBlock * dim);
    }
  }
}

// Forward's maximum, exponentials, and their splitting or rounding.
template <class Stored>
void forward_vectors(int64_t dim, int64_t rounds) {
  const Operands<Stored> x(dim);
  alignas(64) float sum[kAmxLanes] = {}, maximum[kAmxLanes] = {}, rescale[kAmxLanes] = {};
  for (int64_t i = 0; i < rounds * (kKeys / kBlock) * kPanels; ++i) {
    asm volatile("" ::: "memory");
    raise_maximum(0, kBlock, 0.125f, x.scores, maximum);
    SoftmaxPairs<Stored, false>(0, kBlock, 0.125f, x.scores, nullptr, maximum, x.weight_pairs).finish(rescale, sum);
  }
}

// Backward's exponentials, gradients of scores, and their splitting or rounding.
template <class Stored>
void backward_vectors(int64_t dim, int64_t rounds) {
  const Operands<Stored> x(dim);
  const KeySpan span{0, kBlock};
  for (int64_t i = 0; i < rounds * (kKeys / kBlock) * kPanels; ++i) {
    asm volatile("" ::: "memory");
    PlainHalfTiles<Stored, false, 0>(span, 0.125f, x.scores, x.gradients, x.row_values, x.row_values, 0.125f, {},
                                     x.half)
        .finish();
  }
}

template <class Stored>
void run_part(int part, int64_t dim, int64_t rounds) {
  constexpr void (*kParts[])(int64_t, int64_t) = {forward_products<Stored>, backward_products<Stored>,
                                                  forward_vectors<Stored>, backward_vectors<Stored>};
  kParts[part](dim, rounds);
}

}  // namespace

// pieces: one for bfloat16, two for float16, three for float32.
extern "C" void attention_part(int pieces, int part, int64_t dim, int64_t rounds) {
  (pieces == 1 ? run_part<BFloat16> : pieces == 2 ? run_part<Float16> : run_part<float>)(part, dim, rounds);
}
extern "C" int64_t scores_a_round() { return kRows * kKeys; }

namespace {

using Clock = std::chrono::steady_clock;
double nanoseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

// What takes 3 · kMultiplications cycles whatever else the core has to do: each waits for the one before.
constexpr int64_t kMultiplications = 1000;
void multiply_in_turn() {
  uint64_t x = 1;
  for (int64_t i = 0; i < kMultiplications; ++i) asm volatile("imul %0, %0" : "+r"(x));
}

template <bool kTiles, int kVectors>
void multiply_beside_vectors(int64_t rounds, double* nanoseconds, double* gigahertz) {
  const TileSession session;
  Memory memory;
  const uint16_t* numbers = memory.take<uint16_t>(4 * kTileSide * kTileDepth);
  clear_sums<0>(), clear_sums<1>(), clear_sums<2>(), clear_sums<3>();
  Vec<float> x[8];
#pragma GCC unroll 8
  for (auto& each : x) each = splat(0.5f);
  const auto vectors = [&]() TA_INLINE_LAMBDA {
#pragma GCC unroll 64
    for (int i = 0; i < kVectors; ++i) {
      x[i % 8] = x[i % 8] * 0.5f + 0.25f;
      asm volatile("" : "+v"(x[i % 8]));
    }
  };
  constexpr int64_t kBetween = 1000;
  double busy = 0, in_turn = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    auto start = Clock::now();
    for (int64_t i = 0; i < kBetween; ++i) {
      if constexpr (kTiles) {
        _tile_loadd(4, numbers, 64);
        _tile_loadd(6, numbers + 512, 64);
        _tile_dpbf16ps(0, 4, 6);
      }
      vectors();
      if constexpr (kTiles) {
        _tile_loadd(7, numbers + 1024, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      vectors();
      if constexpr (kTiles) {
        _tile_loadd(5, numbers + 1536, 64);
        _tile_dpbf16ps(2, 5, 6);
      }
      vectors();
      if constexpr (kTiles) _tile_dpbf16ps(3, 5, 7);
      vectors();
    }
    busy += nanoseconds_since(start);
    start = Clock::now();
    multiply_in_turn();
    in_turn += nanoseconds_since(start);
  }
  *nanoseconds = busy / static_cast<double>(4 * kBetween * rounds);
  *gigahertz = static_cast<double>(3 * kMultiplications * rounds) / in_turn;
}

}  // namespace

// How long a multiplication of tiles, its operands in the L1 cache, takes with so many multiply-adds of vectors beside
// it (0, 8, 16, 24 or 32), and the core's clock meanwhile. With -32: 32 multiply-adds without tiles.
extern "C" void multiply_beside(int vectors, int64_t rounds, double* nanoseconds, double* gigahertz) {
  constexpr void (*kLoops[])(int64_t, double*, double*) = {
      multiply_beside_vectors<true, 0>, multiply_beside_vectors<true, 8>, multiply_beside_vectors<true, 16>,
      multiply_beside_vectors<true, 24>, multiply_beside_vectors<true, 32>};
  (vectors < 0 ? multiply_beside_vectors<false, 32> : kLoops[vectors / 8])(rounds, nanoseconds, gigahertz);
}

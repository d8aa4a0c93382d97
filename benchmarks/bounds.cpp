// The parts of attention on AMX, each alone, by the kernels' own code: the tile products with their operands where
// attention has them, and what vectors do to a panel's scores. Compiled by benchmarks/bounds.py. Every function does
// its part for `rounds` times kRows query rows and kKeys keys of one head.
#define TORCH_ATTN_ISA amx
#include <cstdlib>
#include <memory>
#include <new>

#include "../csrc/cpu/bfloat16/half_tiles.h"
#include "../csrc/cpu/bfloat16/softmax_pairs.h"

using namespace torch_attn::cpu;
using namespace torch_attn::cpu::amx;

namespace {

constexpr int64_t kRows = 512, kKeys = 2048, kBlock = 64, kPanels = kRows / kAmxLanes, kGroup = 8;

// Arrays of ones, one behind the other, as the kernels' scratch memory has them.
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
    for (int64_t i = 0; i < count; ++i) begin[i] = sizeof(T) == 2 ? static_cast<T>(0x3F80) : static_cast<T>(1);
    return begin;
  }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  static constexpr int64_t kPage = int64_t{1} << 21, kSize = 32 * kPage;
  std::unique_ptr<char, Free> data_;
  int64_t used_ = 0;
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

// Multiplications of tiles that wait for nothing: `rounds` times four.
extern "C" void multiply_in_registers(int64_t rounds) {
  const TileSession session;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 6);
  }
}

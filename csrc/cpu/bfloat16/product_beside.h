// Products of tiles with something beside them: rows asked for ahead, or a mask's or dropout's part in a tile. Included
// by forward.h and walk.h.
#pragma once

#include "tiles.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Asks for rows between the stages of a tile and beside its products: in larger portions rows would wait for each
// other, and the products after them. Products of numbers in pieces take so long that they ask once; beside each,
// float32 would be 3 % slower.
template <class Stored>
class AskBeside {
 public:
  static constexpr bool kMayOverwrite = true;

  TA_INLINE AskBeside(RowsAhead& ahead) : ahead_(ahead) {}

  template <bool kAccumulate, PieceProducts kProducts>
  TA_NOINLINE void multiply(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b, float* c,
                            int64_t c_stride, WaitingSums& waiting) const {
    if (portions(m_tiles, n_tiles, steps) > 1) {
      tile_product_beside<kAccumulate, kProducts>(m_tiles, n_tiles, steps, a, b, c, c_stride, waiting, *this);
    } else {
      ask();
      tile_product<kAccumulate, kProducts>(m_tiles, n_tiles, steps, a, b, c, c_stride, waiting);
    }
  }
  // How many portions a product asks for.
  static TA_INLINE int64_t portions(int64_t m_tiles, int64_t n_tiles, int64_t steps) {
    const bool beside = kCallsBeside && kPiecesOf<Stored> == 1 && m_tiles % 2 == 0 && n_tiles % 2 == 0;
    return beside ? m_tiles / 2 * (n_tiles / 2) * steps : 1;
  }

  template <int kSlot, int kSlots>
  TA_INLINE void slot() const {
    if constexpr (kSlot == kSlots - 1) ask();
  }
  TA_NOINLINE void ask() const { ahead_.ask_for_portion(); }

 private:
  RowsAhead& ahead_;
};

// A product with something else beside it, as far as there is a place for it.
template <class Parts>
struct ProductBeside {
  Parts& parts;
  static constexpr bool kMayOverwrite = false;  // another copy of the parts' code would gain little

  template <bool kAccumulate, PieceProducts kProducts>
  TA_INLINE void multiply(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b, float* c,
                          int64_t c_stride, WaitingSums& waiting) const {
    if (m_tiles % 2 == 0 && n_tiles % 2 == 0) {
      tile_product_beside<kAccumulate, kProducts>(m_tiles, n_tiles, steps, a, b, c, c_stride, waiting, parts);
    } else {
      tile_product<kAccumulate, kProducts>(m_tiles, n_tiles, steps, a, b, c, c_stride, waiting);
    }
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA

// The keys of each row's highest scores, kept while keys stream by in ascending order. Included by map_statistics.h.
#pragma once

#include "scratch.h"
#include "vec.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// For each lane a list in descending order; among equal scores the lower key comes first. Places that no key has taken
// hold −∞ and −1.
template <class Real>
struct TopKeys {
  int64_t count = 0;
  Real* scores = nullptr;   // [lane][count]
  int64_t* keys = nullptr;  // the same
  Real* lowest = nullptr;   // [lane]: the last score of the list, which a newcomer must exceed

  TopKeys(int64_t top, int64_t lanes, Scratch& scratch)
      : count(top),
        scores(scratch.take<Real>(top * lanes)),
        keys(scratch.take<int64_t>(top * lanes)),
        lowest(scratch.take<Real>(lanes)) {
    const Real nothing = -static_cast<Real>(__builtin_inf());
    for (int64_t i = 0; i < top * lanes; ++i) scores[i] = nothing, keys[i] = -1;
    for (int64_t i = 0; i < lanes; ++i) lowest[i] = nothing;
  }

  // A tile of scores [key][lane] for the panel at lane offset; key is the number of the tile's key 0.
  template <int kVectors>
  TA_NOINLINE void add(int64_t offset, int64_t key, int64_t begin, int64_t end, const Real* tile) const {
    constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
    for (int n = 0; n < kVectors; ++n) {
      Real* bound = lowest + offset + n * n_lanes;
      for (int64_t j = begin; j < end; ++j) {
        const Real* newcomers = tile + j * width + n * n_lanes;
        for (unsigned bits = lane_bits(load(newcomers) > load(bound)); bits != 0; bits &= bits - 1) {
          const int i = __builtin_ctz(bits);
          insert(offset + n * n_lanes + i, newcomers[i], key + j);
        }
      }
    }
  }

 private:
  void insert(int64_t lane, Real score, int64_t key) const {
    Real* list = scores + lane * count;
    int64_t* numbers = keys + lane * count;
    int64_t place = count - 1;
    for (; place > 0 && list[place - 1] < score; --place) {
      list[place] = list[place - 1];
      numbers[place] = numbers[place - 1];
    }
    list[place] = score;
    numbers[place] = key;
    lowest[lane] = list[count - 1];
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA

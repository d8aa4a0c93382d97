// "Is (row, key) attended?" and "which keys does this block of rows need?", for causal masks, sliding windows and key
// lengths. All three leave each row one interval of keys, whose ends never move left as the row grows; tiling, block
// skipping and the element test follow from that. Used by every kernel, the composite path's mask and the tests.
#pragma once

#include "macros.h"
#include "problem.h"

namespace torch_attn {

// Keys [begin, end); empty when end <= begin.
struct KeyRange {
  int64_t begin = 0;
  int64_t end = 0;

  TA_HOST_DEVICE bool empty() const { return end <= begin; }
  TA_HOST_DEVICE bool contains(int64_t key) const { return begin <= key && key < end; }
};

struct BandMask {
  int64_t key_length;    // valid keys of this batch entry
  int64_t offset;        // row i sits at key position i + offset
  int64_t window_left;   // keys left of that position that are attended
  int64_t window_right;  // and right of it

  TA_HOST_DEVICE int64_t position(int64_t row) const { return row + offset; }

  TA_HOST_DEVICE KeyRange keys_of_row(int64_t row) const {
    const int64_t first = position(row) - window_left;
    const int64_t last = position(row) + window_right;
    return {first < 0 ? 0 : first, last + 1 < key_length ? last + 1 : key_length};
  }
  TA_HOST_DEVICE bool attends(int64_t row, int64_t key) const { return keys_of_row(row).contains(key); }

  // Keys that some row of [row_begin, row_end) may attend: all others can be skipped.
  TA_HOST_DEVICE KeyRange keys_of_any(int64_t row_begin, int64_t row_end) const {
    return {keys_of_row(row_begin).begin, keys_of_row(row_end - 1).end};
  }
  // Keys that every row of [row_begin, row_end) attends: no element test is needed there.
  TA_HOST_DEVICE KeyRange keys_of_all(int64_t row_begin, int64_t row_end) const {
    return {keys_of_row(row_end - 1).begin, keys_of_row(row_begin).end};
  }
};

TA_HOST_DEVICE BandMask band_mask(const AttentionProblem& p, int64_t batch) {
  const int64_t length = p.key_lengths ? p.key_lengths[batch] : p.key_length;
  const int64_t offset = p.alignment == Alignment::kBottomRight ? length - p.query_length : 0;
  return {length, offset, p.window_left, p.window_right};
}

}  // namespace torch_attn

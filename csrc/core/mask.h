// "Is (row, key) attended?" and "which keys does this block of rows need?", for causal masks, sliding windows and key
// lengths. All three leave each row one interval of keys, whose ends never move left as the row's position grows;
// tiling, block skipping and the element test follow from that. Used by every kernel, the composite path's mask and the
// tests.
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
  // Where the rows are a selection of a longer query's, in any order: row i is that query's row rows[i]. Else null.
  const int64_t* rows = nullptr;
  int64_t row_count = 0;  // of rows; what lies beyond, in a padded block, has the last one's position

  TA_HOST_DEVICE int64_t position(int64_t row) const {
    return (rows == nullptr ? row : rows[row < row_count ? row : row_count - 1]) + offset;
  }

  TA_HOST_DEVICE KeyRange keys_at(int64_t position) const {
    const int64_t first = position - window_left;
    const int64_t last = position + window_right;
    return {first < 0 ? 0 : first, last + 1 < key_length ? last + 1 : key_length};
  }
  TA_HOST_DEVICE KeyRange keys_of_row(int64_t row) const { return keys_at(position(row)); }
  TA_HOST_DEVICE bool attends(int64_t row, int64_t key) const { return keys_of_row(row).contains(key); }

  // Keys that some row of [row_begin, row_end) may attend: all others can be skipped.
  TA_HOST_DEVICE KeyRange keys_of_any(int64_t row_begin, int64_t row_end) const {
    const KeyRange positions = extreme_positions(row_begin, row_end);
    return {keys_at(positions.begin).begin, keys_at(positions.end).end};
  }
  // Keys that every row of [row_begin, row_end) attends: no element test is needed there.
  TA_HOST_DEVICE KeyRange keys_of_all(int64_t row_begin, int64_t row_end) const {
    const KeyRange positions = extreme_positions(row_begin, row_end);
    return {keys_at(positions.end).begin, keys_at(positions.begin).end};
  }

 private:
  // The lowest and the highest position, both included.
  TA_HOST_DEVICE KeyRange extreme_positions(int64_t row_begin, int64_t row_end) const {
    KeyRange found = {position(row_begin), position(row_end - 1)};
    for (int64_t row = row_begin; rows != nullptr && row < row_end; ++row) {
      const int64_t here = position(row);
      if (here < found.begin) found.begin = here;
      if (here > found.end) found.end = here;
    }
    return found;
  }
};

TA_HOST_DEVICE BandMask band_mask(const AttentionProblem& p, int64_t batch) {
  const int64_t length = p.key_lengths ? p.key_lengths[batch] : p.keys_of(batch);
  const int64_t offset = p.alignment == Alignment::kBottomRight ? length - p.queries_of(batch) : 0;
  return {length, offset, p.window_left, p.window_right};
}

// The same for kernels that also serve a selection of a query's rows (AttentionProblem::query_rows).
TA_HOST_DEVICE BandMask band_mask_of_selected_rows(const AttentionProblem& p, int64_t batch) {
  BandMask band = band_mask(p, batch);
  if (p.query_rows == nullptr) return band;
  if (p.alignment == Alignment::kBottomRight) band.offset = band.key_length - p.full_query_length;
  band.rows = p.query_rows;
  band.row_count = p.query_length;
  return band;
}

}  // namespace torch_attn

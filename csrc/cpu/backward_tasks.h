// The backward pass (Dao et al. 2022, alg. 4): blocks of query rows walk over the keys, recompute the weights, and add
// to the gradients of query, key and value. Included by the files that bring such a walk: backward.h, bfloat16/walk.h,
// tangent_backward.h and map_backward.h.
#pragma once

#include "backward_walk.h"
#include "kernel_table.h"
#include "mask_gradient.h"
#include "tasks.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// A task is one (batch, key/value head) and a chunk of the query rows (of all heads in its group) that read it. Where
// one chunk per key/value head leaves threads idle, there are more, each with its own sums, which are added up in order
// at the end: no atomics, and the same result on every run with the same number of threads.
template <class Walk>
struct Backward : BackwardPlan {
  using Real = typename Walk::Real;
  using Tensors = typename Walk::Tensors;
  const AttentionProblem& p;
  const Tensors& t;
  int64_t group, chunks;
  int64_t value_sums_offset;       // where grad_value's sums start
  int64_t sums_size;               // of one chunk
  Real* chunk_sums = nullptr;      // [batch · kv head][chunk][sums] if chunks > 1
  Real* slope_partials = nullptr;  // [batch · head][row block]

  Backward(const AttentionProblem& problem, const Tensors& tensors, int threads, const AttendedBits* attended_bits)
      : p(problem), t(tensors) {
    attended = attended_bits;
    group = p.heads / p.kv_heads;
    block_rows = Walk::block_rows(p);
    row_blocks = (p.query_length + block_rows - 1) / block_rows;
    needs_query = t.grad_query.defined();
    needs_key = t.grad_key.defined();
    needs_value = t.grad_value.defined();
    needs_slopes = t.grad_alibi_slopes != nullptr;
    needs_scores = needs_query || needs_key || needs_slopes;
    key_columns = needs_key ? round_up(p.head_dim, Walk::kColumns) : 0;
    value_columns = needs_value ? round_up(p.value_dim, Walk::kColumns) : 0;
    chunks = chunks_for(threads);
    key_stride = is_sum(t.grad_key, p.head_dim, key_columns) ? t.grad_key.stride[2] : key_columns;
    value_stride = is_sum(t.grad_value, p.value_dim, value_columns) ? t.grad_value.stride[2] : value_columns;
    value_sums_offset = summed_keys() * key_columns;
    sums_size = value_sums_offset + summed_keys() * value_columns;
  }

  // The fewest chunks that keep the threads at least 90 % busy, or else those that keep them busiest.
  int64_t chunks_for(int64_t threads) const {
    const int64_t heads = p.batch * p.kv_heads, most = smaller(group * row_blocks, 4 * threads);
    int64_t best = 1;
    double best_share = 0;
    for (int64_t n = 1; n <= most; ++n) {
      const int64_t tasks = heads * n, rounds = (tasks + threads - 1) / threads;
      const double share = static_cast<double>(tasks) / static_cast<double>(rounds * threads);
      if (share > best_share) best = n, best_share = share;
      if (share >= 0.9) break;
    }
    return best;
  }

  int64_t items() const { return p.batch * p.kv_heads * chunks; }

  void run(int64_t item, Scratch& scratch) const {
    const int64_t chunk = item % chunks, kv_head = item / chunks % p.kv_heads, batch = item / chunks / p.kv_heads;
    Real *key_sums, *value_sums;
    if (chunk_sums != nullptr) {
      key_sums = chunk_sums + item * sums_size;
      value_sums = key_sums + value_sums_offset;
    } else {
      key_sums = sums_of(t.grad_key, p.head_dim, key_columns, batch, kv_head, scratch);
      value_sums = sums_of(t.grad_value, p.value_dim, value_columns, batch, kv_head, scratch);
    }
    clear(key_sums, key_stride, key_columns);
    clear(value_sums, value_stride, value_columns);

    typename Walk::Block block(p, block_rows, scratch);
    Walk walk(p, t, *this, batch, kv_head, key_sums, value_sums, scratch);
    const BandMask band = band_mask_of_selected_rows(p, batch);
    const auto cost = [&](int64_t index) {  // of a row block
      const int64_t row = index % row_blocks * block_rows;
      const KeyRange range = band.keys_of_any(row, smaller(row + block_rows, p.query_length));
      return 1 + (range.empty() ? 0 : range.end - range.begin);
    };
    int64_t total = 0, before = 0;
    for (int64_t i = 0; i < row_blocks; ++i) total += cost(i) * group;
    for (int64_t i = 0; i < group * row_blocks; ++i) {
      if (before * chunks / total == chunk) {
        const int64_t head = kv_head * group + i / row_blocks, row = i % row_blocks * block_rows;
        block.read(p, t, batch, head, row, smaller(block_rows, p.query_length - row));
        const Real slope_gradient = walk.over_keys(block);
        if (needs_slopes) slope_partials[(batch * p.heads + head) * row_blocks + i % row_blocks] = slope_gradient;
      }
      before += cost(i);
    }
    if (chunks == 1) store_sums(batch, kv_head, key_sums, value_sums, 0, p.key_length);
  }

  int64_t summed_keys() const { return p.key_length + Walk::kExtraKeys; }

  // Whether the one task that sums a gradient does so in the gradient itself: if it is laid out like the sums, or if a
  // single block of rows is all that is added, to rows that need not lie close together then.
  bool is_sum(const TensorView& gradient, int64_t row, int64_t columns) const {
    const bool alike = gradient.stride[2] == columns || group * row_blocks == 1;
    return Walk::kExtraKeys == 0 && chunks == 1 && alike && columns == row && gradient.dtype == kStoredAs<Real>;
  }
  Real* sums_of(const TensorView& gradient, int64_t row, int64_t columns, int64_t batch, int64_t kv_head,
                Scratch& scratch) const {
    if (columns == 0) return nullptr;
    if (is_sum(gradient, row, columns)) return reinterpret_cast<Real*>(element(gradient, batch, kv_head, 0));
    return scratch.take<Real>(summed_keys() * columns);
  }
  void clear(Real* sums, int64_t stride, int64_t columns) const {
    if (stride == columns) return fill<Real>(sums, 0, summed_keys() * columns);
    for (int64_t i = 0; i < summed_keys(); ++i) fill<Real>(sums + i * stride, 0, columns);
  }

  // Writes keys [begin, end) of one (batch, key/value head)'s sums out, if they do not lie there.
  void store_sums(int64_t batch, int64_t kv_head, const Real* key_sums, const Real* value_sums, int64_t begin,
                  int64_t end) const {
    const auto write = [&](const TensorView& gradient, const Real* sums, int64_t columns, int64_t row) {
      char* place = element(gradient, batch, kv_head, begin);
      sums += begin * columns;
      if (place != reinterpret_cast<const char*>(sums)) store_rows(gradient, place, sums, columns, end - begin, row);
    };
    if (needs_key) write(t.grad_key, key_sums, key_columns, p.head_dim);
    if (needs_value) write(t.grad_value, value_sums, value_columns, p.value_dim);
  }

  static constexpr int64_t kReducedKeys = 64;
  int64_t reductions() const { return p.batch * p.kv_heads * ((p.key_length + kReducedKeys - 1) / kReducedKeys); }

  // Adds up the chunks' sums for one block of keys, into the first chunk's, and writes them out.
  void reduce(int64_t item) const {
    const int64_t key_blocks = (p.key_length + kReducedKeys - 1) / kReducedKeys;
    const int64_t kv_index = item / key_blocks, begin = item % key_blocks * kReducedKeys;
    const int64_t end = smaller(begin + kReducedKeys, p.key_length);
    Real* sums = chunk_sums + kv_index * chunks * sums_size;
    const auto add_up = [&](int64_t first, int64_t last) {
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const Real* added = sums + chunk * sums_size;
        for (int64_t i = first; i < last; i += kLanes<Real>) store(sums + i, load(sums + i) + load(added + i));
      }
    };
    add_up(begin * key_columns, end * key_columns);
    add_up(value_sums_offset + begin * value_columns, value_sums_offset + end * value_columns);
    store_sums(kv_index / p.kv_heads, kv_index % p.kv_heads, sums, sums + value_sums_offset, begin, end);
  }

  void sum_slopes() const {
    for (int64_t i = 0; i < p.batch * p.heads; ++i) {
      Real sum = 0;
      for (int64_t j = 0; j < row_blocks; ++j) sum += slope_partials[i * row_blocks + j];
      static_cast<Real*>(t.grad_alibi_slopes)[i] = sum;
    }
  }
};

// False where the walk cannot serve some number (BackwardPlan::infinite): gradients are then undefined.
template <class Walk>
bool backward_with(const AttentionProblem& problem, const typename Walk::Tensors& tensors, const Parallel& parallel,
                   const AttendedBits* attended = nullptr) {
  using Real = typename Walk::Real;
  if (problem.batch * problem.kv_heads == 0) return true;
  Backward<Walk> backward(problem, tensors, parallel.threads < 1 ? 1 : parallel.threads, attended);
  if (!backward.needs_scores && !backward.needs_value) return true;
  Scratch shared;
  if (backward.chunks > 1) backward.chunk_sums = shared.take<Real>(backward.items() * backward.sums_size);
  if (backward.needs_slopes) {
    backward.slope_partials = shared.take<Real>(problem.batch * problem.heads * backward.row_blocks);
  }
  for_each_item(parallel, backward.items(), [&](int64_t item, Scratch& scratch) { backward.run(item, scratch); });
  if (backward.chunks > 1) {
    for_each_item(parallel, backward.reductions(), [&](int64_t item, Scratch&) { backward.reduce(item); });
  }
  if (backward.needs_slopes) backward.sum_slopes();
  return !backward.infinite;
}

template <class Tile>
void backward_as(const AttentionProblem& problem, const typename Tile::Tensors& tensors, const Parallel& parallel) {
  if (tensors.grad_attn_mask.defined()) mask_gradient<BackwardScores<Tile>>(problem, tensors, parallel);
  backward_with<VectorWalk<Tile>>(problem, tensors, parallel);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA

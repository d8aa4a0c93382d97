// The elementwise stage of backward's tangent kernel: one tile of weights and score gradients, and their tangents.
// Included by tangent_backward.h.
#pragma once

#include "gradient_tile.h"
#include "tangent_tile.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// One call: its tensors and what is derived from them once.
struct TangentCall : TangentBackwardTensors {
  AttentionProblem tangents;
  TangentParts changes;

  TangentCall(const AttentionProblem& p, const Tangents& t, const TangentBackwardTensors& tensors)
      : TangentBackwardTensors(tensors), tangents(problem_of_tangents(p, t)), changes(t) {}
};

// The query side: a block of rows as backward holds it, and its tangents.
template <class Real>
struct TangentRowBlock : RowBlock<Real> {
  Rows<Real> tangent_query_rows, tangent_grad_rows;  // of whole vectors; data is null: zero
  Real *tangent_query, *tangent_grad_out;            // panels, or null
  Real *tangent_logsumexp, *tangent_delta;           // [lane]

  TangentRowBlock(const AttentionProblem& p, int64_t max_rows, Scratch& scratch)
      : RowBlock<Real>(p, max_rows, scratch) {
    const int64_t lanes = round_up(max_rows, kLanes<Real>);
    query_rows_memory_ = scratch.take<Real>(lanes * round_up(p.head_dim, kLanes<Real>));
    grad_rows_memory_ = scratch.take<Real>(lanes * round_up(p.value_dim, kLanes<Real>));
    query_memory_ = scratch.take<Real>(lanes * p.head_dim);
    grad_memory_ = scratch.take<Real>(lanes * p.value_dim);
    tangent_logsumexp = scratch.take<Real>(lanes);
    tangent_delta = scratch.take<Real>(lanes);
  }

  void read(const AttentionProblem& p, const TangentCall& t, int64_t new_batch, int64_t new_head, int64_t first_row,
            int64_t row_count) {
    RowBlock<Real>::read(p, t, new_batch, new_head, first_row, row_count);
    tangent_query = pack(t.tangents.query, p.head_dim, tangent_query_rows, query_rows_memory_, query_memory_);
    tangent_grad_out = pack(t.tangent_grad_out, p.value_dim, tangent_grad_rows, grad_rows_memory_, grad_memory_);
    read_statistics(p, t);
  }

 private:
  Real* pack(const TensorView& view, int64_t columns, Rows<Real>& rows, Real* rows_memory, Real* panels_memory) {
    rows = {};
    if (!view.defined()) return nullptr;
    rows = this->rows_of(view, columns, rows_memory);
    for (int i = 0; i < this->panels.count; ++i) {
      const int64_t offset = this->panels.offset[i];
      pack_panel(panels_memory + offset * columns, this->panels.vectors[i] * kLanes<Real>,
                 rows.data + offset * rows.stride, rows.stride, this->rows - offset, columns);
    }
    return panels_memory;
  }

  // t(logsumexp), and t(delta) = rowsum(t(grad_out) · out + grad_out · t(out)) − t(grad_logsumexp).
  void read_statistics(const AttentionProblem& p, const TangentCall& t) {
    const int64_t first = p.first_row(this->batch, this->head) + this->row;
    const Real* stored = static_cast<const Real*>(t.tangent_logsumexp);
    const Real* grad_logsumexp = static_cast<const Real*>(t.tangent_grad_logsumexp);
    for (int64_t i = 0; i < this->panels.lanes; ++i) {
      tangent_logsumexp[i] = 0;
      tangent_delta[i] = 0;
      if (i >= this->rows || this->logsumexp[i] == static_cast<Real>(__builtin_inf())) continue;
      if (stored != nullptr) tangent_logsumexp[i] = stored[first + i];
      if (grad_logsumexp != nullptr) tangent_delta[i] = -grad_logsumexp[first + i];
      tangent_delta[i] += dot(p, t.out, tangent_grad_rows, i) + dot(p, t.tangent_out, this->grad_rows, i);
    }
  }

  // The dot of row i of a tensor like out with row i of rows; 0 where either is undefined.
  Real dot(const AttentionProblem& p, const TensorView& view, Rows<Real> rows, int64_t i) const {
    if (!view.defined() || rows.data == nullptr) return 0;
    const Real* out = padded_rows(view, this->batch, this->head, this->row + i, 1, p.value_dim, this->out_memory_).data;
    Vec<Real> sum{};
    for (int64_t j = 0; j < round_up(p.value_dim, kLanes<Real>); j += kLanes<Real>) {
      sum += load(rows.data + i * rows.stride + j) * load(out + j);
    }
    return sum_of_lanes<Real>(sum);
  }

  Real *query_rows_memory_, *grad_rows_memory_, *query_memory_, *grad_memory_;
};

// A panel with a block of keys, each array [key][lane].
template <class Real>
struct TangentTile {
  Real *weights, *tangent_weights;      // in: scores and t(score); out: the weights after dropout and their tangents
  Real *gradients, *tangent_gradients;  // in: grad_out·value and t of it; out: the score gradients and their tangents

  static TangentTile take(int64_t size, Scratch& scratch) {
    return {scratch.take<Real>(size), scratch.take<Real>(size), scratch.take<Real>(size), scratch.take<Real>(size)};
  }
  TA_INLINE TangentTile at(int64_t offset) const {
    return {weights + offset, tangent_weights + offset, gradients + offset, tangent_gradients + offset};
  }
};

// One row's numbers, per lane.
template <class Real>
struct TangentStatistics {
  const Real *logsumexp, *tangent_logsumexp, *delta, *tangent_delta, *weight_scale;  // weight_scale null: 1
};

// With P = exp(score − logsumexp) · weight_scale, G = keep · grad_out·value − delta and t(P) = P · (t(score) −
// t(logsumexp)): weights keep · P and keep · t(P), gradients P · G · factor and (t(P) · G + P · t(G)) · factor. keep is
// dropout's scale or 0. kPlain says that dropout.words and weight_scale are null.
template <class Real, int kVectors, bool kPlain>
TA_NOINLINE void tangent_weights_and_gradients(int64_t begin, int64_t end, const TangentTile<Real>& tile,
                                               const TangentStatistics<Real>& row, Real factor,
                                               KeptTile<Real, kVectors> dropout) {
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    const Vec<Real> logsumexp = load(row.logsumexp + n * n_lanes), delta = load(row.delta + n * n_lanes);
    const Vec<Real> tangent_logsumexp = load(row.tangent_logsumexp + n * n_lanes);
    const Vec<Real> tangent_delta = load(row.tangent_delta + n * n_lanes);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t place = j * width + n * n_lanes;
      const bool rescaled = !kPlain && row.weight_scale != nullptr;
      Vec<Real> weight = weight_from_exponent<Real>(load(tile.weights + place) - logsumexp, rescaled);
      if (rescaled) weight *= load(row.weight_scale + n * n_lanes);
      const Vec<Real> tangent = weighted<Real>(weight, load(tile.tangent_weights + place) - tangent_logsumexp);
      Vec<Real> gradient = load(tile.gradients + place), tangent_gradient = load(tile.tangent_gradients + place);
      Vec<Real> kept = weight, tangent_kept = tangent;
      if (!kPlain && dropout.words != nullptr) {
        const Kept<Real> lanes = dropout.at(j, n);
        kept = kept_of(kept, lanes, dropout.scale);
        tangent_kept = kept_of(tangent_kept, lanes, dropout.scale);
        gradient = kept_of(gradient, lanes, dropout.scale);
        tangent_gradient = kept_of(tangent_gradient, lanes, dropout.scale);
      }
      gradient -= delta;
      tangent_gradient -= tangent_delta;
      store(tile.weights + place, kept);
      store(tile.tangent_weights + place, tangent_kept);
      store(tile.gradients + place, weight * gradient * factor);
      store(tile.tangent_gradients + place, (tangent * gradient + weight * tangent_gradient) * factor);
    }
  }
}

// From score gradients to dot gradients, elements [begin, end). With softcap derivative is d score / d dot, and
// curvature its tangent.
template <class Real>
TA_NOINLINE void chain_to_dots(const ScoreStage<Real>& stage, int64_t begin, int64_t end, const TangentTile<Real>& tile,
                               const Real* derivative, const Real* curvature) {
  for (int64_t i = begin; i < end; i += kLanes<Real>) {
    const Vec<Real> gradient = load(tile.gradients + i);
    const Vec<Real> factor = stage.softcap ? load(derivative + i) : splat(stage.mod.scale);
    Vec<Real> tangent = load(tile.tangent_gradients + i) * factor;
    if (stage.softcap) tangent += gradient * load(curvature + i);
    store(tile.gradients + i, gradient * factor);
    store(tile.tangent_gradients + i, tangent);
  }
}

// Weights, score gradients and their tangents of one panel with one block of keys.
template <class Real>
struct TangentGradientTile {
  const AttentionProblem& p;
  const TangentCall& t;
  Dropout dropout;
  TileScratch<Real> scratch, tangent_scratch;
  Real* curvature;

  TangentGradientTile(const AttentionProblem& problem, const TangentCall& call, Scratch& memory)
      : p(problem),
        t(call),
        dropout(Dropout::make(problem.dropout_p, problem.philox_seed, problem.philox_offset)),
        scratch(problem, memory),
        tangent_scratch(call.tangents, memory),
        curvature(memory.take<Real>(problem.softcap != 0 ? kBackwardKeys * kMaxVectors * kLanes<Real> : 0)) {}

  using Wanted = typename GradientTile<Real>::Wanted;

  // For the panel at lane offset and the keys of span; tile is the panel's. False where nothing is attended: then
  // nothing is written. slope_gradient, if wanted, is added to.
  template <int kVectors>
  TA_INLINE bool compute(const TangentRowBlock<Real>& block, const ScoreStage<Real>& stage, int64_t offset, int64_t key,
                         const KeySpan& span, const TangentKeys<Real>& keys, Wanted wanted,
                         const TangentTile<Real>& tile, Real* slope_gradient) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const int64_t row = block.row + offset, rows = smaller(width, block.rows - offset);
    BiasTile<Real> bias;
    if (!load_bias<Real, kVectors>(stage, scratch, row, rows, key, span, bias)) return false;
    const auto panel = [&](const Real* panels, int64_t dim) {
      return panels == nullptr ? nullptr : panels + offset * dim;
    };
    const Real *query = panel(block.query, p.head_dim), *tangent_query = panel(block.tangent_query, p.head_dim);
    const Real *grad_out = panel(block.grad_out, p.value_dim),
               *tangent_grad = panel(block.tangent_grad_out, p.value_dim);

    capped_score_tile<Real, kVectors, false>(stage, bias, span, p.head_dim, keys.key, query, row, key, tile.weights,
                                             scratch.derivative, nullptr);
    dot_sums<Real, kVectors>(span, p.head_dim, {{keys.tangent_key, query}, {keys.key, tangent_query}},
                             stage.dot_factor(), tile.tangent_weights);
    const ScoreStage<Real> added(t.tangents, block.batch, block.head);
    BiasTile<Real> tangent_bias;
    load_bias<Real, kVectors>(added, tangent_scratch, row, rows, key, span, tangent_bias);
    if (stage.softcap || added.changes_elements(tangent_bias)) {
      tangent_scores<Real, kVectors>(stage, added, tangent_bias, row, key, span.begin, span.end, tile.tangent_weights,
                                     scratch.derivative, curvature);
    }
    const bool gradients = wanted != Wanted::kWeightsOnly;
    const Real* used_grad_out = gradients ? grad_out : nullptr;  // a null panel makes dot_sums write zeros
    dot_sums<Real, kVectors>(span, p.value_dim,
                             {{keys.value, t.changes.weights ? used_grad_out : nullptr}, {keys.value, nullptr}}, 1,
                             tile.gradients);
    dot_sums<Real, kVectors>(span, p.value_dim,
                             {{keys.tangent_value, used_grad_out}, {keys.value, gradients ? tangent_grad : nullptr}}, 1,
                             tile.tangent_gradients);
    finish<kVectors>(block, stage, offset, key, span, wanted, tile, slope_gradient);
    return true;
  }

 private:
  template <int kVectors>
  TA_INLINE void finish(const TangentRowBlock<Real>& block, const ScoreStage<Real>& stage, int64_t offset, int64_t key,
                        const KeySpan& span, Wanted wanted, const TangentTile<Real>& tile, Real* slope_gradient) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const int64_t row = block.row + offset;
    const auto kept = kept_tile<Real, kVectors>(p, dropout, block.batch, block.head, row, key, span, scratch.dropout);
    const Real* weight_scale = block.weight_scale == nullptr ? nullptr : block.weight_scale + offset;
    const TangentStatistics<Real> statistics{block.logsumexp + offset, block.tangent_logsumexp + offset,
                                             block.delta + offset, block.tangent_delta + offset, weight_scale};
    const bool to_dots = wanted == Wanted::kDotGradients, plain = kept.words == nullptr && weight_scale == nullptr;
    const bool chain_later = to_dots && (stage.softcap || slope_gradient != nullptr);
    const Real factor = to_dots && !chain_later ? stage.mod.scale : Real{1};
    (plain
         ? tangent_weights_and_gradients<Real, kVectors, true>
         : tangent_weights_and_gradients<Real, kVectors, false>)(span.begin, span.end, tile, statistics, factor, kept);
    if (slope_gradient != nullptr) {
      *slope_gradient +=
          sum_slope_gradient<Real, kVectors>(stage, row, key, span.begin, span.end, tile.tangent_gradients, {});
    }
    if (chain_later) {
      chain_to_dots<Real>(stage, span.begin * width, span.end * width, tile, scratch.derivative, curvature);
    }
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA

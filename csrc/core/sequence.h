// One batch entry of a call of packed sequences (AttentionProblem::query_starts) as a call of its own, whose batch is 1
// and whose tensors start at the entry's first row. Used by csrc/cpu, which runs such a call entry by entry; the CUDA
// kernels find their entry's rows themselves.
#pragma once

#include "problem.h"

namespace torch_attn {

class Sequence {
 public:
  Sequence(const AttentionProblem& call, int64_t batch)
      : call_(call),
        batch_(batch),
        query_length_(call.queries_of(batch)),
        key_length_(call.keys_of(batch)),
        first_query_(call.first_query(batch)),
        first_key_(call.first_key(batch)) {}

  int64_t query_length() const { return query_length_; }
  int64_t key_length() const { return key_length_; }

  AttentionProblem problem() const {
    AttentionProblem p = call_;
    p.batch = 1;
    p.query_length = query_length_;
    p.key_length = key_length_;
    p.query = query_side(p.query);
    p.key = key_side(p.key);
    p.value = key_side(p.value);
    p.alibi_slopes = per_head(p.alibi_slopes);
    p.sinks = per_head(p.sinks);
    if (p.key_lengths != nullptr) p.key_lengths += batch_;
    p.query_starts = p.key_starts = nullptr;
    p.philox_offset += static_cast<uint64_t>(batch_ * p.heads);  // see dropout.h: bits are those of the batch entry
    return p;
  }

  ForwardOutputs part_of(const ForwardOutputs& o) const { return {query_side(o.out), by_row(o.logsumexp)}; }

  TangentForwardOutputs part_of(const TangentForwardOutputs& o) const {
    return {query_side(o.out), by_row(o.logsumexp), query_side(o.tangent_out), by_row(o.tangent_logsumexp)};
  }

  Tangents part_of(const Tangents& t) const {
    return {query_side(t.query), key_side(t.key),          key_side(t.value),
            t.attn_mask,         per_head(t.alibi_slopes), per_head(t.sinks)};
  }

  BackwardTensors part_of(const BackwardTensors& call) const {
    BackwardTensors t = call;
    t.out = query_side(t.out);
    t.grad_out = query_side(t.grad_out);
    t.logsumexp = by_row(t.logsumexp);
    t.grad_logsumexp = by_row(t.grad_logsumexp);
    t.grad_query = query_side(t.grad_query);
    t.grad_key = key_side(t.grad_key);
    t.grad_value = key_side(t.grad_value);
    if (t.grad_alibi_slopes != nullptr)
      t.grad_alibi_slopes = moved(t.grad_alibi_slopes, batch_ * call_.heads * accumulator_size());
    return t;
  }

  TangentBackwardTensors part_of(const TangentBackwardTensors& call) const {
    TangentBackwardTensors t = call;
    static_cast<BackwardTensors&>(t) = part_of(static_cast<const BackwardTensors&>(call));
    t.tangent_out = query_side(t.tangent_out);
    t.tangent_logsumexp = by_row(t.tangent_logsumexp);
    t.tangent_grad_out = query_side(t.tangent_grad_out);
    t.tangent_grad_logsumexp = by_row(t.tangent_grad_logsumexp);
    return t;
  }

 private:
  static void* moved(const void* data, int64_t bytes) {
    return data == nullptr ? nullptr : const_cast<char*>(static_cast<const char*>(data)) + bytes;
  }
  int64_t accumulator_size() const { return call_.dtype == ScalarType::kFloat64 ? 8 : 4; }
  static int64_t size_of(ScalarType dtype) {
    return dtype == ScalarType::kFloat64 ? 8 : dtype == ScalarType::kFloat32 ? 4 : dtype == ScalarType::kBool ? 1 : 2;
  }

  // Elements of a view that lie before this entry's.
  TensorView shifted(TensorView view, int64_t elements) const {
    view.data = moved(view.data, elements * size_of(view.dtype));
    return view;
  }
  TensorView query_side(const TensorView& view) const {
    return shifted(view, call_.query_starts != nullptr ? first_query_ * view.stride[2] : batch_ * view.stride[0]);
  }
  TensorView key_side(TensorView view) const {
    if (view.pages != nullptr) {
      view.pages += batch_ * view.pages_stride;
      return view;
    }
    return shifted(view, call_.key_starts != nullptr ? first_key_ * view.stride[2] : batch_ * view.stride[0]);
  }
  TensorView per_head(const TensorView& view) const { return shifted(view, batch_ * view.stride[0]); }

  // Of logsumexp and its like: packed or not, an entry's first head starts there.
  void* by_row(const void* data) const { return moved(data, call_.first_row(batch_, 0) * accumulator_size()); }

  const AttentionProblem& call_;
  int64_t batch_, query_length_, key_length_, first_query_, first_key_;
};

}  // namespace torch_attn

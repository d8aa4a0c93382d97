// Packed sequences, seen by ATen operators: which sequence each row belongs to, and numbers per (sequence, head) seen
// by row. For calls that are not packed the same functions do what broadcasting does. Included by kernel_call.h, cpu/
// and composite/.
#pragma once

#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/zeros.h>

#include "ops/outputs.h"

namespace torch_attn::ops {

// (rows), int64: the sequence of each row; their number for the rows after the last sequence.
inline Tensor sequence_of_row(const Tensor& cu_seqlens, const SymInt& rows) {
  const Tensor ends = cu_seqlens.to(at::kLong).narrow_symint(0, 1, cu_seqlens.sym_size(0) - 1);
  return at::searchsorted(ends, at::arange(rows, ends.options()), /*out_int32=*/false, /*right=*/true);
}

inline bool is_apart_by_sequence(const Tensor& per_head, const Options& o) {
  return is_defined(o.cu_seqlens_q) && per_head.dim() == 2;
}

// What each of a head's query rows has of a number per head, (Hq) or (B, Hq): (…, Hq, 1), or (1, Hq, rows) where packed
// sequences have numbers of their own.
inline Tensor number_of_row(const Tensor& per_head, const Options& o, const SymInt& rows) {
  if (!is_apart_by_sequence(per_head, o)) return per_head.unsqueeze(-1);
  const Tensor padded = at::constant_pad_nd(per_head, {0, 0, 0, 1});
  return padded.index_select(0, sequence_of_row(*o.cu_seqlens_q, rows)).t().unsqueeze(0);
}

// The transpose: the sum of (B, Hq, rows) over the rows that share a number of per_head, in its shape and dtype.
inline Tensor sum_of_rows(const Tensor& by_row, const Tensor& per_head, const Options& o) {
  if (!is_apart_by_sequence(per_head, o)) return per_head_gradient(by_row.sum(2), per_head);
  const Tensor sequence = sequence_of_row(*o.cu_seqlens_q, by_row.sym_size(2));
  const Tensor sums = at::zeros_symint({per_head.sym_size(0) + 1, per_head.sym_size(1)}, by_row.options())
                          .index_add(0, sequence, by_row.squeeze(0).t());
  return sums.narrow_symint(0, 0, per_head.sym_size(0)).to(per_head.scalar_type());
}

}  // namespace torch_attn::ops

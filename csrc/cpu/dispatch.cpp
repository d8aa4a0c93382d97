// The functions of kernels.h: the ISA's choice, and the dropout bits, which need no vector code of their own.
#include "../core/dropout.h"
#include "kernel_table.h"
#include "packed.h"

namespace torch_attn::cpu {
namespace {

const KernelTable& active_kernels() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return kAvx2Kernels;
    case Isa::kAvx512:
      return kAvx512Kernels;
    case Isa::kAvx512Bf16:
      return kAvx512Bf16Kernels;
    case Isa::kAmx:
      return kAmxKernels;
#endif
    default:
      return kBaselineKernels;
  }
}

struct KeepMaskTask {
  const AttentionProblem& problem;
  bool* out;
};

// One (batch, head, row) of the keep mask.
void write_keep_row(void* context, int64_t index) {
  const auto& [p, out] = *static_cast<const KeepMaskTask*>(context);
  const Dropout dropout = Dropout::make(p.dropout_p, p.philox_seed, p.philox_offset);
  const int64_t head = index / p.query_length, row = index % p.query_length;  // head: of all batch entries
  const int64_t batch_head = p.dropout_batch_head(head / p.heads, head % p.heads);
  bool* keep = out + index * p.key_length;
  for (int64_t key = 0; key < p.key_length; key += Dropout::kKeysPerCall) {
    const auto call = dropout.call(batch_head, row, key);
    for (int i = 0; i < Dropout::kKeysPerCall && key + i < p.key_length; ++i) {
      keep[key + i] = dropout.keeps(call, static_cast<int>(row % Dropout::kRowsPerCall), i);
    }
  }
}

}  // namespace

void attention_forward(const AttentionProblem& problem, const ForwardOutputs& outputs, const Parallel& parallel) {
  const auto kernel = active_kernels().forward;
  if (!is_packed(problem)) return kernel(problem, outputs, parallel);
  for_each_sequence(problem, parallel, [&](const Sequence& sequence, const Parallel& inner) {
    kernel(sequence.problem(), sequence.part_of(outputs), inner);
  });
}

void attention_backward(const AttentionProblem& problem, const BackwardTensors& tensors, const Parallel& parallel) {
  const auto kernel = active_kernels().backward;
  if (!is_packed(problem)) return kernel(problem, tensors, parallel);
  for_each_sequence(problem, parallel, [&](const Sequence& sequence, const Parallel& inner) {
    kernel(sequence.problem(), sequence.part_of(tensors), inner);
  });
}

void attention_tangent_forward(const AttentionProblem& problem, const Tangents& tangents,
                               const TangentForwardOutputs& outputs, const Parallel& parallel) {
  const auto kernel = active_kernels().tangent_forward;
  if (!is_packed(problem)) return kernel(problem, tangents, outputs, parallel);
  for_each_sequence(problem, parallel, [&](const Sequence& sequence, const Parallel& inner) {
    kernel(sequence.problem(), sequence.part_of(tangents), sequence.part_of(outputs), inner);
  });
}

void attention_tangent_backward(const AttentionProblem& problem, const Tangents& tangents,
                                const TangentBackwardTensors& tensors, const Parallel& parallel) {
  const auto kernel = active_kernels().tangent_backward;
  if (!is_packed(problem)) return kernel(problem, tangents, tensors, parallel);
  for_each_sequence(problem, parallel, [&](const Sequence& sequence, const Parallel& inner) {
    kernel(sequence.problem(), sequence.part_of(tangents), sequence.part_of(tensors), inner);
  });
}

void dropout_keep_mask(const AttentionProblem& problem, bool* out, const Parallel& parallel) {
  KeepMaskTask task{problem, out};
  const int64_t rows = problem.batch * problem.heads * problem.query_length;
  if (rows > 0) parallel.run(parallel.context, rows, write_keep_row, &task);
}

}  // namespace torch_attn::cpu

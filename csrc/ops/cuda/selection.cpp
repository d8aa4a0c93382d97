// Hard attention's CUDA kernels as operators. Empty in a build without nvcc.
#if defined(TORCH_ATTN_WITH_CUDA)

#include <c10/core/DeviceGuard.h>

#include "cuda/selection_kernels.h"
#include "ops/cuda/stream.h"
#include "ops/selection_call.h"

namespace torch_attn::ops {
namespace {

class Kernels {
 public:
  explicit Kernels(const Tensor& tensor)
      : guard_(tensor.device()), stream_(current_stream(tensor)), bytes_(tensor.options().dtype(at::kByte)) {}

  void select(const AttentionProblem& p, const Selection& selection, const SelectionOutputs& outputs) const {
    const Tensor memory = workspace(cuda::select_keys_workspace_bytes(p, selection));
    cuda::select_keys(p, selection, outputs, memory.mutable_data_ptr(), stream_);
  }
  void backward(const AttentionProblem& p, const SelectionBackwardTensors& tensors) const {
    const Tensor memory = workspace(cuda::select_keys_backward_workspace_bytes(p));
    cuda::select_keys_backward(p, tensors, memory.mutable_data_ptr(), stream_);
  }
  void gather(const RowChoice& choice, const TensorView& source, const TensorView& out) const {
    cuda::gather_rows(choice, source, out, stream_);
  }
  void scatter(const RowChoice& choice, const TensorView& rows, const TensorView& out) const {
    cuda::scatter_rows(choice, rows, out, stream_);
  }
  void dots(const RowChoice& choice, const TensorView& rows, const TensorView& source, void* out) const {
    cuda::chosen_dots(choice, rows, source, out, stream_);
  }

 private:
  Tensor workspace(size_t bytes) const { return at::empty({static_cast<int64_t>(bytes)}, bytes_); }

  c10::DeviceGuard guard_;
  cuda::Stream stream_;
  at::TensorOptions bytes_;
};

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CUDA, m) {
  m.impl("gather_values", GatherValues::kernel<gather_values_with<Kernels>>);
  m.impl("gather_values_backward", GatherValuesBackward::kernel<gather_values_backward_with<Kernels>>);
  m.impl("select_keys", SelectKeys::kernel<select_keys_with<Kernels>>);
  m.impl("select_keys_backward", SelectKeysBackward::kernel<select_keys_backward_with<Kernels>>);
}

}  // namespace torch_attn::ops

#endif  // TORCH_ATTN_WITH_CUDA

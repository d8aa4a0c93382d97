// The C interface through which emulation.py runs kernels: every call returns 0, or 1 and leaves a sentence in
// emulation_error(). Tensors live in the emulated device's memory.
#include <algorithm>
#include <exception>
#include <string>

#include "cuda/kernels.h"
#include "cuda/map_kernels.h"
#include "cuda/selection_kernels.h"
#include "emulator/memory.h"
#include "emulator/scheduler.h"
#include "faulty_kernels.h"

namespace cuda = torch_attn::cuda;

namespace {

std::string error;

template <class Function>
int guarded(Function&& function) {
  try {
    function();
    return 0;
  } catch (const std::exception& e) {
    emulation::current = nullptr;
    error = e.what();
    return 1;
  }
}

// "tier: refusal" for each tier, one a line; of one that would serve the call, "tier: +form".
const char* text_of(const std::vector<cuda::TierAnswer>& answers) {
  static std::string text;
  text.clear();
  for (const auto& answer : answers)
    text += std::string(answer.tier) + ": " + (answer.refusal.empty() ? "+" + answer.form : answer.refusal) + "\n";
  return text.c_str();
}

}  // namespace

extern "C" {

const char* emulation_error() { return error.c_str(); }

// The sizes of the structures that emulation.py mirrors.
void emulation_structure_sizes(size_t* sizes) {
  sizes[0] = sizeof(torch_attn::TensorView);
  sizes[1] = sizeof(torch_attn::AttentionProblem);
  sizes[2] = sizeof(torch_attn::ForwardOutputs);
  sizes[3] = sizeof(torch_attn::BackwardTensors);
}

void emulation_configure(uint64_t seed, int fault, int fault_call, int multiprocessors) {
  emulation::options = {seed, static_cast<emulation::Fault>(fault), fault_call, multiprocessors};
}

void* emulation_allocate(size_t bytes, size_t granule) { return emulation::allocate(bytes, granule); }
void emulation_set_read_only(void* memory) { emulation::set_read_only(memory, true); }
void emulation_free_all() { emulation::free_all(); }

int emulation_force_tier(const char* name) {
  return guarded([&] { cuda::force_tier(name); });
}

const char* emulation_tiers(const torch_attn::AttentionProblem* problem, const torch_attn::BackwardTensors* backward) {
  const cuda::DeviceFacts device = cuda::device_facts(0);
  return text_of(backward ? cuda::backward_tiers(*problem, *backward, device) : cuda::forward_tiers(*problem, device));
}
const char* emulation_map_tiers(const torch_attn::AttentionProblem* problem,
                                const torch_attn::BackwardTensors* backward) {
  const cuda::DeviceFacts device = cuda::device_facts(0);
  return text_of(backward ? cuda::map_backward_tiers(*problem, *backward, device)
                          : cuda::map_forward_tiers(*problem, device));
}

int emulation_forward(const torch_attn::AttentionProblem* problem, const torch_attn::ForwardOutputs* outputs) {
  return guarded([&] {
    void* workspace = emulation::allocate(cuda::forward_workspace_bytes(*problem, {}), sizeof(float));
    cuda::attention_forward(*problem, *outputs, workspace, {});
  });
}

int emulation_backward(const torch_attn::AttentionProblem* problem, const torch_attn::BackwardTensors* tensors) {
  return guarded([&] {
    const size_t bytes = cuda::backward_workspace_bytes(*problem, *tensors, {});
    void* workspace = emulation::allocate(bytes, sizeof(float));
    cuda::attention_backward(*problem, *tensors, workspace, {});
  });
}

// The sizes of the structures that maps.py mirrors.
void emulation_map_structure_sizes(size_t* sizes) {
  sizes[0] = sizeof(torch_attn::StatisticsOutputs);
  sizes[1] = sizeof(torch_attn::WeightsOutputs);
  sizes[2] = sizeof(torch_attn::MapBackwardTensors);
}

int emulation_attention_statistics(const torch_attn::AttentionProblem* problem,
                                   const torch_attn::StatisticsOutputs* outputs) {
  return guarded([&] {
    void* workspace = emulation::allocate(cuda::map_forward_workspace_bytes(*problem), sizeof(float));
    cuda::attention_statistics(*problem, *outputs, workspace, {});
  });
}

int emulation_attention_weights(const torch_attn::AttentionProblem* problem,
                                const torch_attn::WeightsOutputs* outputs) {
  return guarded([&] {
    void* workspace = emulation::allocate(cuda::map_forward_workspace_bytes(*problem), sizeof(float));
    cuda::attention_weights(*problem, *outputs, workspace, {});
  });
}

int emulation_attention_map_backward(const torch_attn::AttentionProblem* problem,
                                     const torch_attn::MapBackwardTensors* tensors) {
  return guarded([&] {
    void* workspace = emulation::allocate(cuda::map_backward_workspace_bytes(*problem), sizeof(float));
    cuda::attention_map_backward(*problem, *tensors, workspace, {});
  });
}

int emulation_keep_mask(const torch_attn::AttentionProblem* problem, bool* out) {
  return guarded([&] { cuda::dropout_keep_mask(*problem, out, {}); });
}

void emulation_selection_structure_sizes(size_t* sizes) {
  sizes[0] = sizeof(torch_attn::Selection);
  sizes[1] = sizeof(torch_attn::SelectionOutputs);
  sizes[2] = sizeof(torch_attn::SelectionBackwardTensors);
  sizes[3] = sizeof(torch_attn::RowChoice);
}

int emulation_select_keys(const torch_attn::AttentionProblem* problem, const torch_attn::Selection* selection,
                          const torch_attn::SelectionOutputs* outputs) {
  return guarded([&] {
    void* workspace = emulation::allocate(cuda::select_keys_workspace_bytes(*problem, *selection), sizeof(float));
    cuda::select_keys(*problem, *selection, *outputs, workspace, {});
  });
}

int emulation_select_keys_backward(const torch_attn::AttentionProblem* problem,
                                   const torch_attn::SelectionBackwardTensors* tensors) {
  return guarded([&] {
    void* workspace = emulation::allocate(cuda::select_keys_backward_workspace_bytes(*problem), sizeof(float));
    cuda::select_keys_backward(*problem, *tensors, workspace, {});
  });
}

int emulation_gather_rows(const torch_attn::RowChoice* choice, const torch_attn::TensorView* source,
                          const torch_attn::TensorView* out) {
  return guarded([&] { cuda::gather_rows(*choice, *source, *out, {}); });
}

int emulation_scatter_rows(const torch_attn::RowChoice* choice, const torch_attn::TensorView* rows,
                           const torch_attn::TensorView* out) {
  return guarded([&] { cuda::scatter_rows(*choice, *rows, *out, {}); });
}

int emulation_chosen_dots(const torch_attn::RowChoice* choice, const torch_attn::TensorView* rows,
                          const torch_attn::TensorView* source, void* dots) {
  return guarded([&] { cuda::chosen_dots(*choice, *rows, *source, dots, {}); });
}

const char* emulation_faulty_kernel_name(int kernel) { return cuda::faulty::name(kernel); }

// result: of cuda::faulty::kElements numbers.
int emulation_run_faulty_kernel(int kernel, float* result) {
  return guarded([&] {
    constexpr size_t kBytes = cuda::faulty::kElements * sizeof(float);
    float* out = static_cast<float*>(emulation::allocate(kBytes, sizeof(float)));
    float* in = static_cast<float*>(emulation::allocate(kBytes, sizeof(float)));
    for (int i = 0; i < cuda::faulty::kElements; ++i) {
      in[i] = static_cast<float>(i);
      out[i] = 0;
    }
    emulation::set_read_only(in, true);
    cuda::faulty::run(kernel, out, in);
    std::copy_n(out, cuda::faulty::kElements, result);
  });
}

}  // extern "C"

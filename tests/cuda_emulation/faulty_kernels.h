// See faulty_kernels.cu; called by runner.cpp.
#pragma once

namespace torch_attn::cuda::faulty {

constexpr int kElements = 64;  // of out and in

const char* name(int kernel);  // null past the last
void run(int kernel, float* out, const float* in);

}  // namespace torch_attn::cuda::faulty

// Which instruction sets the kernels were compiled for, which of them this CPU has, and which one runs. Included by
// kernels.h; torch_attn.info and the tests read it through the ops.
#pragma once

#include <string>
#include <vector>

namespace torch_attn::cpu {

// kAvx512Bf16 is AVX-512 with bfloat16 products by `vdpbf16ps`, kAmx with those on the tile registers of AMX.
enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* isa_name(Isa isa);  // a value of TORCH_ATTN_CPU_ISA: "avx512_bf16" and so on

// In ascending order; the baseline is always there.
std::vector<Isa> supported_isas();

// The fastest of them, or the one that the environment variable TORCH_ATTN_CPU_ISA names. The variable is read once.
// Throws std::invalid_argument (on every call) when it names no ISA or one that this CPU or build lacks.
Isa active_isa();

// Runs this one from now on, in every thread, as the tests do to try each; "" leaves the choice to active_isa again.
// Throws like active_isa.
void force_isa(const std::string& name);

// Whether the variable or force_isa named it: then it runs wherever it can, and else where it is the fastest.
bool is_isa_forced();

}  // namespace torch_attn::cpu

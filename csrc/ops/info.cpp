// What the library says about itself, for torch_attn.info and for bug reports.
#include <torch/headeronly/version.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "cpu/isa.h"

namespace torch_attn::ops {
namespace {

std::string build_info() {
#if defined(__clang__)
  const std::string compiler = "Clang " __clang_version__;
#else
  const std::string compiler = "GCC " __VERSION__;
#endif
#if defined(TORCH_ATTN_WITH_CUDA)
  const std::string cuda = "CUDA on";
#else
  const std::string cuda = "CUDA off";
#endif
  return "torch " TORCH_VERSION ", " + compiler + ", " + cuda;
}

std::string cpu_isa() { return cpu::isa_name(cpu::active_isa()); }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::supported_isas()) names.emplace_back(cpu::isa_name(isa));
  return names;
}

void force_cpu_isa(std::string isa) { cpu::force_isa(isa); }

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CompositeExplicitAutograd, m) {
  m.impl("build_info", build_info);
  m.impl("cpu_isa", cpu_isa);
  m.impl("cpu_isas", cpu_isas);
  m.impl("force_cpu_isa", force_cpu_isa);
}

}  // namespace torch_attn::ops

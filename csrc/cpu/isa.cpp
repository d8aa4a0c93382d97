// Run-time detection of the instruction set; see isa.h.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace torch_attn::cpu {
namespace {

constexpr Isa kAllIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

#if defined(__x86_64__)
// Linux gives a process the tile registers' state only when it asks.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

bool is_supported(Isa isa) {
#if defined(__x86_64__)
  // The same sets as the compile flags in CMakeLists.txt.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  switch (isa) {
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512_bf16;
    case Isa::kAmx:
      return avx512_bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
    default:
      return true;
  }
#else
  return isa == Isa::kBaseline;
#endif
}

// Whether a CPU that has the set gains from it. Intel's cores with AVX512_FP16 (Sapphire Rapids and later) spend the
// time of four multiply-adds on a `vdpbf16ps`, which does the work of two: there avx512, which converts bfloat16 to
// float32, measured 1.6 times faster. Zen 4 is reported to spend that of one, and other cores are taken to do so.
bool is_worthwhile(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Bf16) return !(__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512fp16"));
#endif
  return true;
}

Isa best_isa() {
  Isa best = Isa::kBaseline;
  for (const Isa isa : supported_isas()) {
    if (is_worthwhile(isa)) best = isa;
  }
  return best;
}

std::string supported_names() {
  std::string names;
  for (const Isa isa : supported_isas()) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

// source says who named it, for the error.
Isa parse_isa(const std::string& name, const std::string& source) {
  for (const Isa isa : kAllIsas) {
    if (name != isa_name(isa)) continue;
    if (is_supported(isa)) return isa;
    throw std::invalid_argument(source + " is \"" + name +
                                "\", which this CPU or build does not support; it supports " + supported_names() + ".");
  }
  throw std::invalid_argument(source + " is \"" + name + "\", which is not an instruction set; use one of " +
                              supported_names() + ".");
}

const char* isa_variable() {
  const char* wanted = std::getenv("TORCH_ATTN_CPU_ISA");
  return wanted == nullptr ? "" : wanted;
}

Isa initial_isa() {
  const char* wanted = isa_variable();
  return *wanted == '\0' ? best_isa() : parse_isa(wanted, "TORCH_ATTN_CPU_ISA");
}

// An initial_isa that throws leaves the static uninitialised, so that the next call throws again.
std::atomic<Isa>& current_isa() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

std::atomic<bool>& current_is_forced() {
  static std::atomic<bool> forced{*isa_variable() != '\0'};
  return forced;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
    default:
      return "baseline";
  }
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : kAllIsas) {
    if (is_supported(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa active_isa() { return current_isa().load(std::memory_order_relaxed); }

void force_isa(const std::string& name) {
  current_isa().store(name.empty() ? initial_isa() : parse_isa(name, "isa"), std::memory_order_relaxed);
  current_is_forced().store(!name.empty() || *isa_variable() != '\0', std::memory_order_relaxed);
}

bool is_isa_forced() { return current_is_forced().load(std::memory_order_relaxed); }

}  // namespace torch_attn::cpu

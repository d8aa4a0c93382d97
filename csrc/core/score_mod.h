// What happens to q·k before the softmax, forward and derivative: scale, softcap and ALiBi. The mask's bias is added by
// the kernel, which alone knows how it loads it. Used by every kernel through a Math policy that names the scalar type
// (Real), the value type (a scalar, or a vector of lanes) and the functions tanh and abs on it.
//
//   score  = softcap · tanh(scale · q·k / softcap) − slope · |position − key| + bias
//
// softcap: Gemma 2 (Gemma Team 2024, §2); it acts before ALiBi and bias, as in FlashAttention.
// ALiBi: Press et al. 2022, "Train Short, Test Long", §3, symmetric form as in FlashAttention.
#pragma once

#include "macros.h"

namespace torch_attn {

template <class Math>
struct ScoreMod {
  using Real = typename Math::Real;
  using Value = typename Math::Value;

  Real scale;
  Real softcap;    // 0: off
  Real slope = 0;  // ALiBi slope of this head; 0: off

  // scale and softcap. Keep the result: the derivative is a function of it.
  TA_HOST_DEVICE Value capped(Value dot) const {
    const Value scaled = dot * scale;
    return softcap == 0 ? scaled : Math::tanh(scaled * (1 / softcap)) * softcap;
  }
  // d capped / d dot.
  TA_HOST_DEVICE Value capped_derivative(Value capped_value) const {
    if (softcap == 0) return Math::splat(scale);
    const Value t = capped_value * (1 / softcap);
    return (Math::splat(1) - t * t) * scale;
  }
  // d² capped / d dot².
  TA_HOST_DEVICE Value capped_second_derivative(Value capped_value) const {
    if (softcap == 0) return Math::splat(0);
    return capped_value * capped_derivative(capped_value) * (-2 * scale / (softcap * softcap));
  }
  // d score / d slope; the ALiBi term itself is this times slope.
  TA_HOST_DEVICE static Value alibi_derivative(Value key_minus_position) { return -Math::abs(key_minus_position); }
};

}  // namespace torch_attn

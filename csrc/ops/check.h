// The arguments' checks, on symbolic sizes: shared by every implementation of the operators (CPU, meta, composite), so
// that an error reads the same in eager mode, under torch.compile and under torch.func. Each error is one sentence that
// names the argument, what it was and what is allowed.
//
// RuntimeError for shapes, dtypes and devices, as torch's scaled_dot_product_attention raises; ValueError for a number
// or string out of its range.
#pragma once

#include <c10/core/SymIntArrayRef.h>

#include <string>

#include "core/problem.h"
#include "ops/arguments.h"

namespace torch_attn::ops {

void check_arguments(const ForwardArguments& arguments);
// What attention_backward takes beside the forward's arguments, which it checks as well.
void check_arguments(const BackwardArguments& arguments);
void check_arguments(const JvpArguments& arguments);
void check_arguments(const BackwardJvpArguments& arguments);
void check_arguments(const DropoutArguments& arguments);

// Expected is (batch..., heads, query_length, key_length).
void check_mask_broadcasts(const Tensor& attn_mask, c10::SymIntArrayRef expected);

// op: for the message.
void check_rng_state(const Tensor& state, const char* op);

bool has_shape(const Tensor& tensor, c10::SymIntArrayRef sizes);

Alignment parse_alignment(std::string_view name);

// For messages: "(2, 8, 5, 64)".
std::string shape_text(c10::SymIntArrayRef sizes);
std::string shape_text(const Tensor& tensor);

}  // namespace torch_attn::ops

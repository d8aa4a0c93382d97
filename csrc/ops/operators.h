// The operators with tensor arguments, as C++ types: kernel<f> turns a function of the argument struct into the flat
// signature that m.impl wants, call() goes the other way through the dispatcher. Included by every layer's file.
#pragma once

#include <torch/library.h>

#include "ops/arguments.h"

namespace torch_attn::ops {

template <class Self, class Arguments, class Result, class Types = typename Arguments::Types>
struct Operator;

template <class Self, class Arguments, class Result, class... Flat>
struct Operator<Self, Arguments, Result, TypeList<Flat...>> {
  template <Result (*function)(const Arguments&)>
  static Result kernel(Flat... flat) {
    return function(Arguments{flat...});
  }

  static Result call(const Arguments& arguments) {
    static const auto handle =
        c10::Dispatcher::singleton().findSchemaOrThrow(Self::name, "").template typed<Result(Flat...)>();
    return std::apply([](const auto&... flat) { return handle.call(flat...); }, arguments.flat());
  }
};

struct Attention : Operator<Attention, AttentionArguments, Tensor> {
  static constexpr const char* name = "torch_attn::attention";
};
struct AttentionWithLogsumexp : Operator<AttentionWithLogsumexp, AttentionArguments, std::tuple<Tensor, Tensor>> {
  static constexpr const char* name = "torch_attn::attention_with_logsumexp";
};
struct AttentionForward : Operator<AttentionForward, ForwardArguments, ForwardResult> {
  static constexpr const char* name = "torch_attn::attention_forward";
};
struct AttentionBackward : Operator<AttentionBackward, BackwardArguments, BackwardResult> {
  static constexpr const char* name = "torch_attn::attention_backward";
};
struct AttentionJvp : Operator<AttentionJvp, JvpArguments, JvpResult> {
  static constexpr const char* name = "torch_attn::attention_jvp";
};
struct AttentionBackwardJvp : Operator<AttentionBackwardJvp, BackwardJvpArguments, BackwardResult> {
  static constexpr const char* name = "torch_attn::attention_backward_jvp";
};
struct DropoutKeepMask : Operator<DropoutKeepMask, DropoutArguments, Tensor> {
  static constexpr const char* name = "torch_attn::dropout_keep_mask";
};

struct CudaTiers : Operator<CudaTiers, CudaTiersArguments, std::vector<std::string>> {
  static constexpr const char* name = "torch_attn::cuda_tiers";
};

}  // namespace torch_attn::ops

#include "ops/autograd/saved_call.h"

namespace torch_attn::ops {

namespace {

template <class Set>
void load(const AutogradContext& context, const char* name, const Set& set) {
  const auto entry = context.saved_data.find(name);
  if (entry != context.saved_data.end()) set(entry->second);
}

}  // namespace

void save_options(AutogradContext& context, const CallOptions& o) {
  auto& data = context.saved_data;
  if (o.dropout_p != 0) data["dropout_p"] = o.dropout_p;
  if (o.is_causal) data["is_causal"] = true;
  if (o.scale.has_value()) data["scale"] = *o.scale;
  if (o.window_left.has_value()) data["window_left"] = *o.window_left;
  if (o.window_right.has_value()) data["window_right"] = *o.window_right;
  if (parse_alignment(o.causal_alignment) == Alignment::kBottomRight) data["bottom_right"] = true;
  if (o.softcap != 0) data["softcap"] = o.softcap;
}

void save_options(AutogradContext& context, const Options& o) {
  save_options(context, static_cast<const CallOptions&>(o));
  if (o.max_seqlen_q.has_value()) context.saved_data["max_seqlen_q"] = *o.max_seqlen_q;
  if (o.max_seqlen_k.has_value()) context.saved_data["max_seqlen_k"] = *o.max_seqlen_k;
}

CallOptions saved_options(const AutogradContext& context, const variable_list& saved, const Tensor& key_lengths) {
  CallOptions o;
  load(context, "dropout_p", [&](const c10::IValue& v) { o.dropout_p = v.toDouble(); });
  load(context, "is_causal", [&](const c10::IValue& v) { o.is_causal = v.toBool(); });
  load(context, "scale", [&](const c10::IValue& v) { o.scale = v.toDouble(); });
  load(context, "window_left", [&](const c10::IValue& v) { o.window_left = v.toSymInt(); });
  load(context, "window_right", [&](const c10::IValue& v) { o.window_right = v.toSymInt(); });
  load(context, "bottom_right", [&](const c10::IValue&) { o.causal_alignment = "bottom_right"; });
  load(context, "softcap", [&](const c10::IValue& v) { o.softcap = v.toDouble(); });
  o.attn_mask = or_none(saved[kAttnMask]);
  o.alibi_slopes = or_none(saved[kAlibiSlopes]);
  o.sinks = or_none(saved[kSinks]);
  o.key_lengths = or_none(key_lengths);
  return o;
}

Options saved_options(const AutogradContext& context, const variable_list& saved,
                      variable_list::const_iterator indices) {
  Options o{saved_options(context, saved, indices[0])};
  o.cu_seqlens_q = or_none(indices[1]);
  o.cu_seqlens_k = or_none(indices[2]);
  load(context, "max_seqlen_q", [&](const c10::IValue& v) { o.max_seqlen_q = v.toSymInt(); });
  load(context, "max_seqlen_k", [&](const c10::IValue& v) { o.max_seqlen_k = v.toSymInt(); });
  return o;
}

}  // namespace torch_attn::ops

#include "ops/autograd/saved_call.h"

namespace torch_attn::ops {

void save_options(AutogradContext& context, const Options& o) {
  auto& data = context.saved_data;
  if (o.dropout_p != 0) data["dropout_p"] = o.dropout_p;
  if (o.is_causal) data["is_causal"] = true;
  if (o.scale.has_value()) data["scale"] = *o.scale;
  if (o.window_left.has_value()) data["window_left"] = *o.window_left;
  if (o.window_right.has_value()) data["window_right"] = *o.window_right;
  if (parse_alignment(o.causal_alignment) == Alignment::kBottomRight) data["bottom_right"] = true;
  if (o.softcap != 0) data["softcap"] = o.softcap;
}

Options saved_options(const AutogradContext& context, const variable_list& saved, const Tensor& key_lengths) {
  const auto& data = context.saved_data;
  Options o;
  const auto load = [&data](const char* name, auto&& set) {
    const auto entry = data.find(name);
    if (entry != data.end()) set(entry->second);
  };
  load("dropout_p", [&](const c10::IValue& v) { o.dropout_p = v.toDouble(); });
  load("is_causal", [&](const c10::IValue& v) { o.is_causal = v.toBool(); });
  load("scale", [&](const c10::IValue& v) { o.scale = v.toDouble(); });
  load("window_left", [&](const c10::IValue& v) { o.window_left = v.toSymInt(); });
  load("window_right", [&](const c10::IValue& v) { o.window_right = v.toSymInt(); });
  load("bottom_right", [&](const c10::IValue&) { o.causal_alignment = "bottom_right"; });
  load("softcap", [&](const c10::IValue& v) { o.softcap = v.toDouble(); });
  o.attn_mask = or_none(saved[kAttnMask]);
  o.alibi_slopes = or_none(saved[kAlibiSlopes]);
  o.sinks = or_none(saved[kSinks]);
  o.key_lengths = or_none(key_lengths);
  return o;
}

}  // namespace torch_attn::ops

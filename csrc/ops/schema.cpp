// The operators' schemas. A fragment, because torch.nn.attention.varlen registers operators of its own in the namespace
// torch_attn, before or after this library is loaded.
#include <torch/library.h>

#include <string>

namespace {

// Also the order of ops/arguments.h's CallOptions.
const std::string kMask = "Tensor? attn_mask=None, ";
const std::string kShaping =
    "bool is_causal=False, float? scale=None, SymInt? window_left=None, SymInt? window_right=None, "
    "str causal_alignment=\"top_left\", Tensor? alibi_slopes=None, float softcap=0.0, Tensor? sinks=None, "
    "Tensor? key_lengths=None";
const std::string kOptions = kMask + "float dropout_p=0.0, " + kShaping;
const std::string kScoreOptions = kMask + kShaping;  // without dropout; the order of ScoreOptions
// Where the rows of batch entries lie: the order of arguments.h's Options, after CallOptions. With cu_seqlens_q, query
// is (1, heads, all rows, head_dim); with cu_seqlens_k key and value are alike; with block_table they are
// (blocks, heads, block_size, dim).
const std::string kPlaces =
    ", Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
    "Tensor? block_table=None";
const std::string kPacked =
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, *, float dropout_p=0.0, " +
    kShaping + ", Tensor? block_table=None, bool enable_gqa=False";
const std::string kPaged =
    "Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor key_lengths, *, "
    "bool is_causal=False, float? scale=None, SymInt? window_left=None, SymInt? window_right=None, "
    "str causal_alignment=\"bottom_right\", Tensor? alibi_slopes=None, float softcap=0.0, Tensor? sinks=None, "
    "bool enable_gqa=False";
const std::string kMapInputs = "Tensor query, Tensor key, *, ";
const std::string kMapGradients =
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_attn_mask, Tensor grad_alibi_slopes, Tensor grad_sinks)";
const std::string kStatisticsOptions = ", int top_k=0, SymInt? mass_window=None, bool column_sum=True";
const std::string kStatistics =
    " -> (Tensor logsumexp, Tensor entropy, Tensor max_weight, Tensor argmax, Tensor mean_distance, "
    "Tensor window_mass, Tensor top_weights, Tensor top_indices, Tensor column_sum)";
const std::string kSelectedRows = "Tensor? query_rows=None, SymInt? query_length=None, bool mean=False";

const std::string kInputs = "Tensor query, Tensor key, Tensor value, *, ";
const std::string kTangents =
    "Tensor? tangent_query, Tensor? tangent_key, Tensor? tangent_value, Tensor? tangent_attn_mask, "
    "Tensor? tangent_alibi_slopes, Tensor? tangent_sinks";
const std::string kGradients =
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_attn_mask, Tensor grad_alibi_slopes, "
    "Tensor grad_sinks)";

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_attn, m) {
  const std::vector<at::Tag> pure = {at::Tag::pt2_compliant_tag};
  const std::vector<at::Tag> random = {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};
  const auto define = [&m](const std::string& schema, const std::vector<at::Tag>& tags) {
    m.def(schema.c_str(), tags);
  };

  // What users call: any leading dimensions, broadcasting, grouped-query attention on request.
  define("attention(" + kInputs + kOptions + ", bool enable_gqa=False) -> Tensor", random);
  define(
      "attention_with_logsumexp(" + kInputs + kOptions + ", bool enable_gqa=False) -> (Tensor out, Tensor logsumexp)",
      random);
  define(
      "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
      "float dropout_p=0.0, bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor",
      random);

  // qkv: (batch, length, 3, heads, head_dim), query, key and value as one projection leaves them.
  define("self_attention(Tensor qkv, *, " + kOptions + ") -> Tensor", random);
  define("self_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor logsumexp, Tensor rng_state, *, " +
             kOptions + ") -> Tensor grad_qkv",
         pure);

  // at::linear, which the module projects with; gradients that output_mask does not ask for are empty.
  define("projection(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", pure);
  define(
      "projection_backward(Tensor grad_out, Tensor? input, Tensor? weight, bool[3] output_mask) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      pure);

  define("varlen_attention(" + kPacked + ") -> Tensor", random);
  define("varlen_attention_with_logsumexp(" + kPacked + ") -> (Tensor out, Tensor logsumexp)", random);
  define("paged_attention(" + kPaged + ") -> Tensor", pure);
  define("paged_attention_with_logsumexp(" + kPaged + ") -> (Tensor out, Tensor logsumexp)", pure);

  // What kernels implement: four dimensions, (batch, head, row, column).
  define("attention_forward(" + kInputs + kOptions + kPlaces +
             ", Tensor? rng_state=None) -> (Tensor out, Tensor logsumexp, Tensor rng_state)",
         random);
  define(
      "attention_backward(Tensor grad_out, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor logsumexp, Tensor rng_state, *, " +
          kOptions + kPlaces + ", bool[6] output_mask)" + kGradients,
      pure);
  define("attention_jvp(Tensor query, Tensor key, Tensor value, Tensor rng_state, " + kTangents + ", *, " + kOptions +
             kPlaces + ") -> (Tensor out, Tensor logsumexp, Tensor tangent_out, Tensor tangent_logsumexp)",
         pure);
  define(
      "attention_backward_jvp(Tensor grad_out, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor logsumexp, Tensor rng_state, Tensor tangent_out, Tensor tangent_logsumexp, "
      "Tensor? tangent_grad_out, Tensor? tangent_grad_logsumexp, " +
          kTangents + ", *, " + kOptions + kPlaces + ", bool[6] output_mask)" + kGradients,
      pure);
  define(
      "dropout_keep_mask(Tensor rng_state, SymInt batch, SymInt heads, SymInt query_length, SymInt key_length, "
      "float dropout_p) -> Tensor",
      pure);

  // Attention maps: what users call, and what kernels implement.
  define("attention_weights(" + kMapInputs + kScoreOptions +
             ", Tensor? logsumexp=None, str heads=\"all\", Tensor? queries=None, bool enable_gqa=False) -> Tensor",
         pure);
  define("attention_weights.heads(" + kMapInputs + kScoreOptions +
             ", Tensor? logsumexp=None, int[] heads, Tensor? queries=None, bool enable_gqa=False) -> Tensor",
         pure);
  define("attention_statistics(" + kMapInputs + kScoreOptions + kStatisticsOptions + ", bool enable_gqa=False)" +
             kStatistics,
         pure);
  define("attention_weights_forward(" + kMapInputs + kScoreOptions + ", Tensor? logsumexp=None, " + kSelectedRows +
             ") -> (Tensor weights, Tensor logsumexp)",
         pure);
  define("attention_with_weights_forward(" + kInputs + kScoreOptions +
             ", bool mean=False) -> (Tensor out, Tensor weights, Tensor logsumexp)",
         pure);
  define("attention_weights_backward(Tensor grad_weights, Tensor query, Tensor key, Tensor logsumexp, *, " +
             kScoreOptions + ", " + kSelectedRows + ", bool[5] output_mask)" + kMapGradients,
         pure);
  define("attention_statistics_forward(" + kMapInputs + kScoreOptions + kStatisticsOptions + ")" + kStatistics, pure);
  define(
      "attention_statistics_backward(Tensor? grad_logsumexp, Tensor? grad_entropy, Tensor? grad_max_weight, "
      "Tensor? grad_mean_distance, Tensor? grad_window_mass, Tensor? grad_top_weights, Tensor? grad_column_sum, "
      "Tensor query, Tensor key, Tensor logsumexp, Tensor? entropy, Tensor? max_weight, Tensor? argmax, "
      "Tensor? mean_distance, Tensor? window_mass, Tensor? top_weights, Tensor? top_indices, *, " +
          kScoreOptions + ", SymInt? mass_window=None, bool[5] output_mask)" + kMapGradients,
      pure);

  // Hard attention: what users call, and what kernels implement.
  define("hard_attention(" + kInputs + kScoreOptions +
             ", str estimator=\"reinforce\", int num_samples=1, bool replacement=True, int k=1, "
             "float temperature=1.0, Generator? generator=None, bool enable_gqa=False)"
             " -> (Tensor output, Tensor indices, Tensor log_prob, Tensor entropy)",
         random);
  define("select_keys(Tensor query, Tensor key, *, " + kScoreOptions +
             ", int count=1, bool sample=False, bool replacement=False, Tensor? rng_state=None)"
             " -> (Tensor indices, Tensor scores, Tensor log_prob, Tensor entropy, Tensor logsumexp, Tensor rng_state)",
         random);
  define(
      "select_keys_backward(Tensor? grad_scores, Tensor? grad_log_prob, Tensor? grad_entropy, Tensor? grad_logsumexp, "
      "Tensor query, Tensor key, Tensor indices, Tensor entropy, Tensor logsumexp, *, " +
          kScoreOptions +
          ", bool[5] output_mask) -> (Tensor grad_query, Tensor grad_key, Tensor grad_attn_mask, "
          "Tensor grad_alibi_slopes, Tensor grad_sinks)",
      pure);
  define(
      "selection_noise(Tensor rng_state, SymInt batch, SymInt heads, SymInt query_length, SymInt key_length, int "
      "count, "
      "bool replacement, bool sink) -> Tensor",
      pure);

  // value (B, Hkv, S, Dv) by indices (B, Hq, R, count), weighted and summed over count: (B, Hq, R, Dv).
  define("gather_values(Tensor value, Tensor indices, Tensor? weights=None) -> Tensor", pure);
  define(
      "gather_values_backward(Tensor grad_out, Tensor value, Tensor indices, Tensor? weights, bool[2] output_mask)"
      " -> (Tensor grad_value, Tensor grad_weights)",
      pure);

  // About the library itself; implemented in info.cpp.
  define("build_info() -> str", {});
  define("cpu_isa() -> str", {});
  define("cpu_isas() -> str[]", {});
  define("force_cpu_isa(str isa) -> ()", {});
  define("kernel_calls() -> int", {});
  // "name", how it would serve the call, why it cannot: three strings for each tier; one of the last two is empty.
  define(
      "cuda_tiers(" + kInputs + kOptions +
          ", bool backward=False, int compute_capability=0, int multiprocessors=0, str operation='attention') -> str[]",
      {});
}

// AttentionProblem: one attention call as plain data. ops/make_problem.cpp fills it from tensors (and is the only place
// that does); every kernel, on the CPU and on CUDA, reads nothing else. No Torch type appears here or below core/.
#pragma once

#include <cstdint>

#include "macros.h"

namespace torch_attn {

enum class ScalarType : uint8_t { kFloat64, kFloat32, kBFloat16, kFloat16, kBool };

// A tensor of four dimensions, named (batch, head, row, column) throughout: query is (B, Hq, L, D), key (B, Hkv, S, D),
// value (B, Hkv, S, Dv), a mask (B, Hq, L, S). Strides count elements; a broadcast dimension has stride 0.
struct TensorView {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  ScalarType dtype = ScalarType::kFloat32;

  // A paged key or value: row i of batch entry b is row i % page_rows of the page pages[b · pages_stride +
  // i / page_rows], and stride[0] leads from page to page. Null: not paged. Forward kernels alone serve it.
  const int32_t* pages = nullptr;
  int64_t pages_stride = 0;
  int64_t page_rows = 0;

  TA_HOST_DEVICE bool defined() const { return data != nullptr; }
};

// "No bound" for a window: larger than any length, small enough that sums of two of them do not overflow.
constexpr int64_t kUnbounded = int64_t{1} << 60;

// Where row 0 of the query lies on the key axis: at key 0 (PyTorch's is_causal), or so that the last row meets the last
// valid key (a query that continues a key/value cache).
enum class Alignment : uint8_t { kTopLeft, kBottomRight };

// Every kernel requires: query, key and value of one dtype with column stride 1; Hq a multiple of Hkv; sizes ≥ 0.
// "Accumulator type" below is float64 for float64 inputs and float32 for all others.
struct AttentionProblem {
  int64_t batch = 0;
  int64_t heads = 0;     // Hq
  int64_t kv_heads = 0;  // Hkv; query head h reads key/value head h / (Hq / Hkv)
  int64_t query_length = 0;
  int64_t key_length = 0;
  int64_t head_dim = 0;
  int64_t value_dim = 0;
  ScalarType dtype = ScalarType::kFloat32;

  TensorView query, key, value;

  // score = softcap(scale · q·k) + alibi + attn_mask; see score_mod.h.
  double scale = 1.0;
  double softcap = 0.0;     // 0: off
  TensorView attn_mask;     // kBool (true: attend) or a floating dtype (added); undefined: none; any strides
  TensorView alibi_slopes;  // (batch, head) strides only, accumulator type; undefined: none
  TensorView sinks;         // the same: a logit per head that joins the softmax's sum

  // Which keys a row may attend; see mask.h. is_causal has been folded into window_right by make_problem.
  int64_t window_left = kUnbounded;
  int64_t window_right = kUnbounded;
  Alignment alignment = Alignment::kTopLeft;
  const int64_t* key_lengths = nullptr;  // (B), each in [0, S]; null: all are S

  // Packed sequences: query, and all that is laid out like it, holds the rows of all batch entries one after the other,
  // entry b's from query_starts[b] to query_starts[b + 1], and stride[0] is 0. query_length is then that of the longest
  // entry, and packed_rows counts all rows, those after the last entry too. Null: every entry has query_length rows.
  // Keys and values alike. The kernels of attention maps and hard attention do not serve such calls.
  const int64_t* query_starts = nullptr;  // (B + 1)
  const int64_t* key_starts = nullptr;    // (B + 1)
  int64_t packed_rows = 0;                // 0: query is not packed

  // Where query holds chosen rows of a longer one: row i is row query_rows[i] of full_query_length, in any order; the
  // mask's rows have been chosen alike. Null: query is whole. Only the kernels of attention maps serve such calls.
  const int64_t* query_rows = nullptr;
  int64_t full_query_length = 0;

  // See dropout.h: dropout_p is one of Dropout::rounded's. The seed and offset come from the op's rng_state.
  double dropout_p = 0.0;
  uint64_t philox_seed = 0;
  uint64_t philox_offset = 0;
  // On CUDA the numbers lie in device memory, so that a captured graph draws anew at each replay: then this points at
  // them (seed, offset, batches), and the fields of these names are not read. Always null on the CPU.
  const int64_t* rng_state = nullptr;
  int64_t dropout_batches = 0;  // bits repeat over the batch with this period; 0: each entry has its own

  // float32 products may round their operands to TF32 (10 bits of mantissa). Read on CUDA only.
  bool allow_tf32 = false;

  TA_HOST_DEVICE int64_t group_size() const { return kv_heads == 0 ? 1 : heads / kv_heads; }

  // One batch entry: how many rows and keys it has, and which of a packed tensor's rows is its first.
  TA_HOST_DEVICE int64_t queries_of(int64_t batch) const { return length_of(query_starts, query_length, batch); }
  TA_HOST_DEVICE int64_t keys_of(int64_t batch) const { return length_of(key_starts, key_length, batch); }
  TA_HOST_DEVICE int64_t first_query(int64_t batch) const { return query_starts ? query_starts[batch] : 0; }
  TA_HOST_DEVICE int64_t first_key(int64_t batch) const { return key_starts ? key_starts[batch] : 0; }

  // Where in logsumexp and its like, (B, Hq, L) or, of packed sequences, (Hq, packed_rows), the rows of a head start,
  // and how many numbers there are in all.
  TA_HOST_DEVICE int64_t first_row(int64_t batch, int64_t head) const {
    if (query_starts) return head * packed_rows + query_starts[batch];
    return (batch * heads + head) * (packed_rows > 0 ? packed_rows : query_length);
  }
  TA_HOST_DEVICE int64_t all_rows() const { return heads * (packed_rows > 0 ? packed_rows : batch * query_length); }

  // The batch_head that dropout.h's counter takes.
  TA_HOST_DEVICE int64_t dropout_batch_head(int64_t b, int64_t h) const {
    return (dropout_batches > 0 ? b % dropout_batches : b) * heads + h;
  }

 private:
  TA_HOST_DEVICE static int64_t length_of(const int64_t* starts, int64_t longest, int64_t batch) {
    if (starts == nullptr) return longest;
    const int64_t length = starts[batch + 1] - starts[batch];
    return length < longest ? length : longest;
  }
};

// What a forward kernel writes. logsumexp is (B, Hq, L) or, of packed sequences, (Hq, packed_rows), contiguous,
// accumulator type, and so is all that is said to be (B, Hq, L) below; out has column stride 1.
struct ForwardOutputs {
  TensorView out;
  void* logsumexp = nullptr;
};

// What a backward kernel reads beside the problem, and writes. Every gradient may be undefined: then it is not wanted.
// grad_out has column stride 1. grad_query, grad_key and grad_value are of the problem's dtype with column stride 1 and
// need no initialisation. grad_attn_mask (accumulator type) has the mask's own sizes: stride 0 marks a dimension over
// which the mask was broadcast and its gradient is summed. grad_alibi_slopes is (B, Hq), contiguous, accumulator type.
struct BackwardTensors {
  TensorView out, grad_out;
  const void* logsumexp = nullptr;       // (B, Hq, L), contiguous, accumulator type
  const void* grad_logsumexp = nullptr;  // the same; null: zero
  TensorView grad_query, grad_key, grad_value, grad_attn_mask;
  void* grad_alibi_slopes = nullptr;
  // The same bits in every run. If false, sums may be added in any order; read on CUDA only.
  bool deterministic = true;
};

// Forward-mode derivatives: the tangents of a call's differentiable inputs; an undefined one is zero. query, key and
// value are of the problem's dtype with column stride 1, attn_mask of any floating dtype with any strides, alibi_slopes
// and sinks of accumulator type with (batch, head) strides.
struct Tangents {
  TensorView query, key, value, attn_mask, alibi_slopes, sinks;
};

// What the tangent kernel of forward writes: forward's outputs and their tangents, laid out alike.
struct TangentForwardOutputs {
  TensorView out;
  void* logsumexp = nullptr;
  TensorView tangent_out;
  void* tangent_logsumexp = nullptr;
};

// The tangent kernel of backward reads what backward reads, and the tangents of it. Here the gradients of
// BackwardTensors are where their tangents are written, by the same conventions; grad_out's tangent has column
// stride 1.
struct TangentBackwardTensors : BackwardTensors {
  TensorView tangent_out;
  const void* tangent_logsumexp = nullptr;
  TensorView tangent_grad_out;                   // undefined: zero
  const void* tangent_grad_logsumexp = nullptr;  // null: zero
};

}  // namespace torch_attn

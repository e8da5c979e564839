// The parameters of linear attention over pieces of one rank's tokens as plain structs: the interface between
// the bindings and the kernel.
//
// A token acts on a state S, a K x V matrix for each head: S = (I - beta k k^T) diag(alpha) S + beta k v^T
// with the delta rule, and S = diag(alpha) S + k v^T without; its output is scale * S^T q.
#pragma once
#include "attention_params.h"

namespace mls {

struct LinearShape {
  int64_t tokens;                     // S, whole pieces
  int64_t piece;                      // tokens of a piece; divides S
  int64_t batch;                      // B
  int64_t heads;                      // H, of the outputs and of the states
  int64_t q_heads, k_heads, v_heads;  // each divides H: adjacent heads share one
  int64_t key_dim;                    // K
  int64_t value_dim;                  // V

  int64_t pieces() const { return tokens / piece; }
};

// The document of each token, ascending, and -1 for padding; null: one document without an end.
struct DocumentIds {
  const int64_t* of_token;  // (rows, S)
  const int64_t* before;    // (rows), of the token before the first
  int64_t row_stride;       // 0 if all rows of the batch are alike
  int64_t before_stride;
};

// A result (tokens, batch, heads, dim): in fp32, or rounded to the inputs' type.
struct LinearResult {
  TokenTensor<float> exact;
  TokenTensor<uint16_t> rounded;
};

// Tensors of states are contiguous, (pieces, B, H, rows, columns), fp32. Those that an operation does not use
// are null.
struct LinearParams {
  LinearShape shape;
  ElementType element_type;
  TokenTensor<const void> q, k, v;
  TokenTensor<const float> log_decay;  // null: nothing decays
  bool decays_channels;                // one number for each channel of K, not for each head
  TokenTensor<const float> beta;       // null: no delta rule
  DocumentIds documents;
  float scale;
  float* transition;    // of the pieces: a number, a diagonal or, with the delta rule, a matrix
  float* write;         // K x V, the states behind pieces that are entered with zero
  const float* states;  // K x V, that enter the pieces
  LinearResult out;
  TokenTensor<const void> dout;
  float* gives;         // K x V, gradients of the entering states by the pieces' own outputs
  const float* behind;  // K x V, gradients of the states behind the pieces
  LinearResult dq, dk, dv;
  TokenTensor<float> dlog_decay, dbeta;
};

}  // namespace mls

// torch.ops.mls.linear_*: schemas and argument checks of linear attention.
//
// S = tokens, n = pieces, B = batch, H = heads of the output, K, V = head dims.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/linear/run.h"
#include "linear_params.h"
#include "tensor_checks.h"

namespace mls {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The arguments that all operations share, in the order of the schemas.
struct Inputs {
  const Tensor &q, &k, &v;
  const OptionalTensor &log_decay, &beta, &documents, &before;
  int64_t piece, heads;
  double scale;
};

void check_heads(const char* name, const Tensor& t, int64_t heads) {
  MLS_CHECK(t.size(2) > 0 && heads > 0 && heads % t.size(2) == 0, name, " has ", t.size(2),
            " heads: they must divide the ", heads, " heads of the output.");
}

LinearShape check_shape_of(const Inputs& in) {
  MLS_CHECK(in.q.dim() == 4, "q has shape ", shape_text(in.q),
            ": it must have 4 dimensions (S, B, heads, K).");
  MLS_CHECK(in.k.dim() == 4, "k has shape ", shape_text(in.k),
            ": it must have 4 dimensions (S, B, heads, K).");
  MLS_CHECK(in.v.dim() == 4, "v has shape ", shape_text(in.v),
            ": it must have 4 dimensions (S, B, heads, V).");
  const int64_t tokens = in.q.size(0), batch = in.q.size(1), key_dim = in.q.size(3);
  const LinearShape shape{tokens,       in.piece,     batch,   in.heads,    in.q.size(2),
                          in.k.size(2), in.v.size(2), key_dim, in.v.size(3)};
  check_tokens("k", in.k, kCpu, {tokens, batch, shape.k_heads, key_dim}, "(S, B, heads, K)");
  check_tokens("v", in.v, kCpu, {tokens, batch, shape.v_heads, shape.value_dim}, "(S, B, heads, V)");
  check_device("q", in.q, kCpu), check_last_dim("q", in.q);
  check_heads("q", in.q, in.heads), check_heads("k", in.k, in.heads), check_heads("v", in.v, in.heads);
  MLS_CHECK(key_dim > 0 && shape.value_dim > 0, "head dims are K = ", key_dim, ", V = ", shape.value_dim,
            ": both must be at least 1.");
  MLS_CHECK(in.piece > 0 && tokens % in.piece == 0, "piece is ", in.piece, " and S is ", tokens,
            ": pieces must be whole, of at least one token.");
  check_element_type("q", in.q.scalar_type(), kCpu);
  check_dtype("k", in.k, in.q.scalar_type(), ", the dtype of q");
  check_dtype("v", in.v, in.q.scalar_type(), ", the dtype of q");
  return shape;
}

// A gate as (tokens, batch, heads, 1 or K).
TokenTensor<const float> check_gate(const char* name, const OptionalTensor& gate, const LinearShape& s,
                                    bool of_channels) {
  if (!gate.has_value()) return {};
  if (of_channels) {
    check_tokens(name, *gate, kCpu, {s.tokens, s.batch, s.heads, s.key_dim}, "(S, B, H, K)");
  } else {
    check_shape(name, *gate, {s.tokens, s.batch, s.heads}, "(S, B, H)");
    check_device(name, *gate, kCpu);
  }
  check_dtype(name, *gate, ScalarType::Float, "");
  return token_tensor<const float>(*gate);
}

DocumentIds check_documents(const Inputs& in, const LinearShape& s) {
  MLS_CHECK(in.documents.has_value() == in.before.has_value(),
            "documents and before are given one without the other: give both or none.");
  if (!in.documents.has_value()) return {};
  const Tensor &ids = *in.documents, &before = *in.before;
  const int64_t rows = ids.dim() > 0 ? ids.size(0) : 0;
  MLS_CHECK(rows == 1 || rows == s.batch, "documents has shape ", shape_text(ids),
            ": it must have one row for all rows of the batch, or ", s.batch, ".");
  check_shape("documents", ids, {rows, s.tokens}, "(1 or B, S)");
  check_shape("before", before, {rows}, "(rows of documents)");
  check_dtype("documents", ids, ScalarType::Long, ""), check_dtype("before", before, ScalarType::Long, "");
  check_device("documents", ids, kCpu), check_device("before", before, kCpu);
  MLS_CHECK(s.tokens < 2 || ids.stride(1) == 1, "documents has stride ", ids.stride(1),
            " in its last dimension: it must be contiguous there (stride 1).");
  const bool each = rows > 1;
  return {static_cast<const int64_t*>(ids.data_ptr()), static_cast<const int64_t*>(before.data_ptr()),
          each ? ids.stride(0) : 0, each ? before.stride(0) : 0};
}

LinearParams linear_params(const Inputs& in) {
  LinearParams params{};
  params.shape = check_shape_of(in);
  params.element_type = element_type(in.q);
  params.q = token_tensor<const void>(in.q);
  params.k = token_tensor<const void>(in.k);
  params.v = token_tensor<const void>(in.v);
  params.decays_channels = in.log_decay.has_value() && in.log_decay->dim() == 4;
  params.log_decay = check_gate("log_decay", in.log_decay, params.shape, params.decays_channels);
  params.beta = check_gate("beta", in.beta, params.shape, false);
  params.documents = check_documents(in, params.shape);
  MLS_CHECK(std::isfinite(in.scale) && in.scale > 0, "scale is ", in.scale,
            ": it must be finite and above 0.");
  params.scale = static_cast<float>(in.scale);
  return params;
}

// States or maps of pieces: (n, B, H, rows, columns).
float* state_data(const char* name, const Tensor& t, const LinearShape& s, int64_t rows, int64_t columns) {
  check_shape(name, t, {s.pieces(), s.batch, s.heads, rows, columns}, "(n, B, H, rows, columns)");
  check_dtype(name, t, ScalarType::Float, ", the accumulator dtype");
  check_device(name, t, kCpu);
  MLS_CHECK(t.is_contiguous(), name, " is strided: it must be contiguous.");
  return static_cast<float*>(t.data_ptr());
}

float* state_data(const char* name, const Tensor& t, const LinearShape& s) {
  return state_data(name, t, s, s.key_dim, s.value_dim);
}

// The gradient of an input, or the output: in the inputs' dtype, or in fp32, which shared heads add up in.
LinearResult result(const char* name, const Tensor& t, const Tensor& q, const LinearShape& s, int64_t heads,
                    int64_t dim) {
  check_tokens(name, t, kCpu, {s.tokens, s.batch, heads, dim}, "(S, B, heads, head dim)");
  const bool rounds = t.scalar_type() != ScalarType::Float;
  if (rounds) check_dtype(name, t, q.scalar_type(), ", the dtype of q, or float32");
  MLS_CHECK(!rounds || heads == s.heads, name, " is ", dtype_text(t.scalar_type()),
            ": gradients of shared heads are added up in float32.");
  return {sums(t, rounds), rounded(t, rounds)};
}

TokenTensor<float> gate_gradient(const char* name, const OptionalTensor& gradient, const OptionalTensor& gate,
                                 const LinearShape& s, bool of_channels) {
  MLS_CHECK(gradient.has_value() == gate.has_value(), name,
            ": it must be given if the gate is, and only then.");
  const TokenTensor<const float> t = check_gate(name, gradient, s, of_channels);
  return {const_cast<float*>(t.data), t.token_stride, t.batch_stride, t.head_stride};
}

TokenTensor<const void> check_dout(const Tensor& dout, const Tensor& q, const LinearShape& s) {
  check_tokens("dout", dout, kCpu, {s.tokens, s.batch, s.heads, s.value_dim}, "(S, B, H, V)");
  check_dtype("dout", dout, q.scalar_type(), ", the dtype of q");
  return token_tensor<const void>(dout);
}

void summarise(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor log_decay,
               OptionalTensor beta, OptionalTensor documents, OptionalTensor before, int64_t piece,
               int64_t heads, double scale, Tensor transition, Tensor write) {
  LinearParams params = linear_params({q, k, v, log_decay, beta, documents, before, piece, heads, scale});
  const LinearShape& s = params.shape;
  const bool matrix = params.beta.data != nullptr;
  const int64_t rows = matrix || params.decays_channels ? s.key_dim : 1;
  params.transition = state_data("transition", transition, s, rows, matrix ? s.key_dim : 1);
  params.write = state_data("write", write, s);
  cpu::run_linear(params, cpu::LinearOperation::kSummarise);
}

void forward(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor log_decay, OptionalTensor beta,
             OptionalTensor documents, OptionalTensor before, int64_t piece, int64_t heads, double scale,
             const Tensor& states, Tensor out) {
  LinearParams params = linear_params({q, k, v, log_decay, beta, documents, before, piece, heads, scale});
  const LinearShape& s = params.shape;
  params.states = state_data("states", states, s);
  params.out = result("out", out, q, s, s.heads, s.value_dim);
  cpu::run_linear(params, cpu::LinearOperation::kForward);
}

void summarise_backward(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor log_decay,
                        OptionalTensor beta, OptionalTensor documents, OptionalTensor before, int64_t piece,
                        int64_t heads, double scale, const Tensor& dout, Tensor gives) {
  LinearParams params = linear_params({q, k, v, log_decay, beta, documents, before, piece, heads, scale});
  params.dout = check_dout(dout, q, params.shape);
  params.gives = state_data("gives", gives, params.shape);
  cpu::run_linear(params, cpu::LinearOperation::kSummariseBackward);
}

void backward(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor log_decay,
              OptionalTensor beta, OptionalTensor documents, OptionalTensor before, int64_t piece,
              int64_t heads, double scale, const Tensor& dout, const Tensor& states, const Tensor& behind,
              Tensor dq, Tensor dk, Tensor dv, OptionalTensor dlog_decay, OptionalTensor dbeta) {
  LinearParams params = linear_params({q, k, v, log_decay, beta, documents, before, piece, heads, scale});
  const LinearShape& s = params.shape;
  params.dout = check_dout(dout, q, s);
  params.states = state_data("states", states, s);
  params.behind = state_data("behind", behind, s);
  params.dq = result("dq", dq, q, s, s.q_heads, s.key_dim);
  params.dk = result("dk", dk, q, s, s.k_heads, s.key_dim);
  params.dv = result("dv", dv, q, s, s.v_heads, s.value_dim);
  params.dlog_decay = gate_gradient("dlog_decay", dlog_decay, log_decay, s, params.decays_channels);
  params.dbeta = gate_gradient("dbeta", dbeta, beta, s, false);
  cpu::run_linear(params, cpu::LinearOperation::kBackward);
}

}  // namespace
}  // namespace mls

#define MLS_LINEAR_INPUTS                                                                                  \
  "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor? documents, Tensor? before, int " \
  "piece, int heads, float scale, "

STABLE_TORCH_LIBRARY_FRAGMENT(mls, m) {
  m.def("linear_summarise(" MLS_LINEAR_INPUTS "Tensor(a!) transition, Tensor(b!) write) -> ()");
  m.def("linear_forward(" MLS_LINEAR_INPUTS "Tensor states, Tensor(a!) out) -> ()");
  m.def("linear_summarise_backward(" MLS_LINEAR_INPUTS "Tensor dout, Tensor(a!) gives) -> ()");
  m.def("linear_backward(" MLS_LINEAR_INPUTS
        "Tensor dout, Tensor states, Tensor behind, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? "
        "dlog_decay, Tensor(e!)? dbeta) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mls, CPU, m) {
  m.impl("linear_summarise", TORCH_BOX(&mls::summarise));
  m.impl("linear_forward", TORCH_BOX(&mls::forward));
  m.impl("linear_summarise_backward", TORCH_BOX(&mls::summarise_backward));
  m.impl("linear_backward", TORCH_BOX(&mls::backward));
}

// torch.ops.mls.*: schemas and argument checks, on torch's stable ABI, so that one build works with later
// versions.
//
// S = tokens (Sq queries, Sk keys), B = batch, H = query heads, G = key/value heads, D, Dv = head dims.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "attention_params.h"
#include "checks.h"
#include "cpu/run.h"
#include "tensor_checks.h"
#if defined(MLS_WITH_CUDA)
#include "cuda/run.h"
#endif

namespace mls {

extern const char* const kSourceHash;  // of which sources; setup.py writes the file that defines it

namespace {

AttentionShape check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, Device device) {
  MLS_CHECK(q.dim() == 4, "q has shape ", shape_text(q), ": it must have 4 dimensions (Sq, B, H, D).");
  MLS_CHECK(k.dim() == 4, "k has shape ", shape_text(k), ": it must have 4 dimensions (Sk, B, G, D).");
  MLS_CHECK(v.dim() == 4, "v has shape ", shape_text(v), ": it must have 4 dimensions (Sk, B, G, Dv).");
  const AttentionShape shape{q.size(0), k.size(0), q.size(1), q.size(2), k.size(2), q.size(3), v.size(3)};
  check_shape("k", k, {shape.num_keys, shape.batch, shape.num_kv_heads, shape.head_dim}, "(Sk, B, G, D)");
  check_shape("v", v, {shape.num_keys, shape.batch, shape.num_kv_heads, shape.value_dim}, "(Sk, B, G, Dv)");
  MLS_CHECK(shape.num_kv_heads > 0 && shape.num_heads > 0 && shape.num_heads % shape.num_kv_heads == 0,
            "q has ", shape.num_heads, " heads and k has ", shape.num_kv_heads,
            ": key/value heads must divide query heads, both at least 1.");
  MLS_CHECK(shape.head_dim > 0 && shape.value_dim > 0, "head dims are D = ", shape.head_dim,
            ", Dv = ", shape.value_dim, ": both must be at least 1.");
  constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
  MLS_CHECK(shape.num_queries < kMaxTokens && shape.num_keys < kMaxTokens, "Sq = ", shape.num_queries,
            ", Sk = ", shape.num_keys, ": key indices are 32-bit, so both must be below ", kMaxTokens, ".");
  const ScalarType dtype = q.scalar_type();
  check_element_type("q", dtype, device);
  check_dtype("k", k, dtype, ", the dtype of q");
  check_dtype("v", v, dtype, ", the dtype of q");
  check_device("q", q, device), check_device("k", k, device), check_device("v", v, device);
  check_last_dim("q", q), check_last_dim("k", k), check_last_dim("v", v);
  return shape;
}

KeyMask check_mask(const AttentionShape& shape, int64_t band_lo, int64_t band_hi,
                   const std::optional<Tensor>& key_ranges, Device device) {
  KeyMask mask{std::clamp(band_lo, -shape.num_queries - 1, shape.num_keys),
               std::clamp(band_hi, -shape.num_queries - 1, shape.num_keys), nullptr, nullptr};
  if (key_ranges.has_value()) {
    check_shape("key_ranges", *key_ranges, {2, shape.num_queries}, "(2, Sq)");
    check_dtype("key_ranges", *key_ranges, ScalarType::Int, "");
    check_device("key_ranges", *key_ranges, device);
    MLS_CHECK(key_ranges->is_contiguous(), "key_ranges is strided: it must be contiguous.");
    mask.range_begin = static_cast<const int32_t*>(key_ranges->data_ptr());
    mask.range_end = mask.range_begin + shape.num_queries;
  }
  return mask;
}

float check_scale(double scale) {
  MLS_CHECK(std::isfinite(scale) && scale > 0, "softmax_scale is ", scale,
            ": it must be finite and above 0.");
  return static_cast<float>(scale);
}

float check_softcap(double softcap) {
  MLS_CHECK(std::isfinite(softcap) && softcap >= 0, "softcap is ", softcap,
            ": it must be finite, and 0 or above.");
  return static_cast<float>(softcap);
}

template <typename T>
RowTensor<T> row_tensor(const Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// Whether a result is final, to be rounded by the kernel to q's dtype; otherwise it is an fp32 accumulator.
bool is_final(const Tensor& q, const Tensor& result, bool accumulate) {
  const ScalarType dtype = q.scalar_type();
  return !accumulate && dtype != ScalarType::Float && result.scalar_type() == dtype;
}

void check_result_dtype(const char* name, const Tensor& q, const Tensor& result, bool is_rounded) {
  if (is_rounded) {
    check_dtype(name, result, q.scalar_type(), ", the dtype of the call's other results");
  } else {
    check_dtype(name, result, ScalarType::Float, ", the accumulator dtype");
  }
}

template <typename T>
RowTensor<T> row_accumulator(const char* name, const Tensor& t, Device device, const AttentionShape& shape) {
  check_shape(name, t, {shape.batch, shape.num_heads, shape.num_queries}, "(B, H, Sq)");
  check_dtype(name, t, ScalarType::Float, ", the accumulator dtype");
  check_device(name, t, device);
  return row_tensor<T>(t);
}

struct MaskArguments {
  int64_t band_lo, band_hi;
  const std::optional<Tensor>& key_ranges;
  double softmax_scale, softcap;
};

ForwardParams forward_params(Device device, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& out, const Tensor& lse, const MaskArguments& mask,
                             bool accumulate) {
  const AttentionShape s = check_inputs(q, k, v, device);
  check_tokens("out", out, device, {s.num_queries, s.batch, s.num_heads, s.value_dim}, "(Sq, B, H, Dv)");
  const bool rounds = is_final(q, out, accumulate);
  check_result_dtype("out", q, out, rounds);
  return {
      .shape = s,
      .element_type = element_type(q),
      .q = token_tensor<const void>(q),
      .k = token_tensor<const void>(k),
      .v = token_tensor<const void>(v),
      .out = sums(out, rounds),
      .lse = row_accumulator<float>("lse", lse, device, s),
      .mask = check_mask(s, mask.band_lo, mask.band_hi, mask.key_ranges, device),
      .softmax_scale = check_scale(mask.softmax_scale),
      .softcap = check_softcap(mask.softcap),
      .accumulate = accumulate,
      .rounded_out = rounded(out, rounds),
  };
}

// The tensors of a backward call, in the order of the schema.
struct BackwardTensors {
  const Tensor &dout, &q, &k, &v, &lse, &delta, &dq, &dk, &dv;
};

BackwardParams backward_params(Device device, const BackwardTensors& t, const MaskArguments& mask,
                               bool accumulate) {
  const AttentionShape s = check_inputs(t.q, t.k, t.v, device);
  check_tokens("dout", t.dout, device, {s.num_queries, s.batch, s.num_heads, s.value_dim}, "(Sq, B, H, Dv)");
  check_dtype("dout", t.dout, t.q.scalar_type(), ", the dtype of q");
  check_tokens("dq", t.dq, device, {s.num_queries, s.batch, s.num_heads, s.head_dim}, "(Sq, B, H, D)");
  check_tokens("dk", t.dk, device, {s.num_keys, s.batch, s.num_kv_heads, s.head_dim}, "(Sk, B, G, D)");
  check_tokens("dv", t.dv, device, {s.num_keys, s.batch, s.num_kv_heads, s.value_dim}, "(Sk, B, G, Dv)");
  // On CUDA each result is rounded or not independently; on the CPU either all results are or none.
  const bool rounds_dq = is_final(t.q, t.dq, accumulate);
  const bool rounds_dk = device.is_cuda ? is_final(t.q, t.dk, accumulate) : rounds_dq;
  const bool rounds_dv = device.is_cuda ? is_final(t.q, t.dv, accumulate) : rounds_dq;
  check_result_dtype("dq", t.q, t.dq, rounds_dq), check_result_dtype("dk", t.q, t.dk, rounds_dk);
  check_result_dtype("dv", t.q, t.dv, rounds_dv);
  return {
      .shape = s,
      .element_type = element_type(t.q),
      .dout = token_tensor<const void>(t.dout),
      .q = token_tensor<const void>(t.q),
      .k = token_tensor<const void>(t.k),
      .v = token_tensor<const void>(t.v),
      .lse = row_accumulator<const float>("lse", t.lse, device, s),
      .delta = row_accumulator<const float>("delta", t.delta, device, s),
      .dq = sums(t.dq, rounds_dq),
      .dk = sums(t.dk, rounds_dk),
      .dv = sums(t.dv, rounds_dv),
      .mask = check_mask(s, mask.band_lo, mask.band_hi, mask.key_ranges, device),
      .softmax_scale = check_scale(mask.softmax_scale),
      .softcap = check_softcap(mask.softcap),
      .accumulate = accumulate,
      .rounded_dq = rounded(t.dq, rounds_dq),
      .rounded_dk = rounded(t.dk, rounds_dk),
      .rounded_dv = rounded(t.dv, rounds_dv),
  };
}

// out and dout may have different types: out may still be the fp32 accumulator.
DeltaParams delta_params(Device device, const Tensor& out, const Tensor& dout, const Tensor& delta) {
  MLS_CHECK(out.dim() == 4, "out has shape ", shape_text(out), ": it must have 4 dimensions (Sq, B, H, Dv).");
  const int64_t tokens = out.size(0), batch = out.size(1), heads = out.size(2), value_dim = out.size(3);
  check_device("out", out, device), check_last_dim("out", out);
  check_tokens("dout", dout, device, {tokens, batch, heads, value_dim}, "(Sq, B, H, Dv)");
  check_element_type("dout", dout.scalar_type(), device);
  if (!device.is_cuda || out.scalar_type() != ScalarType::Float)
    check_element_type("out", out.scalar_type(), device);
  return {
      .num_queries = tokens,
      .batch = batch,
      .num_heads = heads,
      .value_dim = value_dim,
      .out_type = element_type(out),
      .dout_type = element_type(dout),
      .out = token_tensor<const void>(out),
      .dout = token_tensor<const void>(dout),
      .delta = row_accumulator<float>("delta", delta, device, {tokens, 0, batch, heads, 0, 0, value_dim}),
  };
}

// The CPU kernel has no streams and is always deterministic, so it ignores the last arguments.
void cpu_forward(const Tensor& q, const Tensor& k, const Tensor& v, Tensor out, Tensor lse, int64_t band_lo,
                 int64_t band_hi, std::optional<Tensor> key_ranges, double softmax_scale, bool accumulate,
                 int64_t /*stream*/, double softcap) {
  cpu::run_forward(forward_params(kCpu, q, k, v, out, lse,
                                  {band_lo, band_hi, key_ranges, softmax_scale, softcap}, accumulate));
}

void cpu_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
                  const Tensor& delta, Tensor dq, Tensor dk, Tensor dv, int64_t band_lo, int64_t band_hi,
                  std::optional<Tensor> key_ranges, double softmax_scale, bool accumulate, int64_t /*stream*/,
                  bool /*deterministic*/, int64_t /*head_parts*/, double softcap) {
  cpu::run_backward(backward_params(kCpu, {dout, q, k, v, lse, delta, dq, dk, dv},
                                    {band_lo, band_hi, key_ranges, softmax_scale, softcap}, accumulate));
}

void cpu_delta(const Tensor& out, const Tensor& dout, Tensor delta, int64_t /*stream*/) {
  cpu::run_delta(delta_params(kCpu, out, dout, delta));
}

MergeParams merge_params(const Tensor& out, const Tensor& lse, const Tensor& other_out,
                         const Tensor& other_lse) {
  MLS_CHECK(out.dim() == 4, "out has shape ", shape_text(out), ": it must have 4 dimensions (Sq, B, H, Dv).");
  const int64_t tokens = out.size(0), batch = out.size(1), heads = out.size(2), value_dim = out.size(3);
  check_device("out", out, kCpu), check_last_dim("out", out);
  check_tokens("other_out", other_out, kCpu, {tokens, batch, heads, value_dim}, "(Sq, B, H, Dv)");
  check_dtype("out", out, ScalarType::Float, ", the accumulator dtype");
  check_dtype("other_out", other_out, ScalarType::Float, ", the accumulator dtype");
  const AttentionShape shape{tokens, 0, batch, heads, 0, 0, value_dim};
  return {
      .num_queries = tokens,
      .batch = batch,
      .num_heads = heads,
      .value_dim = value_dim,
      .out = token_tensor<float>(out),
      .lse = row_accumulator<float>("lse", lse, kCpu, shape),
      .other_out = token_tensor<const float>(other_out),
      .other_lse = row_accumulator<const float>("other_lse", other_lse, kCpu, shape),
  };
}

void cpu_merge(Tensor out, Tensor lse, const Tensor& other_out, const Tensor& other_lse) {
  cpu::run_merge(merge_params(out, lse, other_out, other_lse));
}

#if defined(MLS_WITH_CUDA)

Device gpu_of(const Tensor& tensor) {
  return {true, tensor.get_device_index()};
}

void check_launch(const char* failure) {
  MLS_CHECK(failure == nullptr, "the CUDA attention kernel was not started: ", failure, ".");
}

void* stream_handle(int64_t stream) {
  return reinterpret_cast<void*>(static_cast<intptr_t>(stream));
}

void cuda_forward(const Tensor& q, const Tensor& k, const Tensor& v, Tensor out, Tensor lse, int64_t band_lo,
                  int64_t band_hi, std::optional<Tensor> key_ranges, double softmax_scale, bool accumulate,
                  int64_t stream, double softcap) {
  const ForwardParams params = forward_params(
      gpu_of(q), q, k, v, out, lse, {band_lo, band_hi, key_ranges, softmax_scale, softcap}, accumulate);
  check_launch(mls_cuda_forward(&params, stream_handle(stream)));
}

void cuda_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
                   const Tensor& delta, Tensor dq, Tensor dk, Tensor dv, int64_t band_lo, int64_t band_hi,
                   std::optional<Tensor> key_ranges, double softmax_scale, bool accumulate, int64_t stream,
                   bool deterministic, int64_t head_parts, double softcap) {
  const BackwardParams params =
      backward_params(gpu_of(q), {dout, q, k, v, lse, delta, dq, dk, dv},
                      {band_lo, band_hi, key_ranges, softmax_scale, softcap}, accumulate);
  const cuda::BackwardOptions options{deterministic, static_cast<int>(head_parts)};
  check_launch(mls_cuda_backward(&params, &options, stream_handle(stream)));
}

void cuda_delta(const Tensor& out, const Tensor& dout, Tensor delta, int64_t stream) {
  const DeltaParams params = delta_params(gpu_of(out), out, dout, delta);
  check_launch(mls_cuda_delta(&params, stream_handle(stream)));
}

PyObject* cuda_fallback(PyObject*, PyObject*) {
  const char* reason = mls_cuda_fallback();
  if (reason == nullptr) Py_RETURN_NONE;
  return PyUnicode_FromString(reason);
}

PyMethodDef kFunctions[] = {
    {"cuda_fallback", cuda_fallback, METH_NOARGS,
     "Why the last CUDA call of this thread used a slower kernel than the GPU supports. None if it did not, "
     "or if that was already reported."},
    {nullptr, nullptr, 0, nullptr}};

#else

PyMethodDef kFunctions[] = {{nullptr, nullptr, 0, nullptr}};

#endif

}  // namespace
}  // namespace mls

// `stream` is a cudaStream_t of the current device, as an integer; `deterministic` requests a bitwise
// reproducible dq. Only the CUDA kernel uses them.
STABLE_TORCH_LIBRARY(mls, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, int band_lo, int "
      "band_hi, Tensor? key_ranges, float softmax_scale, bool accumulate, int stream=0, float softcap=0.0) "
      "-> ()");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, Tensor(a!) "
      "dq, Tensor(b!) dk, Tensor(c!) dv, int band_lo, int band_hi, Tensor? key_ranges, float softmax_scale, "
      "bool "
      "accumulate, int stream=0, bool deterministic=False, int head_parts=1, float softcap=0.0) -> ()");
  m.def("attention_delta(Tensor out, Tensor dout, Tensor(a!) delta, int stream=0) -> ()");
  m.def("merge_partials(Tensor(a!) out, Tensor(b!) lse, Tensor other_out, Tensor other_lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mls, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&mls::cpu_forward));
  m.impl("attention_backward", TORCH_BOX(&mls::cpu_backward));
  m.impl("attention_delta", TORCH_BOX(&mls::cpu_delta));
  m.impl("merge_partials", TORCH_BOX(&mls::cpu_merge));
}

#if defined(MLS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(mls, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&mls::cuda_forward));
  m.impl("attention_backward", TORCH_BOX(&mls::cuda_backward));
  m.impl("attention_delta", TORCH_BOX(&mls::cuda_delta));
}
#endif

// Importing the module runs the registrations above. Its attributes state what was built and which variant
// was selected.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, mls::kFunctions, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  try {
    PyModule_AddStringConstant(module, "cpu_isa", mls::cpu::isa_name());
    PyModule_AddStringConstant(module, "source_hash", mls::kSourceHash);
  } catch (const std::exception& error) {
    Py_DECREF(module);
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
#if defined(MLS_WITH_CUDA)
  PyModule_AddIntConstant(module, "with_cuda", 1);
  PyModule_AddStringConstant(module, "cuda_archs", MLS_CUDA_ARCHS);
#else
  PyModule_AddIntConstant(module, "with_cuda", 0);
#endif
  return module;
}

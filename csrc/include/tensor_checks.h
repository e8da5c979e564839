// Checks of the tensors of a call, and their conversion to the structs that kernels take.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>

#include "attention_params.h"
#include "checks.h"

namespace mls {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + ")";
}

inline const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> want,
                        const char* axes) {
  bool equal = tensor.dim() == static_cast<int64_t>(want.size());
  std::string text = "(";
  int64_t d = 0;
  for (int64_t size : want) {
    equal = equal && tensor.size(d) == size;
    text += (d++ ? ", " : "") + std::to_string(size);
  }
  MLS_CHECK(equal, name, " has shape ", shape_text(tensor), ": it must be ", axes, " = ", text, ").");
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType want, const char* why) {
  MLS_CHECK(tensor.scalar_type() == want, name, " is ", dtype_text(tensor.scalar_type()), ": it must be ",
            dtype_text(want), why, ".");
}

// The device of all tensors of a call.
struct Device {
  bool is_cuda;
  int32_t index;  // which GPU
};

constexpr Device kCpu{false, 0};

inline void check_device(const char* name, const Tensor& tensor, Device device) {
  MLS_CHECK(device.is_cuda ? tensor.is_cuda() : tensor.is_cpu(), name, " is not on the ",
            device.is_cuda ? "GPU" : "CPU", ": all tensors of a call must be on one device.");
  MLS_CHECK(!device.is_cuda || tensor.get_device_index() == device.index, name, " is on GPU ",
            tensor.get_device_index(), " and q on GPU ", device.index,
            ": all tensors of a call must be on one device.");
}

inline void check_element_type(const char* name, ScalarType dtype, Device device) {
  if (!device.is_cuda) {
    MLS_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name, " is ", dtype_text(dtype),
              ": the fused kernel takes float32 or bfloat16.");
  } else {
    MLS_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, name, " is ", dtype_text(dtype),
              ": the CUDA kernel takes float16 or bfloat16.");
  }
}

inline void check_last_dim(const char* name, const Tensor& tensor) {
  MLS_CHECK(tensor.size(3) == 1 || tensor.stride(3) == 1, name, " has stride ", tensor.stride(3),
            " in its last dimension: it must be contiguous there (stride 1).");
}

// Checks a tensor of tokens and heads; all strides but the last are free.
inline void check_tokens(const char* name, const Tensor& t, Device device,
                         std::initializer_list<int64_t> want, const char* axes) {
  check_shape(name, t, want, axes);
  check_device(name, t, device);
  check_last_dim(name, t);
}

inline ElementType element_type(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Half:
      return ElementType::kFloat16;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    default:
      return ElementType::kFloat32;
  }
}

template <typename T>
TokenTensor<T> token_tensor(const Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

inline TokenTensor<float> sums(const Tensor& result, bool is_rounded) {
  return is_rounded ? TokenTensor<float>{} : token_tensor<float>(result);
}

inline TokenTensor<uint16_t> rounded(const Tensor& result, bool is_rounded) {
  return is_rounded ? token_tensor<uint16_t>(result) : TokenTensor<uint16_t>{};
}

}  // namespace mls

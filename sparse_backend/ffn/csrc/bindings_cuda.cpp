// Binds the CUDA kernels to torch through its stable ABI: one build loads under torch 2.11 and every later release. The schemas
// are defined in op.py.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "cuda/kernels.h"

namespace {

using prosparse::linear;
using prosparse::matrix;
using prosparse::row_counts;
using prosparse::Sizes;
using prosparse::cuda::Dtype;
using prosparse::cuda::Shape;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, " failed on the GPU: ", cudaGetErrorString(error));
}

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::Float: return Dtype::kFloat32;
    default: STD_TORCH_CHECK(false, "x must be bfloat16, float16 or float32");
  }
}

// torch's current stream on a device. The function is in torch's CUDA library, which is loaded wherever a CUDA tensor exists, but
// is not there on every machine that compiles this: it is looked up by name instead of linked.
cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t device_index, void** stream);
  static const Getter getter = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    STD_TORCH_CHECK(torch_cuda != nullptr, "torch has CUDA tensors, but has not loaded libtorch_cuda.so");
    return reinterpret_cast<Getter>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(getter != nullptr, "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the device of x the current one for the lifetime of the object, and holds torch's current stream there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()), stream_(current_stream(x.get_device_index())) {
    // This library has a CUDA runtime of its own, which need not have noticed that torch's has changed the device.
    check(cudaSetDevice(x.get_device_index()), "cudaSetDevice");
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

const bool* marks(const std::optional<Tensor>& is_padding) {
  return is_padding ? static_cast<const bool*>(is_padding->const_data_ptr()) : nullptr;
}

// From torch's allocator: it may be freed while kernels of the same stream still use it, and be captured in a CUDA graph.
Tensor workspace(const Tensor& x, size_t bytes) {
  const std::array<int64_t, 1> size{static_cast<int64_t>(bytes)};
  return torch::stable::new_empty(x, {size.data(), size.size()}, ScalarType::Byte);
}

// h of the dense path; the counters are checked.
Tensor activate(Dtype dtype, const Shape& shape, const Tensor& gate_up_out, double threshold, const Tensor& counters,
                const std::optional<Tensor>& is_padding, bool drelu, const std::optional<Tensor>& row_active,
                cudaStream_t stream) {
  const Tensor h = matrix(gate_up_out, shape.rows, shape.d_ff, gate_up_out.scalar_type());
  const Tensor scratch = workspace(gate_up_out, prosparse::cuda::activation_workspace(shape));
  check(prosparse::cuda::launch_activation(dtype, shape, gate_up_out.const_data_ptr(), static_cast<float>(threshold), drelu,
                                           marks(is_padding), h.mutable_data_ptr(),
                                           static_cast<int64_t*>(counters.mutable_data_ptr()) + 4, row_counts(row_active),
                                           scratch.mutable_data_ptr(), stream),
        "the activation kernel");
  return h;
}

Tensor sparse_gated_ffn(Tensor x, Tensor gate_up, Tensor down_t, double threshold, Tensor counters, int64_t max_sparse_rows,
                        std::optional<Tensor> is_padding, bool drelu, std::optional<Tensor> row_active) {
  const Dtype dtype = dtype_of(x);
  const Sizes sizes = prosparse::check_gated_ffn(x, gate_up, down_t, threshold, counters, is_padding, drelu, row_active);
  const Shape shape{sizes.rows, sizes.d_model, sizes.d_ff};
  const OnDeviceOf on_device(x);

  if (shape.rows == 0) return matrix(x, 0, shape.d_model, x.scalar_type());
  if (shape.rows <= std::min<int64_t>(max_sparse_rows, prosparse::cuda::max_rows(dtype, shape.d_model))) {
    Tensor y = matrix(x, shape.rows, shape.d_model, x.scalar_type());
    const Tensor scratch = workspace(x, prosparse::cuda::sparse_ffn_workspace(dtype, shape));
    check(prosparse::cuda::launch_sparse_ffn(dtype, shape, x.const_data_ptr(), gate_up.const_data_ptr(), down_t.const_data_ptr(),
                                             static_cast<float>(threshold), drelu, marks(is_padding), y.mutable_data_ptr(),
                                             static_cast<int64_t*>(counters.mutable_data_ptr()), row_counts(row_active),
                                             scratch.mutable_data_ptr(), on_device.stream()),
          "the sparse feed-forward kernel");
    return y;
  }
  const Tensor gate_up_out = linear(x, gate_up);
  const Tensor h = activate(dtype, shape, gate_up_out, threshold, counters, is_padding, drelu, row_active, on_device.stream());
  return torch::stable::matmul(h, down_t);
}

Tensor gated_activation(Tensor gate_up_out, double threshold, Tensor counters, std::optional<Tensor> is_padding, bool drelu,
                        std::optional<Tensor> row_active) {
  const Dtype dtype = dtype_of(gate_up_out);
  const Sizes sizes = prosparse::check_gated_activation(gate_up_out, threshold, counters, is_padding, drelu, row_active);
  const OnDeviceOf on_device(gate_up_out);
  return activate(dtype, {sizes.rows, 0, sizes.d_ff}, gate_up_out, threshold, counters, is_padding, drelu, row_active,
                  on_device.stream());
}

Tensor sparse_gate(Tensor x, Tensor gate_up) {
  const Dtype dtype = dtype_of(x);
  const Sizes sizes = prosparse::check_gate(x, gate_up);
  const OnDeviceOf on_device(x);
  const int limit = prosparse::cuda::max_rows(dtype, sizes.d_model);
  STD_TORCH_CHECK(sizes.rows <= limit, "the sparse path takes up to ", limit, " rows of this dtype and width, but x has ",
                  sizes.rows);
  Tensor gates = matrix(x, sizes.rows, sizes.d_ff, ScalarType::Float);
  if (sizes.rows == 0) return gates;
  check(prosparse::cuda::launch_gate(dtype, {sizes.rows, sizes.d_model, sizes.d_ff}, x.const_data_ptr(), gate_up.const_data_ptr(),
                                     static_cast<float*>(gates.mutable_data_ptr()), on_device.stream()),
        "the gate kernel");
  return gates;
}

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double epsilon) {
  const Dtype dtype = dtype_of(x);
  const auto [rows, d_model] = prosparse::check_norm(x, residual, weight);
  STD_TORCH_CHECK(dtype != Dtype::kFloat32, "x must be bfloat16 or float16 on a GPU");
  STD_TORCH_CHECK(d_model <= prosparse::cuda::kMaxNormWidth, "x is wider than ", prosparse::cuda::kMaxNormWidth);
  const OnDeviceOf on_device(x);
  Tensor y = matrix(x, rows, d_model, x.scalar_type()), sum = matrix(x, rows, d_model, x.scalar_type());
  check(prosparse::cuda::launch_add_rms_norm(dtype, rows, d_model, x.const_data_ptr(), residual.const_data_ptr(),
                                             weight.const_data_ptr(), static_cast<float>(epsilon), y.mutable_data_ptr(),
                                             sum.mutable_data_ptr(), on_device.stream()),
        "the norm kernel");
  return {y, sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(prosparse, CUDA, library) {
  library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  library.impl("sparse_gated_ffn", TORCH_BOX(&sparse_gated_ffn));
  library.impl("sparse_gate", TORCH_BOX(&sparse_gate));
  library.impl("gated_activation", TORCH_BOX(&gated_activation));
}

// For native.py, through ctypes. dtype: 0 bfloat16, 1 float16, 2 float32, in the order of the enumeration.
extern "C" __attribute__((visibility("default"))) int prosparse_cuda_max_rows(int device, int dtype, int64_t d_model) {
  return cudaSetDevice(device) == cudaSuccess ? prosparse::cuda::max_rows(static_cast<Dtype>(dtype), d_model) : 0;
}

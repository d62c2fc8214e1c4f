// Binds the kernels to torch through its stable ABI: one build loads under torch 2.11 and every later release. The schemas are
// defined in op.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cmath>
#include <cstdint>

#include "cpu/kernels.h"

namespace {

using prosparse::cpu::Counts;
using prosparse::cpu::Dtype;
using prosparse::cpu::kernels;
using prosparse::cpu::Shape;
using prosparse::cpu::ThreadPool;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAlignment = 16;

void check_matrix(const Tensor& tensor, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must be a matrix, but it has ", tensor.dim(), " dimensions");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must have the dtype of x");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous; pass a contiguous copy");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0, name,
                  " must start at a multiple of ", kAlignment, " bytes; pass a copy instead of a view");
}

Dtype dtype_of(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, "x must be bfloat16 or float32");
  return dtype == ScalarType::BFloat16 ? Dtype::kBFloat16 : Dtype::kFloat32;
}

Shape check_gate(const Tensor& x, const Tensor& gate_up) {
  dtype_of(x);
  check_matrix(x, "x", x.scalar_type());
  check_matrix(gate_up, "gate_up", x.scalar_type());
  const Shape shape{x.size(0), x.size(1), gate_up.size(0) / 2};
  STD_TORCH_CHECK(gate_up.size(0) % 2 == 0 && gate_up.size(1) == shape.d_model,
                  "gate_up must be [2 * d_ff, d_model] = [2 * d_ff, ", shape.d_model, "], but it is [", gate_up.size(0), ", ", gate_up.size(1), "]");
  STD_TORCH_CHECK(shape.d_model > 0 && shape.d_model % 8 == 0, "d_model must be a positive multiple of 8, but it is ",
                  shape.d_model);
  STD_TORCH_CHECK(shape.d_ff > 0 && shape.d_ff % 8 == 0, "d_ff must be a positive multiple of 8, but it is ", shape.d_ff);
  return shape;
}

// at::parallel_for gives its range away in pieces, or whole where threads are not to be had: every index is run either way.
ThreadPool torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int threads, void (*body)(int thread, void* context), void* context) {
            torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
              for (int64_t thread = begin; thread < end; ++thread) body(static_cast<int>(thread), context);
            });
          }};
}

Tensor matrix(int64_t rows, int64_t columns, ScalarType dtype) {
  const std::array<int64_t, 2> size{rows, columns};
  return torch::stable::empty({size.data(), size.size()}, dtype);
}

// aten::linear(x, weight, None): x @ weight^T.
Tensor linear(const Tensor& x, const Tensor& weight) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(std::optional<Tensor>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor sparse_gated_ffn(Tensor x, Tensor gate_up, Tensor down_t, double threshold, Tensor counters, int64_t max_sparse_rows) {
  const Shape shape = check_gate(x, gate_up);
  check_matrix(down_t, "down_t", x.scalar_type());
  STD_TORCH_CHECK(down_t.size(0) == shape.d_ff && down_t.size(1) == shape.d_model, "down_t must be [d_ff, d_model] = [",
                  shape.d_ff, ", ", shape.d_model, "], but it is [", down_t.size(0), ", ", down_t.size(1), "]");
  STD_TORCH_CHECK(std::isfinite(threshold) && threshold >= 0, "threshold must be finite and not negative, but it is ", threshold);
  STD_TORCH_CHECK(counters.scalar_type() == ScalarType::Long && counters.is_contiguous() && counters.dim() == 2 &&
                      counters.size(0) == 2 && counters.size(1) == 4,
                  "counters must be a contiguous int64 tensor of shape [2, 4]");

  const Dtype dtype = dtype_of(x);
  const bool sparse = shape.rows <= max_sparse_rows;
  const float limit = static_cast<float>(threshold);
  const ThreadPool pool = torch_threads();
  Tensor y = matrix(shape.rows, shape.d_model, x.scalar_type());
  if (shape.rows == 0) return y;

  Counts counts;
  if (sparse) {
    counts = kernels().launch_sparse_ffn(dtype, shape, x.const_data_ptr(), gate_up.const_data_ptr(), down_t.const_data_ptr(),
                                         limit, y.mutable_data_ptr(), pool);
  } else {
    const Tensor gate_up_out = linear(x, gate_up);
    Tensor h = matrix(shape.rows, shape.d_ff, x.scalar_type());
    counts = kernels().launch_activation(dtype, shape, gate_up_out.const_data_ptr(), limit, h.mutable_data_ptr(), pool);
    if (dtype == Dtype::kBFloat16 && kernels().launch_down_bf16) {
      kernels().launch_down_bf16(shape, h.const_data_ptr(), down_t.const_data_ptr(), y.mutable_data_ptr(), pool);
    } else {
      y = torch::stable::matmul(h, down_t);
    }
  }
  int64_t* const path = static_cast<int64_t*>(counters.mutable_data_ptr()) + (sparse ? 0 : 4);
  path[0] += shape.rows;
  path[1] += counts.active;
  path[2] += counts.union_neurons;
  path[3] += 1;
  return y;
}

Tensor sparse_gate(Tensor x, Tensor gate_up) {
  const Shape shape = check_gate(x, gate_up);
  Tensor gates = matrix(shape.rows, shape.d_ff, ScalarType::Float);
  kernels().launch_gate(dtype_of(x), shape, x.const_data_ptr(), gate_up.const_data_ptr(),
                        static_cast<float*>(gates.mutable_data_ptr()), torch_threads());
  return gates;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(prosparse, CPU, library) {
  library.impl("sparse_gated_ffn", TORCH_BOX(&sparse_gated_ffn));
  library.impl("sparse_gate", TORCH_BOX(&sparse_gate));
}

// For native.py, through ctypes: settings of the process, not operations on tensors.
extern "C" __attribute__((visibility("default"))) const char* prosparse_available_isas() {
  return prosparse::cpu::available_isas();
}
extern "C" __attribute__((visibility("default"))) const char* prosparse_selected_isa() { return kernels().isa; }
extern "C" __attribute__((visibility("default"))) int prosparse_select_isa(const char* isa) {
  return prosparse::cpu::select_isa(isa) ? 1 : 0;
}

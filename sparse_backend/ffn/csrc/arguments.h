// What the op refuses, in the same words on every device (op.py's check_arguments repeats them for the reference), and the few
// tensor operations that both bindings need. For bindings*.cpp only: kernels know no torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>

namespace prosparse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAlignment = 16;

struct Sizes {
  int64_t rows, d_model, d_ff;
};

inline void check_device(const Tensor& tensor, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(tensor.device() == x.device(), name, " must be on the device of x");
}

inline void check_matrix(const Tensor& tensor, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must be a matrix, but it has ", tensor.dim(), " dimensions");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  check_device(tensor, name, x);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous; pass a contiguous copy");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0, name,
                  " must start at a multiple of ", kAlignment, " bytes; pass a copy instead of a view");
}

// Each binding checks the dtype of x itself: it depends on the device.
inline Sizes check_gate(const Tensor& x, const Tensor& gate_up) {
  check_matrix(x, "x", x);
  check_matrix(gate_up, "gate_up", x);
  const Sizes sizes{x.size(0), x.size(1), gate_up.size(0) / 2};
  STD_TORCH_CHECK(gate_up.size(0) % 2 == 0 && gate_up.size(1) == sizes.d_model,
                  "gate_up must be [2 * d_ff, d_model] = [2 * d_ff, ", sizes.d_model, "], but it is [", gate_up.size(0), ", ", gate_up.size(1), "]");
  STD_TORCH_CHECK(sizes.d_model > 0 && sizes.d_model % 8 == 0, "d_model must be a positive multiple of 8, but it is ",
                  sizes.d_model);
  STD_TORCH_CHECK(sizes.d_ff > 0 && sizes.d_ff % 8 == 0, "d_ff must be a positive multiple of 8, but it is ", sizes.d_ff);
  return sizes;
}

inline Sizes check_gated_ffn(const Tensor& x, const Tensor& gate_up, const Tensor& down_t, double threshold,
                             const Tensor& counters, const std::optional<Tensor>& is_padding,
                             const std::optional<Tensor>& row_active) {
  const Sizes sizes = check_gate(x, gate_up);
  check_matrix(down_t, "down_t", x);
  STD_TORCH_CHECK(down_t.size(0) == sizes.d_ff && down_t.size(1) == sizes.d_model, "down_t must be [d_ff, d_model] = [",
                  sizes.d_ff, ", ", sizes.d_model, "], but it is [", down_t.size(0), ", ", down_t.size(1), "]");
  STD_TORCH_CHECK(std::isfinite(threshold) && threshold >= 0, "threshold must be finite and not negative, but it is ", threshold);
  STD_TORCH_CHECK(counters.scalar_type() == ScalarType::Long && counters.is_contiguous() && counters.dim() == 2 &&
                      counters.size(0) == 2 && counters.size(1) == 4,
                  "counters must be a contiguous int64 tensor of shape [2, 4]");
  check_device(counters, "counters", x);
  if (is_padding) {
    STD_TORCH_CHECK(is_padding->scalar_type() == ScalarType::Bool && is_padding->is_contiguous() && is_padding->dim() == 1 &&
                        is_padding->size(0) == sizes.rows,
                    "is_padding must be a contiguous bool tensor of shape [rows] = [", sizes.rows, "]");
    check_device(*is_padding, "is_padding", x);
  }
  if (row_active) {
    STD_TORCH_CHECK(row_active->scalar_type() == ScalarType::Int && row_active->is_contiguous() && row_active->dim() == 1 &&
                        row_active->size(0) >= sizes.rows,
                    "row_active must be a contiguous int32 tensor of at least [rows] = [", sizes.rows, "]");
    check_device(*row_active, "row_active", x);
  }
  return sizes;
}

// An uninitialised matrix on the device of x.
inline Tensor matrix(const Tensor& x, int64_t rows, int64_t columns, ScalarType dtype) {
  const std::array<int64_t, 2> size{rows, columns};
  return torch::stable::new_empty(x, {size.data(), size.size()}, dtype);
}

// aten::linear(x, weight, None): x @ weight^T.
inline Tensor linear(const Tensor& x, const Tensor& weight) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(std::optional<Tensor>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace prosparse

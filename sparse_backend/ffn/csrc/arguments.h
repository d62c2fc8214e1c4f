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

// What row_active points to, or null.
inline int32_t* row_counts(const std::optional<Tensor>& row_active) {
  return row_active ? static_cast<int32_t*>(row_active->mutable_data_ptr()) : nullptr;
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

// x [rows, d_model] of the layer, or gate_up_out [rows, 2 * d_ff].
inline void check_activation(const Tensor& x, double threshold, const Tensor& counters, const std::optional<Tensor>& is_padding,
                             bool drelu, const std::optional<Tensor>& row_active) {
  const int64_t paths = drelu ? 3 : 2;
  STD_TORCH_CHECK(std::isfinite(threshold) && threshold >= 0, "threshold must be finite and not negative, but it is ", threshold);
  STD_TORCH_CHECK(counters.scalar_type() == ScalarType::Long && counters.is_contiguous() && counters.dim() == 2 &&
                      counters.size(0) == paths && counters.size(1) == 4,
                  "counters must be a contiguous int64 tensor of shape [", paths, ", 4]");
  check_device(counters, "counters", x);
  if (is_padding) {
    STD_TORCH_CHECK(is_padding->scalar_type() == ScalarType::Bool && is_padding->is_contiguous() && is_padding->dim() == 1 &&
                        is_padding->size(0) == x.size(0),
                    "is_padding must be a contiguous bool tensor of shape [rows] = [", x.size(0), "]");
    check_device(*is_padding, "is_padding", x);
  }
  if (row_active) {
    STD_TORCH_CHECK(row_active->scalar_type() == ScalarType::Int && row_active->is_contiguous() && row_active->dim() == 1 &&
                        row_active->size(0) >= x.size(0),
                    "row_active must be a contiguous int32 tensor of at least [rows] = [", x.size(0), "]");
    check_device(*row_active, "row_active", x);
  }
}

// The sizes of gate_up_out [rows, 2 * d_ff]; d_model is not known from it, and 0.
inline Sizes check_gated_activation(const Tensor& gate_up_out, double threshold, const Tensor& counters,
                                    const std::optional<Tensor>& is_padding, bool drelu,
                                    const std::optional<Tensor>& row_active) {
  check_matrix(gate_up_out, "gate_up_out", gate_up_out);
  const int64_t columns = gate_up_out.size(1);
  STD_TORCH_CHECK(columns > 0 && columns % 16 == 0, "gate_up_out must have 2 * d_ff columns, d_ff a positive multiple of 8, but it has ",
                  columns);
  check_activation(gate_up_out, threshold, counters, is_padding, drelu, row_active);
  return {gate_up_out.size(0), 0, columns / 2};
}

inline Sizes check_gated_ffn(const Tensor& x, const Tensor& gate_up, const Tensor& down_t, double threshold,
                             const Tensor& counters, const std::optional<Tensor>& is_padding, bool drelu,
                             const std::optional<Tensor>& row_active) {
  const Sizes sizes = check_gate(x, gate_up);
  check_matrix(down_t, "down_t", x);
  STD_TORCH_CHECK(down_t.size(0) == sizes.d_ff && down_t.size(1) == sizes.d_model, "down_t must be [d_ff, d_model] = [",
                  sizes.d_ff, ", ", sizes.d_model, "], but it is [", down_t.size(0), ", ", down_t.size(1), "]");
  check_activation(x, threshold, counters, is_padding, drelu, row_active);
  return sizes;
}

struct NormSizes {
  int64_t rows, d_model;
};

inline NormSizes check_norm(const Tensor& x, const Tensor& residual, const Tensor& weight) {
  check_matrix(x, "x", x);
  check_matrix(residual, "residual", x);
  const NormSizes sizes{x.size(0), x.size(1)};
  STD_TORCH_CHECK(residual.size(0) == sizes.rows && residual.size(1) == sizes.d_model, "residual must have the shape of x");
  STD_TORCH_CHECK(sizes.d_model > 0 && sizes.d_model % 8 == 0, "d_model must be a positive multiple of 8, but it is ",
                  sizes.d_model);
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == sizes.d_model && weight.scalar_type() == x.scalar_type() &&
                      weight.is_contiguous(),
                  "weight must be a contiguous vector of d_model = ", sizes.d_model, " values of the dtype of x");
  check_device(weight, "weight", x);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % kAlignment == 0, "weight must start at a multiple of ",
                  kAlignment, " bytes; pass a copy instead of a view");
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

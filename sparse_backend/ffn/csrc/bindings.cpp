// Binds the CPU kernels to torch through its stable ABI: one build loads under torch 2.11 and every later release. The schemas
// are defined in op.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"

namespace {

using prosparse::linear;
using prosparse::matrix;
using prosparse::row_counts;
using prosparse::Sizes;
using prosparse::cpu::Counts;
using prosparse::cpu::Dtype;
using prosparse::cpu::kernels;
using prosparse::cpu::Shape;
using prosparse::cpu::ThreadPool;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, "x must be bfloat16 or float32");
  return dtype == ScalarType::BFloat16 ? Dtype::kBFloat16 : Dtype::kFloat32;
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

void count(const Tensor& counters, bool sparse, int64_t rows, const Counts& counts, bool drelu) {
  int64_t* const all = static_cast<int64_t*>(counters.mutable_data_ptr());
  int64_t* const path = all + (sparse ? 0 : 4);
  path[0] += rows;
  path[1] += counts.active;
  path[2] += counts.union_neurons;
  path[3] += 1;
  if (sparse || !drelu) return;
  all[8] += rows;
  all[9] += counts.views[0];
  all[10] += counts.views[1];
}

// y of rows none of which is padding.
Tensor compute(const Tensor& x, const Tensor& gate_up, const Tensor& down_t, float threshold, const Tensor& counters,
               int32_t* row_active, bool sparse, bool drelu) {
  const Shape shape{x.size(0), x.size(1), down_t.size(0)};
  const Dtype dtype = dtype_of(x);
  const ThreadPool pool = torch_threads();
  Tensor y = matrix(x, shape.rows, shape.d_model, x.scalar_type());
  if (shape.rows == 0) return y;

  Counts counts;
  if (sparse) {
    counts = kernels().launch_sparse_ffn(dtype, shape, x.const_data_ptr(), gate_up.const_data_ptr(), down_t.const_data_ptr(),
                                         threshold, drelu, y.mutable_data_ptr(), row_active, pool);
  } else {
    const Tensor gate_up_out = linear(x, gate_up);
    Tensor h = matrix(x, shape.rows, shape.d_ff, x.scalar_type());
    counts = kernels().launch_activation(dtype, shape, gate_up_out.const_data_ptr(), threshold, drelu, h.mutable_data_ptr(),
                                         row_active, pool);
    if (dtype == Dtype::kBFloat16 && kernels().launch_down_bf16) {
      kernels().launch_down_bf16(shape, h.const_data_ptr(), down_t.const_data_ptr(), y.mutable_data_ptr(), pool);
    } else {
      y = torch::stable::matmul(h, down_t);
    }
  }
  count(counters, sparse, shape.rows, counts, drelu);
  return y;
}

Tensor sparse_gated_ffn(Tensor x, Tensor gate_up, Tensor down_t, double threshold, Tensor counters, int64_t max_sparse_rows,
                        std::optional<Tensor> is_padding, bool drelu, std::optional<Tensor> row_active) {
  dtype_of(x);
  const Sizes sizes = prosparse::check_gated_ffn(x, gate_up, down_t, threshold, counters, is_padding, drelu, row_active);
  const float limit = static_cast<float>(threshold);
  const bool sparse = sizes.rows <= max_sparse_rows;
  int32_t* const all_counts = row_counts(row_active);
  std::vector<int64_t> real;
  if (is_padding) {
    const bool* const padding = static_cast<const bool*>(is_padding->const_data_ptr());
    for (int64_t row = 0; row < sizes.rows; ++row) {
      if (!padding[row]) real.push_back(row);
    }
  }
  const int64_t real_rows = static_cast<int64_t>(real.size());
  if (!is_padding || real_rows == sizes.rows) return compute(x, gate_up, down_t, limit, counters, all_counts, sparse, drelu);

  const size_t row_bytes = sizes.d_model * (x.scalar_type() == ScalarType::Float ? 4 : 2);
  Tensor packed = matrix(x, real_rows, sizes.d_model, x.scalar_type());
  for (int64_t index = 0; index < real_rows; ++index) {
    std::memcpy(static_cast<char*>(packed.mutable_data_ptr()) + index * row_bytes,
                static_cast<const char*>(x.const_data_ptr()) + real[index] * row_bytes, row_bytes);
  }
  std::vector<int32_t> packed_counts(real_rows);
  const Tensor packed_y = compute(packed, gate_up, down_t, limit, counters, packed_counts.data(), sparse, drelu);
  Tensor y = matrix(x, sizes.rows, sizes.d_model, x.scalar_type());
  std::memset(y.mutable_data_ptr(), 0, sizes.rows * row_bytes);
  for (int64_t index = 0; index < real_rows; ++index) {
    std::memcpy(static_cast<char*>(y.mutable_data_ptr()) + real[index] * row_bytes,
                static_cast<const char*>(packed_y.const_data_ptr()) + index * row_bytes, row_bytes);
    if (all_counts) all_counts[real[index]] += packed_counts[index];
  }
  return y;
}

Tensor sparse_gate(Tensor x, Tensor gate_up) {
  const Dtype dtype = dtype_of(x);
  const Sizes sizes = prosparse::check_gate(x, gate_up);
  Tensor gates = matrix(x, sizes.rows, sizes.d_ff, ScalarType::Float);
  kernels().launch_gate(dtype, {sizes.rows, sizes.d_model, sizes.d_ff}, x.const_data_ptr(), gate_up.const_data_ptr(),
                        static_cast<float*>(gates.mutable_data_ptr()), torch_threads());
  return gates;
}

Tensor gated_activation(Tensor gate_up_out, double threshold, Tensor counters, std::optional<Tensor> is_padding, bool drelu,
                        std::optional<Tensor> row_active) {
  const Dtype dtype = dtype_of(gate_up_out);
  const Sizes sizes = prosparse::check_gated_activation(gate_up_out, threshold, counters, is_padding, drelu, row_active);
  Tensor h = matrix(gate_up_out, sizes.rows, sizes.d_ff, gate_up_out.scalar_type());
  Tensor input = gate_up_out;
  int64_t real_rows = sizes.rows;
  if (is_padding) {
    // Rows of zeros activate no neuron.
    const size_t row_bytes = 2 * sizes.d_ff * (dtype == Dtype::kFloat32 ? 4 : 2);
    input = matrix(gate_up_out, sizes.rows, 2 * sizes.d_ff, gate_up_out.scalar_type());
    std::memcpy(input.mutable_data_ptr(), gate_up_out.const_data_ptr(), sizes.rows * row_bytes);
    for (int64_t row = 0; row < sizes.rows; ++row) {
      if (!static_cast<const bool*>(is_padding->const_data_ptr())[row]) continue;
      std::memset(static_cast<char*>(input.mutable_data_ptr()) + row * row_bytes, 0, row_bytes);
      --real_rows;
    }
  }
  const Counts counts =
      kernels().launch_activation(dtype, {sizes.rows, 0, sizes.d_ff}, input.const_data_ptr(), static_cast<float>(threshold),
                                  drelu, h.mutable_data_ptr(), row_counts(row_active), torch_threads());
  if (real_rows > 0) count(counters, false, real_rows, counts, drelu);
  return h;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(prosparse, CPU, library) {
  library.impl("sparse_gated_ffn", TORCH_BOX(&sparse_gated_ffn));
  library.impl("sparse_gate", TORCH_BOX(&sparse_gate));
  library.impl("gated_activation", TORCH_BOX(&gated_activation));
}

// For native.py, through ctypes: settings of the process, not operations on tensors.
extern "C" __attribute__((visibility("default"))) const char* prosparse_available_isas() {
  return prosparse::cpu::available_isas();
}
extern "C" __attribute__((visibility("default"))) const char* prosparse_selected_isa() { return kernels().isa; }
extern "C" __attribute__((visibility("default"))) int prosparse_select_isa(const char* isa) {
  return prosparse::cpu::select_isa(isa) ? 1 : 0;
}

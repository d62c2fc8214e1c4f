// The CUDA kernels' interface: raw device pointers, sizes and a stream. Nothing here synchronises with the host, and every
// launch may be captured in a CUDA graph.
//
// From compute capability 9.0 on, gate weights are read while the kernel ahead in the stream runs out: it must not be the one
// that writes them. It may write everything else.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace prosparse::cuda {

enum class Dtype { kBFloat16, kFloat16, kFloat32 };

struct Shape {
  int64_t rows;
  int64_t d_model;  // a multiple of 8
  int64_t d_ff;     // a multiple of 8
};

// The most rows launch_sparse_ffn and launch_gate take on the current device, at most 16: as many rows of x as its shared memory
// holds. 0 where there are no kernels for the dtype.
int max_rows(Dtype dtype, int64_t d_model);

// Bytes of scratch memory one launch_sparse_ffn needs; they need not be initialised.
size_t sparse_ffn_workspace(Dtype dtype, const Shape& shape);

// y [rows, d_model] = (gate * active * up) @ down_t; gate and up = x @ gate_up^T, accumulated in float32. Deterministic. 1 to
// max_rows rows, d_ff up to 2^24, d_ff * d_model below 2^34; anything else is cudaErrorInvalidValue.
//   drelu: a neuron is active where its gate and its up value are above the threshold. Up rows are then read where some row's gate
//   is, down rows where some row's gate and up value are.
//   is_padding [rows]: rows to leave out, whose y becomes 0; may be null.
//   counters [4]: this call's rows, active neurons, union neurons and 1 step are added.
//   row_active [rows]: each row's active neurons are added, modulo 2^32; may be null.
cudaError_t launch_sparse_ffn(Dtype dtype, const Shape& shape, const void* x, const void* gate_up, const void* down_t,
                              float threshold, bool drelu, const bool* is_padding, void* y, int64_t* counters, int32_t* row_active,
                              void* workspace, cudaStream_t stream);

// The gate values [rows, d_ff] that launch_sparse_ffn compares with the threshold, by the same code.
cudaError_t launch_gate(Dtype dtype, const Shape& shape, const void* x, const void* gate_up, float* gates,
                        cudaStream_t stream);

// Bytes of scratch memory one launch_activation needs; they need not be initialised.
size_t activation_workspace(const Shape& shape);

// The middle of the dense path: h [rows, d_ff] = gate * active * up from gate_up_out [rows, 2 * d_ff], any number of rows; in the
// dtype, as the dense reference rounds. Rows that are padding get h = 0 and are not counted. counters: as above; with drelu [8],
// of which the last four get rows, gates above the threshold and up values above it. row_active: as above.
cudaError_t launch_activation(Dtype dtype, const Shape& shape, const void* gate_up_out, float threshold, bool drelu,
                              const bool* is_padding, void* h, int64_t* counters, int32_t* row_active, void* workspace,
                              cudaStream_t stream);

// The widest row launch_add_rms_norm takes.
constexpr int64_t kMaxNormWidth = 32768;

// sum [rows, d_model] = x + residual, y = sum / sqrt(mean(sum^2) + epsilon) * weight [d_model]; computed in float32, bfloat16 or
// float16 in memory. y and sum overlap no argument. Lets the kernel behind it start early: see the top of this file.
cudaError_t launch_add_rms_norm(Dtype dtype, int64_t rows, int64_t d_model, const void* x, const void* residual,
                                const void* weight, float epsilon, void* y, void* sum, cudaStream_t stream);

}  // namespace prosparse::cuda

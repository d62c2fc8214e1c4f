// The CPU kernels of the gated FFN, y = (gate * active * up) @ down_t, as plain functions over raw pointers.
//
// No torch header is included here or below: bindings.cpp alone binds these to torch.
#pragma once

#include <cstdint>

namespace prosparse::cpu {

enum class Dtype { kBFloat16, kFloat32 };

// Runs body(thread, context) for every thread in [0, threads) and returns when all of them are done. Passed in so that the
// kernels use the thread pool of whoever calls them and never start one of their own.
struct ThreadPool {
  int threads;
  void (*run)(int threads, void (*body)(int thread, void* context), void* context);
};

struct Shape {
  int64_t rows;
  int64_t d_model;
  int64_t d_ff;
};

// What one call adds to the counters of its layer.
struct Counts {
  int64_t active = 0;         // (row, neuron) pairs that are active
  int64_t union_neurons = 0;  // neurons active for at least one row
  int64_t views[2] = {0, 0};  // dReLU on the dense path: pairs whose gate, and whose up value, is above the threshold
};

// All matrices are row-major and contiguous, and hold the dtype's elements. A neuron is active unless gate <= threshold, compared
// in float32: it is strictly above, or NaN, so that a NaN shows in the output. With drelu its up value must be so, too. Same input
// and same number of threads, same bits. row_active [rows]: each row's active neurons are added, unless it is null.
struct Kernels {
  const char* isa;

  // x [rows, d_model], gate_up [2 * d_ff, d_model] (gate rows, then up rows), down_t [d_ff, d_model], y [rows, d_model].
  // Reads every gate row, and of up and down_t the rows of the union only; with drelu of up the rows of neurons whose gate some
  // row has above the threshold.
  Counts (*launch_sparse_ffn)(Dtype, Shape, const void* x, const void* gate_up, const void* down_t, float threshold,
                              bool drelu, void* y, int32_t* row_active, ThreadPool);

  // The gate values that launch_sparse_ffn compares, by the same code: gate_up as above, gates [rows, d_ff].
  void (*launch_gate)(Dtype, Shape, const void* x, const void* gate_up, float* gates, ThreadPool);

  // h = (active ? gate : 0) * up for the dense path, with drelu active ? gate * up : 0: gate_up_out [rows, 2 * d_ff], h [rows, d_ff].
  Counts (*launch_activation)(Dtype, Shape, const void* gate_up_out, float threshold, bool drelu, void* h,
                              int32_t* row_active, ThreadPool);

  // y = h @ down_t in bfloat16 for the dense path: h [rows, d_ff], down_t [d_ff, d_model], y [rows, d_model]. oneDNN takes up to
  // twice as long for down_t as for the layout of a checkpoint, [d_model, d_ff]; this does not. Null where torch does better.
  void (*launch_down_bf16)(Shape, const void* h, const void* down_t, void* y, ThreadPool);
};

// The kernels in use: the first of available_isas() unless select_isa() said otherwise.
const Kernels& kernels();

// Names of the instruction sets that this build holds and this CPU can run, best first, separated by commas.
const char* available_isas();

// Takes the kernels of one instruction set into use. Returns false, and changes nothing, if it is not among available_isas().
bool select_isa(const char* isa);

// Memory of the calling thread, aligned to 64 bytes and kept between calls; its content is undefined. A second call may move it.
void* scratch(int64_t bytes);

}  // namespace prosparse::cpu

// The middle of the dense path in one launch: h = gate * active * up, and the counters.
//
// With dReLU also how many gates and how many up values are above the threshold, in the last row of the counters: the sparse path
// is to begin with the sparser of the two.
//
// A block owns a stripe of neurons over all rows, so the union needs neither a second pass nor scratch memory, and counts are
// sums of integers, the same in any order. A stripe is 128 bytes of each row: whole cache lines, and at the usual widths more
// stripes than multiprocessors.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>

#include "device.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace prosparse::cuda {
namespace {

constexpr int kStripe = 8;  // vectors of 16 bytes; divides a warp
constexpr int kMaxThreads = 512;
constexpr int kManyRows = 4;  // per thread at once; at thousands of rows, enough requests to keep the memory busy

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void narrow(float value, float& out) { out = value; }
__device__ __forceinline__ void narrow(float value, __half& out) { out = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

__device__ __forceinline__ void add(int64_t* counter, unsigned value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(value));
}

// 16 bytes of h from 16 bytes of gate and of up; bit i of `active` says whether neuron i is active, of `views` whether its gate
// and its up value are above the threshold.
template <class Element, bool kDReLU>
__device__ __forceinline__ uint4 activate(const uint4& gate, const uint4& up, float threshold, unsigned& active,
                                          unsigned (&views)[2]) {
  constexpr int kElements = sizeof(uint4) / sizeof(Element);
  Element gates[kElements];
  Element ups[kElements];
  Element products[kElements];
  memcpy(gates, &gate, sizeof(gates));
  memcpy(ups, &up, sizeof(ups));
  active = views[0] = views[1] = 0;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const float value = widen(gates[i]), up_value = widen(ups[i]);
    bool is_active = !(value <= threshold);  // a NaN is active
    if constexpr (kDReLU) {
      const bool second = !(up_value <= threshold);
      views[0] |= static_cast<unsigned>(is_active) << i;
      views[1] |= static_cast<unsigned>(second) << i;
      is_active = is_active && second;
      narrow(is_active ? value * up_value : 0.0f, products[i]);
    } else {
      narrow((is_active ? value : 0.0f) * up_value, products[i]);
    }
    active |= static_cast<unsigned>(is_active) << i;
  }
  uint4 h;
  memcpy(&h, products, sizeof(h));
  return h;
}

// Of lanes kStripe apart.
__device__ __forceinline__ unsigned union_of_columns(unsigned bits) {
#pragma unroll
  for (int distance = kStripe; distance < kWarp; distance *= 2) bits |= __shfl_xor_sync(kAllLanes, bits, distance);
  return bits;
}

// What the kernel is given: gate_up_out [rows, 2 * vectors] and h [rows, vectors], in vectors of 16 bytes.
struct Activation {
  int rows;
  int vectors;
  const uint4* gate_up_out;
  float threshold;
  const bool* is_padding;
  uint4* h;
  int64_t* counters;
  int32_t* row_active;
};

// What a thread has counted; a block would need 2^26 rows to overflow it.
struct Tally {
  unsigned active = 0;
  unsigned in_union = 0;
  unsigned real_rows = 0;
  unsigned views[2] = {0, 0};
};

// Rows `first`, `first` + `step` and so on, kRows of them, of one column of vectors.
template <class Element, bool kDReLU, int kRows>
__device__ __forceinline__ void activate_rows(const Activation& of, int vector, int first, int step, Tally& tally) {
  const bool inside = vector < of.vectors;
  uint4 gates[kRows] = {};
  uint4 ups[kRows] = {};
  bool is_real[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first + i * step;
    if (inside && row < of.rows) {
      const uint4* gate = of.gate_up_out + 2 * (static_cast<int64_t>(row) * of.vectors) + vector;
      gates[i] = gate[0];
      ups[i] = gate[of.vectors];
      is_real[i] = !(of.is_padding && of.is_padding[row]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first + i * step;
    unsigned bits = 0;
    if (inside && row < of.rows) {
      unsigned views[2];
      const uint4 products = activate<Element, kDReLU>(gates[i], ups[i], of.threshold, bits, views);
      of.h[static_cast<int64_t>(row) * of.vectors + vector] = is_real[i] ? products : uint4{};
      if constexpr (kDReLU) {
#pragma unroll
        for (int view = 0; view < 2; ++view) tally.views[view] += is_real[i] ? __popc(views[view]) : 0;
      }
      bits = is_real[i] ? bits : 0;
      tally.active += __popc(bits);
      tally.in_union |= bits;
      tally.real_rows += is_real[i];
    }
    if (of.row_active) {
      // Lanes outside take part in the sums over a row's lanes.
      const unsigned row_lanes = ((1u << kStripe) - 1) << (threadIdx.x % kWarp / kStripe * kStripe);
      unsigned of_row = __popc(bits);
#pragma unroll
      for (int distance = 1; distance < kStripe; distance *= 2) of_row += __shfl_xor_sync(row_lanes, of_row, distance);
      if (threadIdx.x % kStripe == 0 && of_row) atomicAdd(of.row_active + row, static_cast<int>(of_row));
    }
  }
}

// The threads of a block are kStripe columns wide; those of a column share the rows out. Where each has one (kFew) the kernel is
// short: its code comes from memory in every layer anew, where the weights have pushed it out of the caches.
template <class Element, bool kDReLU, bool kFew>
__global__ void __launch_bounds__(kMaxThreads) activation_kernel(Activation of) {
  const int column = threadIdx.x % kStripe;
  const int vector = blockIdx.x * kStripe + column;
  const int first = threadIdx.x / kStripe;
  Tally tally;
  wait_for_predecessor();
  if constexpr (kFew) {
    activate_rows<Element, kDReLU, 1>(of, vector, first, 0, tally);
  } else {
    const int step = blockDim.x / kStripe;
    for (int row = first; row < of.rows; row += kManyRows * step) {
      activate_rows<Element, kDReLU, kManyRows>(of, vector, row, step, tally);
    }
  }

  if constexpr (kDReLU) {
#pragma unroll
    for (int view = 0; view < 2; ++view) {
      const unsigned sum = __reduce_add_sync(kAllLanes, tally.views[view]);
      if (threadIdx.x % kWarp == 0 && sum > 0) add(of.counters + 5 + view, sum);
    }
  }

  // Every block has a first column and with it a count of the real rows; one block's is used.
  unsigned active = __reduce_add_sync(kAllLanes, tally.active);
  unsigned real_rows = __reduce_add_sync(kAllLanes, column == 0 ? tally.real_rows : 0);
  unsigned in_union = union_of_columns(tally.in_union);

  constexpr int kMaxWarps = kMaxThreads / kWarp;
  __shared__ unsigned warp_active[kMaxWarps];
  __shared__ unsigned warp_real_rows[kMaxWarps];
  __shared__ unsigned warp_union[kMaxWarps * kStripe];
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int warps = blockDim.x / kWarp;
  if (lane == 0) {
    warp_active[warp] = active;
    warp_real_rows[warp] = real_rows;
  }
  if (lane < kStripe) warp_union[warp * kStripe + lane] = in_union;
  __syncthreads();
  if (warp > 0) return;

  active = __reduce_add_sync(kAllLanes, lane < warps ? warp_active[lane] : 0);
  real_rows = __reduce_add_sync(kAllLanes, lane < warps ? warp_real_rows[lane] : 0);
  in_union = 0;
#pragma unroll
  for (int i = 0; i < kMaxWarps * kStripe; i += kWarp) in_union |= i + lane < warps * kStripe ? warp_union[i + lane] : 0;
  in_union = union_of_columns(in_union);
  const unsigned union_neurons = __reduce_add_sync(kAllLanes, lane < kStripe ? static_cast<unsigned>(__popc(in_union)) : 0);
  if (lane > 0) return;
  add(of.counters + 1, active);
  add(of.counters + 2, union_neurons);
  if (blockIdx.x == 0 && real_rows > 0) {
    add(of.counters, real_rows);
    add(of.counters + 3, 1);
    if constexpr (kDReLU) add(of.counters + 4, real_rows);
  }
}

template <class Element>
cudaError_t launch_typed(const Shape& shape, const void* gate_up_out, float threshold, bool drelu, const bool* is_padding, void* h,
                         int64_t* counters, int32_t* row_active, cudaStream_t stream) {
  const int vectors = static_cast<int>(shape.d_ff * static_cast<int64_t>(sizeof(Element)) / static_cast<int64_t>(sizeof(uint4)));
  const int rows = static_cast<int>(shape.rows);
  const int threads = std::min((rows * int64_t{kStripe} + kWarp - 1) / kWarp * kWarp, int64_t{kMaxThreads});
  const auto few = drelu ? activation_kernel<Element, true, true> : activation_kernel<Element, false, true>;
  const auto many = drelu ? activation_kernel<Element, true, false> : activation_kernel<Element, false, false>;
  return launch_early(rows <= threads / kStripe ? few : many, dim3((vectors + kStripe - 1) / kStripe), dim3(threads), 0, stream,
                      Activation{rows, vectors, static_cast<const uint4*>(gate_up_out), threshold, is_padding,
                                 static_cast<uint4*>(h), counters, row_active});
}

}  // namespace

size_t activation_workspace(const Shape&) { return 0; }

cudaError_t launch_activation(Dtype dtype, const Shape& shape, const void* gate_up_out, float threshold, bool drelu,
                              const bool* is_padding, void* h, int64_t* counters, int32_t* row_active, void* /*workspace*/,
                              cudaStream_t stream) {
  if (shape.rows == 0) return cudaSuccess;
  switch (dtype) {
    case Dtype::kBFloat16:
      return launch_typed<__nv_bfloat16>(shape, gate_up_out, threshold, drelu, is_padding, h, counters, row_active, stream);
    case Dtype::kFloat16:
      return launch_typed<__half>(shape, gate_up_out, threshold, drelu, is_padding, h, counters, row_active, stream);
    case Dtype::kFloat32:
      return launch_typed<float>(shape, gate_up_out, threshold, drelu, is_padding, h, counters, row_active, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace prosparse::cuda

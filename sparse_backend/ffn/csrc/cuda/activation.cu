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
constexpr int kRowsInFlight = 4;  // per thread; at thousands of rows, enough requests to keep the memory busy

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

// gate_up_out [rows, 2 * vectors] and h [rows, vectors], in vectors of 16 bytes. The threads of a block are kStripe columns
// wide; those of a column share the rows out.
template <class Element, bool kDReLU>
__global__ void __launch_bounds__(kMaxThreads)
    activation_kernel(int64_t rows, int64_t vectors, const uint4* gate_up_out, float threshold, const bool* is_padding,
                      uint4* h, int64_t* counters, int32_t* row_active) {
  wait_for_predecessor();
  const int column = threadIdx.x % kStripe;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kStripe + column;
  const int64_t row_step = blockDim.x / kStripe;

  unsigned active = 0;  // a block would need 2^26 rows to overflow it
  unsigned in_union = 0;
  unsigned real_rows = 0;
  unsigned counted_views[2] = {0, 0};
  const bool inside = vector < vectors;
  // Lanes outside take part in the sums over a row's lanes.
  const unsigned row_lanes = ((1u << kStripe) - 1) << (threadIdx.x % kWarp / kStripe * kStripe);
  for (int64_t first = threadIdx.x / kStripe; first < rows; first += kRowsInFlight * row_step) {
    uint4 gates[kRowsInFlight] = {};
    uint4 ups[kRowsInFlight] = {};
    bool is_real[kRowsInFlight] = {};
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int64_t row = first + i * row_step;
      if (inside && row < rows) {
        gates[i] = gate_up_out[2 * row * vectors + vector];
        ups[i] = gate_up_out[(2 * row + 1) * vectors + vector];
        is_real[i] = !(is_padding && is_padding[row]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int64_t row = first + i * row_step;
      unsigned bits = 0;
      if (inside && row < rows) {
        unsigned views[2];
        const uint4 products = activate<Element, kDReLU>(gates[i], ups[i], threshold, bits, views);
        h[row * vectors + vector] = is_real[i] ? products : uint4{};
        if constexpr (kDReLU) {
#pragma unroll
          for (int view = 0; view < 2; ++view) counted_views[view] += is_real[i] ? __popc(views[view]) : 0;
        }
        bits = is_real[i] ? bits : 0;
        active += __popc(bits);
        in_union |= bits;
        real_rows += is_real[i];
      }
      if (row_active) {
        unsigned of_row = __popc(bits);
#pragma unroll
        for (int distance = 1; distance < kStripe; distance *= 2) of_row += __shfl_xor_sync(row_lanes, of_row, distance);
        if (column == 0 && of_row) atomicAdd(row_active + row, static_cast<int>(of_row));
      }
    }
  }

  if constexpr (kDReLU) {
#pragma unroll
    for (int view = 0; view < 2; ++view) {
      const unsigned sum = __reduce_add_sync(kAllLanes, counted_views[view]);
      if (threadIdx.x % kWarp == 0 && sum > 0) add(counters + 5 + view, sum);
    }
  }

  // Every block has a first column and with it a count of the real rows; one block's is used.
  active = __reduce_add_sync(kAllLanes, active);
  real_rows = __reduce_add_sync(kAllLanes, column == 0 ? real_rows : 0);
#pragma unroll
  for (int distance = kStripe; distance < kWarp; distance *= 2) in_union |= __shfl_xor_sync(kAllLanes, in_union, distance);

  constexpr int kMaxWarps = kMaxThreads / kWarp;
  __shared__ unsigned warp_active[kMaxWarps];
  __shared__ unsigned warp_real_rows[kMaxWarps];
  __shared__ unsigned warp_union[kMaxWarps][kStripe];
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int warps = blockDim.x / kWarp;
  if (lane == 0) {
    warp_active[warp] = active;
    warp_real_rows[warp] = real_rows;
  }
  if (lane < kStripe) warp_union[warp][lane] = in_union;
  __syncthreads();
  if (warp > 0) return;

  active = __reduce_add_sync(kAllLanes, lane < warps ? warp_active[lane] : 0);
  real_rows = __reduce_add_sync(kAllLanes, lane < warps ? warp_real_rows[lane] : 0);
  in_union = 0;
  if (lane < kStripe) {
    for (int i = 0; i < warps; ++i) in_union |= warp_union[i][lane];
  }
  const unsigned union_neurons = __reduce_add_sync(kAllLanes, static_cast<unsigned>(__popc(in_union)));
  if (lane > 0) return;
  add(counters + 1, active);
  add(counters + 2, union_neurons);
  if (blockIdx.x == 0 && real_rows > 0) {
    add(counters, real_rows);
    add(counters + 3, 1);
    if constexpr (kDReLU) add(counters + 4, real_rows);
  }
}

template <class Element>
cudaError_t launch_typed(const Shape& shape, const void* gate_up_out, float threshold, bool drelu, const bool* is_padding, void* h,
                         int64_t* counters, int32_t* row_active, cudaStream_t stream) {
  const int64_t vectors = shape.d_ff * static_cast<int64_t>(sizeof(Element)) / static_cast<int64_t>(sizeof(uint4));
  const int64_t stripes = (vectors + kStripe - 1) / kStripe;
  const int64_t threads = std::min<int64_t>((shape.rows * kStripe + kWarp - 1) / kWarp * kWarp, kMaxThreads);
  const auto kernel = drelu ? activation_kernel<Element, true> : activation_kernel<Element, false>;
  return launch_early(kernel, dim3(static_cast<unsigned>(stripes)), dim3(static_cast<unsigned>(threads)), 0,
                      stream, shape.rows, vectors, static_cast<const uint4*>(gate_up_out), threshold, is_padding,
                      static_cast<uint4*>(h), counters, row_active);
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

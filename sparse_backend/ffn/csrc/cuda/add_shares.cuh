// The last kernel: y as the sum of what the blocks of the one before contributed to it.
#pragma once

#include "device.cuh"

namespace prosparse::cuda {

constexpr int kShareThreads = 128;
// 16 on a multiprocessor leave 32 registers to each thread; cards of 8.6 and 8.9 take 12.
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890
constexpr int kShareBlocks = 12;
#else
constexpr int kShareBlocks = 16;
#endif

struct AddSharesArguments {
  const float* shares;  // [count, rows, d_model]
  void* y;              // [rows, d_model]
  int count;
  int rows;
  int d_model;
};

// In a fixed order. A block takes 4 kLanes columns of a row: few for few rows, so that there are enough blocks. They are small
// enough to wait in place beside those of the kernel before, and of the one behind.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kShareThreads, kShareBlocks) add_shares_kernel(const AddSharesArguments arguments) {
  constexpr int kParts = kShareThreads / kLanes;
  __shared__ float4 sums[kParts][kLanes];
  const int column = (blockIdx.x * kLanes + threadIdx.x % kLanes) * 4;
  const int part = threadIdx.x / kLanes;
  const int d_model = arguments.d_model;
  const int64_t stride = static_cast<int64_t>(arguments.rows) * d_model;
  let_successor_start();
  wait_for_predecessor();
  if (column < d_model) {
    float4 sum{};
    const float* const from = arguments.shares + static_cast<int64_t>(blockIdx.y) * d_model + column;
#pragma unroll 8
    for (int share = part; share < arguments.count; share += kParts) {
      const float4 more = __ldcg(reinterpret_cast<const float4*>(from + share * stride));
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    sums[part][threadIdx.x % kLanes] = sum;
  }
  __syncthreads();
  if (part > 0 || column >= d_model) return;
  float4 sum{};
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const float4 more = sums[i][threadIdx.x];
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  alignas(8) const T values[4] = {from_float<T>(sum.x), from_float<T>(sum.y), from_float<T>(sum.z), from_float<T>(sum.w)};
  *reinterpret_cast<uint2*>(static_cast<T*>(arguments.y) + static_cast<int64_t>(blockIdx.y) * d_model + column) =
      *reinterpret_cast<const uint2*>(values);
}

}  // namespace prosparse::cuda

// The norm in front of the feed-forward layer: sum = x + residual, y = sum / rms(sum) * weight.
//
// What it is here for is its first instruction: it lets its successor start at once. The gate kernel of the sparse path fills its
// rings with weights while this one runs, instead of after it; norms that others compile do not let it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace prosparse::cuda {
namespace {

constexpr int kMaxNormThreads = 1024;
constexpr int kMaxChunksPerThread = 4;
// Up to so many rows, a row is spread over as many threads as it gives work, for the shortest way through. More of them keep the
// memory busy in any case, and best where each thread has more loads under way.
constexpr int64_t kFewRows = 64;

__device__ __forceinline__ float2 widen(uint32_t pair, __nv_bfloat162) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
__device__ __forceinline__ float2 widen(uint32_t pair, __half2) { return __half22float2(reinterpret_cast<const __half2&>(pair)); }
__device__ __forceinline__ uint32_t narrow(float2 pair, __nv_bfloat162) {
  const __nv_bfloat162 narrowed = __float22bfloat162_rn(pair);
  return reinterpret_cast<const uint32_t&>(narrowed);
}
__device__ __forceinline__ uint32_t narrow(float2 pair, __half2) {
  const __half2 narrowed = __float22half2_rn(pair);
  return reinterpret_cast<const uint32_t&>(narrowed);
}

// One block a row, which stays in registers between its two uses. Pair: two values of the dtype. Rounds where the reference does
// (vLLM's fused_add_rms_norm): the sum as it is kept, the normalised row before it is multiplied with the weight, and after.
template <typename Pair, int kChunks>
__global__ void __launch_bounds__(kMaxNormThreads)
    add_rms_norm_kernel(const Chunk* x, const Chunk* residual, const Chunk* weight, float epsilon, Chunk* y, Chunk* sum, int chunks) {
  constexpr int kPairs = kChunk / 2;
  __shared__ float warp_squares[kMaxNormThreads / kWarp];
  let_successor_start();
  Chunk scale[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = threadIdx.x + i * blockDim.x;
    scale[i] = chunk < chunks ? weight[chunk] : Chunk{};
  }
  wait_for_predecessor();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * chunks;
  float2 values[kChunks][kPairs];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = threadIdx.x + i * blockDim.x;
    const bool exists = chunk < chunks;
    const Chunk one = exists ? __ldcg(x + first + chunk) : Chunk{}, other = exists ? __ldcg(residual + first + chunk) : Chunk{};
    Chunk rounded;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const float2 a = widen((&one.x)[pair], Pair{}), b = widen((&other.x)[pair], Pair{});
      const float2 total{a.x + b.x, a.y + b.y};
      values[i][pair] = total;
      squares += total.x * total.x + total.y * total.y;
      (&rounded.x)[pair] = narrow(total, Pair{});
    }
    if (exists) sum[first + chunk] = rounded;
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAllLanes, squares, offset);
  if (threadIdx.x % kWarp == 0) warp_squares[threadIdx.x / kWarp] = squares;
  __syncthreads();
  squares = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) squares += warp_squares[warp];
  const float factor = rsqrtf(squares / static_cast<float>(chunks * kChunk) + epsilon);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = threadIdx.x + i * blockDim.x;
    if (chunk >= chunks) continue;
    Chunk out;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const float2 value = values[i][pair], by = widen((&scale[i].x)[pair], Pair{});
      const float2 normal = widen(narrow({value.x * factor, value.y * factor}, Pair{}), Pair{});
      (&out.x)[pair] = narrow({normal.x * by.x, normal.y * by.y}, Pair{});
    }
    y[first + chunk] = out;
  }
}

template <typename Pair>
cudaError_t launch_typed(int64_t rows, int64_t d_model, const void* x, const void* residual, const void* weight, float epsilon,
                         void* y, void* sum, cudaStream_t stream) {
  const int chunks = static_cast<int>(d_model / kChunk);
  const bool spread = rows <= kFewRows && chunks <= kMaxNormThreads;
  const int per_thread = spread ? 1 : chunks <= 2 * kMaxNormThreads ? 2 : kMaxChunksPerThread;
  const int threads = ((chunks + per_thread - 1) / per_thread + kWarp - 1) / kWarp * kWarp;
  const auto kernel = per_thread == 1   ? add_rms_norm_kernel<Pair, 1>
                      : per_thread == 2 ? add_rms_norm_kernel<Pair, 2>
                                        : add_rms_norm_kernel<Pair, kMaxChunksPerThread>;
  return launch_early(kernel, dim3(static_cast<unsigned>(rows)), dim3(static_cast<unsigned>(threads)), 0, stream,
                      static_cast<const Chunk*>(x), static_cast<const Chunk*>(residual), static_cast<const Chunk*>(weight),
                      epsilon, static_cast<Chunk*>(y), static_cast<Chunk*>(sum), chunks);
}

}  // namespace

cudaError_t launch_add_rms_norm(Dtype dtype, int64_t rows, int64_t d_model, const void* x, const void* residual,
                                const void* weight, float epsilon, void* y, void* sum, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  if (d_model % kChunk != 0 || d_model > kMaxNormWidth || rows > INT32_MAX) return cudaErrorInvalidValue;
  static_assert(kMaxNormWidth == kMaxNormThreads * kMaxChunksPerThread * kChunk);
  switch (dtype) {
    case Dtype::kBFloat16:
      return launch_typed<__nv_bfloat162>(rows, d_model, x, residual, weight, epsilon, y, sum, stream);
    case Dtype::kFloat16: return launch_typed<__half2>(rows, d_model, x, residual, weight, epsilon, y, sum, stream);
    case Dtype::kFloat32: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace prosparse::cuda

// What the kernels are made of: tensor-core products, copies into shared memory, and the instructions of later cards with their fallbacks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace prosparse::cuda {

// One 16-byte load or store: 8 values of a 2-byte type.
using Chunk = uint4;
constexpr int kChunk = 8;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// d += a b, m16n8k16, accumulated in float32. Lane 4 g + t holds a[0]: row g, k 2t and 2t + 1; a[1]: row g + 8, the same k;
// a[2], a[3]: the same rows, k + 8; b[0]: k 2t and 2t + 1 of column g; b[1]: k + 8; d[0], d[1]: row g, columns 2t and 2t + 1;
// d[2], d[3]: row g + 8.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1);

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                   uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Two or four 8 x 8 matrices of 2-byte values from shared memory, transposed on the way: each lane of the first 16 or of all
// gives the address of one row.
__device__ __forceinline__ void load_transposed(uint32_t (&m)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(m[0]), "=r"(m[1]) : "r"(row) : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ Chunk load_shared(uint32_t address) {
  Chunk chunk;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w)
               : "r"(address)
               : "memory");
  return chunk;
}

// Copies a chunk of weights to shared memory without waiting, past L1; zeros instead where there is nothing to read. A call reads
// each weight once: it is the first to leave L2 again, ahead of what is passed on through it.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool exists) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float(float value) {
  return __float2half_rn(value);
}

// Programmatic dependent launch: a kernel may start before its predecessor has ended, and waits here for its results.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// To and from threads of other blocks, which see each value by itself, in no order with others.
__device__ __forceinline__ void store_relaxed(uint32_t* to, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
template <typename T>
__device__ __forceinline__ void store_relaxed(T* to, T value) {
  static_assert(sizeof(T) == 2);
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(reinterpret_cast<const unsigned short&>(value)) : "memory");
}
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ Chunk load_relaxed(const Chunk* from) {
  Chunk chunk;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w)
               : "l"(from)
               : "memory");
  return chunk;
}

// Two neighbouring values that have not been written yet: NaNs that no conversion to bfloat16 or half returns.
constexpr uint32_t kMissing = 0xffffffffu;
__device__ __forceinline__ bool is_missing(const Chunk& chunk) {
  return __vcmpeq2(chunk.x, kMissing) | __vcmpeq2(chunk.y, kMissing) | __vcmpeq2(chunk.z, kMissing) |
         __vcmpeq2(chunk.w, kMissing);
}

}  // namespace prosparse::cuda

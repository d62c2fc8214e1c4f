#include "gated_ffn.h"
#include "isa.h"
#include "traits_avx512.h"

namespace prosparse::cpu {
constexpr Kernels kAvx512Bf16Kernels = make_kernels<Avx512Bf16, Avx512Float, launch_dense_down<Avx512Bf16>>("avx512_bf16");
}  // namespace prosparse::cpu

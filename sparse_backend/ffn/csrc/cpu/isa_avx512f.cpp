#include "gated_ffn.h"
#include "isa.h"
#include "traits_avx512.h"

namespace prosparse::cpu {
constexpr Kernels kAvx512fKernels = make_kernels<Avx512WidenedBf16, Avx512Float, launch_dense_down<Avx512WidenedBf16>>("avx512f");
}  // namespace prosparse::cpu

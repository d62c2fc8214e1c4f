#include "gated_ffn.h"
#include "isa.h"
#include "traits_avx2.h"

namespace prosparse::cpu {
constexpr Kernels kAvx2Kernels = make_kernels<Avx2WidenedBf16, Avx2Float, launch_dense_down<Avx2WidenedBf16>>("avx2");
}  // namespace prosparse::cpu

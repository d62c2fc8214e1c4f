#include "gated_ffn.h"
#include "isa.h"
#include "traits_amx.h"

namespace prosparse::cpu {
constexpr Kernels kAmxKernels = make_kernels<AmxBf16, Avx512Float, launch_dense_down<AmxBf16>>("amx");
}  // namespace prosparse::cpu

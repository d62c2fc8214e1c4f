#include "gated_ffn.h"
#include "isa.h"
#include "traits_portable.h"

namespace prosparse::cpu {
constexpr Kernels kPortableKernels = make_kernels<Portable<uint16_t>, Portable<float>, nullptr>("portable");
}  // namespace prosparse::cpu

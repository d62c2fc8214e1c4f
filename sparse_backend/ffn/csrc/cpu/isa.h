// The kernel tables of the instruction sets. Which of them are built is up to build.py, which defines PROSPARSE_ISA_* likewise.
#pragma once

#include "kernels.h"

namespace prosparse::cpu {

extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512fKernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxKernels;

}  // namespace prosparse::cpu

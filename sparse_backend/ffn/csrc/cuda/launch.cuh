// Launching a kernel whose blocks may be put in place while the kernel ahead runs out (programmatic dependent launch).
#pragma once

#include <cuda_runtime.h>

// Returns the error of a CUDA call from the function around it.
#define PROSPARSE_TRY(call)                                                   \
  do {                                                                        \
    if (const cudaError_t error = (call); error != cudaSuccess) return error; \
  } while (false)

namespace prosparse::cuda {

// The kernel calls wait_for_predecessor (device.cuh) before it touches memory that earlier kernels of the stream use, or knows by
// other means that they have ended; and before it ends in any case, for what follows it. What they write must not be read
// through __restrict__ or __ldg: those promise that it is constant as long as this kernel runs, which it is not while this one
// waits. On cards before compute capability 9.0 this is an ordinary launch.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                         Arguments... arguments) {
  // Whether the kernel waits depends on what the loaded code was compiled for, not on the card.
  cudaFuncAttributes compiled{};
  PROSPARSE_TRY(cudaFuncGetAttributes(&compiled, kernel));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = compiled.ptxVersion >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace prosparse::cuda

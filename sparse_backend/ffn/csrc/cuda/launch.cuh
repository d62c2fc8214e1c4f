// Launching a kernel whose blocks may be put in place while the kernel ahead runs out (programmatic dependent launch).
#pragma once

#include <cuda_runtime.h>

namespace prosparse::cuda {

// The kernel calls wait_for_predecessor (device.cuh) before it touches memory that earlier kernels of the stream use. What they
// write must not be read through __restrict__ or __ldg: those promise that it is constant as long as this kernel runs, which
// it is not while this one waits. On cards before compute capability 9.0 this is an ordinary launch.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                         Arguments... arguments) {
  // Whether the kernel waits depends on what the loaded code was compiled for, not on the card.
  cudaFuncAttributes compiled{};
  if (const cudaError_t error = cudaFuncGetAttributes(&compiled, kernel); error != cudaSuccess) return error;
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

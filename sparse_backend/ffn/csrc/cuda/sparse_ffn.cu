// Launches the kernels of the sparse path: gate and up, down unless the first one has that too, and the sum over blocks.
#include <algorithm>
#include <array>
#include <mutex>

#include "add_shares.cuh"
#include "down.cuh"
#include "gate_up.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "plan.cuh"

namespace prosparse::cuda {
namespace {

// Percent of the most shared memory a multiprocessor can have, the same for all of them: one that wants another division
// waits until the kernel before has ended.
constexpr int kSharedMemoryCarveout = 100;

cudaError_t current_card(Card& card) {
  static std::mutex mutex;
  static std::array<Card, 64> cards{};
  int device = 0;
  PROSPARSE_TRY(cudaGetDevice(&device));
  if (device >= static_cast<int>(cards.size())) return cudaErrorInvalidDevice;
  const std::lock_guard<std::mutex> lock(mutex);
  if (cards[device].multiprocessors == 0) {
    Card read{};
    PROSPARSE_TRY(cudaDeviceGetAttribute(&read.multiprocessors, cudaDevAttrMultiProcessorCount, device));
    PROSPARSE_TRY(cudaDeviceGetAttribute(&read.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    cards[device] = read;
  }
  card = cards[device];
  return cudaSuccess;
}

template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared_memory, cudaStream_t stream,
                   const Arguments& arguments) {
  // Above 48 KB a kernel must be told, and telling it again costs less than remembering per device. It is the kernel that is
  // told, not the launch: between the two no other thread may tell it of less.
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  PROSPARSE_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory));
  PROSPARSE_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, kSharedMemoryCarveout));
  return launch_early(kernel, grid, dim3(threads), static_cast<size_t>(shared_memory), stream, arguments);
}

template <typename T, int kRowTiles, int kLines>
cudaError_t launch_gate_up_lines(const Plan& plan, const GateUpArguments& arguments, cudaStream_t stream) {
  constexpr int kDeep = kLines > 0 ? std::min(kDeepAhead, kLines) : kDeepAhead;
  auto kernel = plan.ahead == kDeepAhead ? gate_up_kernel<T, kLines, kRowTiles, kDeep>
                                         : gate_up_kernel<T, kLines, kRowTiles, kShallowAhead>;
  int shared_memory = gate_up_shared_memory(plan.ahead, kLines, arguments.rows, arguments.d_model);
  if constexpr (kRowTiles == 1 && kLines > 0 && kLines <= kMostLinesWithDown) {
    if (plan.down_in_first && !arguments.gates) {
      kernel = plan.ahead == kDeepAhead ? gate_up_kernel<T, kLines, kRowTiles, kDeep, true>
                                        : gate_up_kernel<T, kLines, kRowTiles, kShallowAhead, true>;
      shared_memory += h_bytes(plan.passes.per_block);
    }
  }
  return launch(kernel, dim3(arguments.passes.blocks), kGateUpThreads, shared_memory, stream, arguments);
}

template <typename T, int kRowTiles>
cudaError_t launch_gate_up(const Plan& plan, const GateUpArguments& arguments, cudaStream_t stream) {
  switch (plan.lines) {
    case 0: return launch_gate_up_lines<T, kRowTiles, 0>(plan, arguments, stream);
    case 2: return launch_gate_up_lines<T, kRowTiles, 2>(plan, arguments, stream);
    case 3: return launch_gate_up_lines<T, kRowTiles, 3>(plan, arguments, stream);
    case 4: return launch_gate_up_lines<T, kRowTiles, 4>(plan, arguments, stream);
    case 5: return launch_gate_up_lines<T, kRowTiles, 5>(plan, arguments, stream);
    case 8:
      if constexpr (kRowTiles == 1) return launch_gate_up_lines<T, kRowTiles, 8>(plan, arguments, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T, int kRowTiles>
cudaError_t launch_down(const Plan& plan, const DownArguments& arguments, cudaStream_t stream) {
  const auto kernel =
      plan.stages == kDeepStages ? down_kernel<T, kRowTiles, kDeepStages> : down_kernel<T, kRowTiles, kShallowStages>;
  return launch(kernel, dim3(plan.splits, plan.column_groups), kDownThreads,
                down_shared_memory(plan.stages, kRowTiles, plan.neuron_capacity), stream, arguments);
}

template <typename T>
cudaError_t launch_add_shares(const Plan& plan, const AddSharesArguments& arguments, cudaStream_t stream) {
  const dim3 grid(ceil_div(arguments.d_model, 4 * plan.share_lanes), arguments.rows);
  switch (plan.share_lanes) {
    case kFewestLanes: return launch(add_shares_kernel<T, kFewestLanes>, grid, kShareThreads, 0, stream, arguments);
    case kFewLanes: return launch(add_shares_kernel<T, kFewLanes>, grid, kShareThreads, 0, stream, arguments);
    default: return launch(add_shares_kernel<T, kManyLanes>, grid, kShareThreads, 0, stream, arguments);
  }
}

struct Call {
  Shape shape;
  GateUpArguments first;
  void* y;  // null for gate values only
  void* workspace;
  cudaStream_t stream;
};

template <typename T, int kRowTiles>
cudaError_t run(const Card& card, Call call) {
  const Plan plan(card, call.shape);
  GateUpArguments& first = call.first;
  first.passes = plan.passes, first.rows = static_cast<int>(call.shape.rows);
  first.d_model = static_cast<int>(call.shape.d_model), first.d_ff = static_cast<int>(call.shape.d_ff);
  if (!call.y) return launch_gate_up<T, kRowTiles>(plan, first, call.stream);

  char* const base = static_cast<char*>(call.workspace);
  float* const shares = reinterpret_cast<float*>(base + plan.shares);
  first.masks = reinterpret_cast<uint32_t*>(base + plan.masks), first.h = base + plan.h, first.shares = shares;
  const DownArguments second{first.masks,          first.h,    first.down_t, shares, plan.passes,
                             plan.neuron_capacity, first.rows, first.d_model};
  const AddSharesArguments third{shares, call.y, plan.share_count, first.rows, first.d_model};
  PROSPARSE_TRY((launch_gate_up<T, kRowTiles>(plan, first, call.stream)));
  if (!plan.down_in_first) PROSPARSE_TRY((launch_down<T, kRowTiles>(plan, second, call.stream)));
  return launch_add_shares<T>(plan, third, call.stream);
}

cudaError_t run(Dtype dtype, const Call& call) {
  Card card;
  PROSPARSE_TRY(current_card(card));
  if (dtype == Dtype::kFloat32 || !is_supported(card, call.shape)) return cudaErrorInvalidValue;
  const bool one_tile = row_tiles(call.shape.rows) == 1;
  if (dtype == Dtype::kBFloat16) return one_tile ? run<__nv_bfloat16, 1>(card, call) : run<__nv_bfloat16, 2>(card, call);
  return one_tile ? run<__half, 1>(card, call) : run<__half, 2>(card, call);
}

}  // namespace

int max_rows(Dtype dtype, int64_t d_model) {
  Card card;
  return dtype != Dtype::kFloat32 && current_card(card) == cudaSuccess ? most_rows(card, d_model) : 0;
}

size_t sparse_ffn_workspace(Dtype, const Shape& shape) {
  Card card;
  if (current_card(card) != cudaSuccess || !is_supported(card, shape)) return 0;
  return static_cast<size_t>(Plan(card, shape).size);
}

cudaError_t launch_sparse_ffn(Dtype dtype, const Shape& shape, const void* x, const void* gate_up, const void* down_t,
                              float threshold, bool drelu, const bool* is_padding, void* y, int64_t* counters, int32_t* row_active,
                              void* workspace, cudaStream_t stream) {
  Call call{shape, {}, y, workspace, stream};
  call.first.x = x, call.first.gate_up = gate_up, call.first.down_t = down_t, call.first.is_padding = is_padding;
  call.first.counters = counters, call.first.row_active = row_active;
  call.first.threshold = threshold, call.first.drelu = drelu;
  return run(dtype, call);
}

cudaError_t launch_gate(Dtype dtype, const Shape& shape, const void* x, const void* gate_up, float* gates, cudaStream_t stream) {
  Call call{shape, {}, nullptr, nullptr, stream};
  call.first.x = x, call.first.gate_up = gate_up, call.first.gates = gates;
  return run(dtype, call);
}

}  // namespace prosparse::cuda

// Launches the three kernels of the sparse path: gate and up, down, and the sum over the down kernel's blocks.
#include <algorithm>
#include <array>
#include <mutex>

#include "add_shares.cuh"
#include "down.cuh"
#include "gate_up.cuh"
#include "kernels.h"

namespace prosparse::cuda {
namespace {

#ifndef PROSPARSE_TUNABLE
#define PROSPARSE_TUNABLE constexpr
#endif
struct Tuning {
  int lines = 0;
  bool dependent_launch = true;
  int carveout = 57;
  int lanes = 0;
};
PROSPARSE_TUNABLE Tuning kTuning;

constexpr int kMaxRowTiles = 2;
// Static shared memory of the first kernel, at most: partial sums and the queue.
constexpr int kGateUpStaticBytes = 26 * 1024;

struct Card {
  int multiprocessors;
  int shared_memory;      // bytes a block may have
  bool dependent_launch;  // programmatic
};

cudaError_t current_card(Card& card) {
  static std::mutex mutex;
  static std::array<Card, 64> cards{};
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (device >= static_cast<int>(cards.size())) return cudaErrorInvalidDevice;
  const std::lock_guard<std::mutex> lock(mutex);
  if (cards[device].multiprocessors == 0) {
    Card read{};
    if (const cudaError_t error = cudaDeviceGetAttribute(&read.multiprocessors, cudaDevAttrMultiProcessorCount, device); error != cudaSuccess) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&read.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device); error != cudaSuccess) return error;
    // What the loaded code was compiled for decides, not the card: code for an older one does not wait for its predecessor.
    cudaFuncAttributes attributes{};
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, add_shares_kernel<__nv_bfloat16, 8>); error != cudaSuccess) return error;
    read.dependent_launch = attributes.ptxVersion >= 90;
    cards[device] = read;
  }
  card = cards[device];
  return cudaSuccess;
}

int row_tiles(int64_t rows) { return rows <= 8 ? 1 : 2; }

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// How a call is divided into blocks, and where its scratch memory holds what, in bytes from the start.
struct Plan {
  Passes passes;                // of the first kernel, one block per multiprocessor
  int column_groups, splits;    // of the second one, nearly as many blocks
  int neuron_capacity;          // of a split, at most
  int64_t masks = 0, h, shares, size;

  Plan(const Card& card, const Shape& shape) {
    const int d_model = static_cast<int>(shape.d_model), d_ff = static_cast<int>(shape.d_ff);
    passes = Passes::deal_out(d_ff, std::min(card.multiprocessors, d_ff / 8));
    column_groups = (d_model + kDownColumns - 1) / kDownColumns;
    splits = std::clamp(card.multiprocessors / column_groups, 1, passes.blocks);
    neuron_capacity = (passes.blocks + splits - 1) / splits * passes.per_block * kPassRows;

    constexpr int64_t kAlignment = 256;
    const int64_t pass_count = passes.blocks * passes.per_block;
    h = round_up(pass_count * 4, kAlignment);
    shares = round_up(h + pass_count * kPassRows * row_tiles(shape.rows) * 16, kAlignment);
    size = shares + splits * shape.rows * shape.d_model * 4;
  }
};

template <typename Arguments>
cudaError_t launch(const Card& card, void (*kernel)(Arguments), dim3 grid, int threads, int64_t shared_memory, cudaStream_t stream,
                   const Arguments& arguments) {
  // Above 48 KB a kernel must be told; telling it again costs less than remembering per device.
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_memory)); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, kTuning.carveout); error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_memory);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = card.dependent_launch && kTuning.dependent_launch ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

template <typename T, int kRowTiles>
cudaError_t launch_gate_up(const Card& card, const GateUpArguments& arguments, cudaStream_t stream) {
  // Requested ahead as far as registers allow, in steps that waste least of the last one.
  const int lines = (line_count(arguments.d_model) + kGateUpWarps - 1) / kGateUpWarps;
  int ahead = 4;
  for (const int fewer : {3, 2})
    if ((lines + fewer - 1) / fewer * fewer < (lines + ahead - 1) / ahead * ahead) ahead = fewer;
  if (kTuning.lines) ahead = kTuning.lines;
  const auto kernel = ahead == 4 ? gate_up_kernel<T, 4, kRowTiles> : ahead == 3 ? gate_up_kernel<T, 3, kRowTiles> : gate_up_kernel<T, 2, kRowTiles>;
  return launch(card, kernel, dim3(arguments.passes.blocks), kGateUpThreads, arguments.rows * x_stride_bytes(arguments.d_model), stream, arguments);
}

template <typename T, int kRowTiles>
cudaError_t launch_down(const Card& card, const Plan& plan, const DownArguments& arguments, cudaStream_t stream) {
  const auto shared_memory = [&](int stages) { return kDownWarps * stages * kTileBytes + plan.neuron_capacity * (kRowTiles * 16 + 4); };
  constexpr int kDeep = 3, kShallow = 2;
  const dim3 grid(plan.splits, plan.column_groups);
  if (shared_memory(kDeep) <= card.shared_memory)
    return launch(card, down_kernel<T, kRowTiles, kDeep>, grid, kDownThreads, shared_memory(kDeep), stream, arguments);
  return launch(card, down_kernel<T, kRowTiles, kShallow>, grid, kDownThreads, shared_memory(kShallow), stream, arguments);
}

template <typename T>
cudaError_t launch_add_shares(const Card& card, const AddSharesArguments& arguments, cudaStream_t stream) {
  const int lanes = kTuning.lanes ? kTuning.lanes : arguments.d_model * arguments.rows < 4096 ? 8 : 32;
  const dim3 grid((arguments.d_model + 4 * lanes - 1) / (4 * lanes), arguments.rows);
  return launch(card, lanes == 8 ? add_shares_kernel<T, 8> : add_shares_kernel<T, 32>, grid, kShareThreads, 0, stream, arguments);
}

struct Call {
  Shape shape;
  GateUpArguments first;
  const void* down_t;
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
  if (!call.y) return launch_gate_up<T, kRowTiles>(card, first, call.stream);

  char* const base = static_cast<char*>(call.workspace);
  float* const shares = reinterpret_cast<float*>(base + plan.shares);
  first.masks = reinterpret_cast<uint32_t*>(base + plan.masks), first.h = base + plan.h;
  const DownArguments second{first.masks, first.h, call.down_t, shares, plan.passes, plan.neuron_capacity, first.rows, first.d_model};
  const AddSharesArguments third{shares, call.y, plan.splits, first.rows, first.d_model};
  if (const cudaError_t error = launch_gate_up<T, kRowTiles>(card, first, call.stream); error != cudaSuccess) return error;
  if (const cudaError_t error = launch_down<T, kRowTiles>(card, plan, second, call.stream); error != cudaSuccess) return error;
  return launch_add_shares<T>(card, third, call.stream);
}

cudaError_t run(Dtype dtype, const Call& call) {
  Card card;
  if (const cudaError_t error = current_card(card); error != cudaSuccess) return error;
  const bool one_tile = row_tiles(call.shape.rows) == 1;
  if (dtype == Dtype::kBFloat16) return one_tile ? run<__nv_bfloat16, 1>(card, call) : run<__nv_bfloat16, 2>(card, call);
  return one_tile ? run<__half, 1>(card, call) : run<__half, 2>(card, call);
}

}  // namespace

int max_rows(Dtype dtype, int64_t d_model) {
  Card card;
  if (dtype == Dtype::kFloat32 || current_card(card) != cudaSuccess) return 0;
  const int64_t rows = (card.shared_memory - kGateUpStaticBytes) / x_stride_bytes(static_cast<int>(d_model));
  return static_cast<int>(std::clamp<int64_t>(rows, 0, 8 * kMaxRowTiles));
}

size_t sparse_ffn_workspace(Dtype, const Shape& shape) {
  Card card;
  return current_card(card) == cudaSuccess ? static_cast<size_t>(Plan(card, shape).size) : 0;
}

cudaError_t launch_sparse_ffn(Dtype dtype, const Shape& shape, const void* x, const void* gate_up, const void* down_t,
                              float threshold, const bool* is_padding, void* y, int64_t* counters, void* workspace,
                              cudaStream_t stream) {
  Call call{shape, {}, down_t, y, workspace, stream};
  call.first.x = x, call.first.gate_up = gate_up, call.first.is_padding = is_padding;
  call.first.counters = counters, call.first.threshold = threshold;
  return run(dtype, call);
}

cudaError_t launch_gate(Dtype dtype, const Shape& shape, const void* x, const void* gate_up, float* gates, cudaStream_t stream) {
  Call call{shape, {}, nullptr, nullptr, nullptr, stream};
  call.first.x = x, call.first.gate_up = gate_up, call.first.gates = gates;
  return run(dtype, call);
}

}  // namespace prosparse::cuda

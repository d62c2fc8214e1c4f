// The first kernel: gate values of all neurons, then up values of those that at least one row activates.
//
// A block, one per multiprocessor, works in passes of up to 16 weight rows: the gate rows of its next neurons or, once enough
// active neurons wait in its queue, their up rows, gathered. A pass is one tensor-core product [16 weight rows] x [8 or 16 rows
// of x]; its 16 warps split d_model and their partial sums meet in shared memory. The weights of the next pass are requested
// while the current one is multiplied, so that reading never stops. What a neuron's values are does not depend on when and in
// which slot they are computed, and they are kept by the neuron's place in its gate pass: the output is deterministic.
#pragma once

#include <cmath>

#include "device.cuh"

namespace prosparse::cuda {

constexpr int kPassRows = 16;    // weight rows of a pass: m or k of the tensor-core product
constexpr int kGateUpWarps = 16;  // warp w adds up the partial sums of weight row w: as many warps as rows
constexpr int kGateUpThreads = kGateUpWarps * kWarp;
constexpr int kLineBytes = 128;        // d_model is dealt to the warps in memory lines
constexpr int kLine = kLineBytes / 2;  // of 2-byte values
constexpr int kQueue = 64;             // at most 15 waiting, 16 under way and 16 more from a gate pass under way
constexpr int kMaxGatePasses = 256;
constexpr uint32_t kDone = 1u << 31;

static_assert(kGateUpWarps == kPassRows);

// The neurons are dealt out in passes of nearly one size: to every block in turn.
struct Passes {
  int blocks;
  int per_block;
  int neurons;  // of a pass; the first `larger` have one more
  int larger;

  // Takes at least 8 neurons per block.
  static Passes deal_out(int d_ff, int blocks) {
    const int per_block = (d_ff + blocks * kPassRows - 1) / (blocks * kPassRows), count = blocks * per_block;
    return {blocks, per_block, d_ff / count, d_ff % count};
  }

  __device__ __forceinline__ int first_neuron(int pass) const { return pass * neurons + min(pass, larger); }
};

struct GateUpArguments {
  const void* x;        // [rows, d_model]
  const void* gate_up;  // [2 d_ff, d_model]
  const bool* is_padding;
  int64_t* counters;
  float* gates;  // [rows, d_ff] to write gate values and nothing else, or null
  Passes passes;
  int rows;
  int d_model;
  int d_ff;
  float threshold;
  // For the second kernel.
  uint32_t* masks;  // [blocks, gate passes]: bit i tells whether neuron i of the pass has an h; with kDone once all h are written
  void* h;          // [blocks, gate passes, 16, 8 * row tiles]
};

// Lines of d_model, the last one possibly not whole.
__host__ __device__ inline int line_count(int d_model) { return (d_model + kLine - 1) / kLine; }

// Bytes between two rows of x in shared memory: 64 past a multiple of 128, so that lanes 4 g + t of a warp hit different banks.
__host__ __device__ inline int x_stride_bytes(int d_model) { return line_count(d_model) * kLineBytes + kLineBytes / 2; }

// kLines: memory lines per warp and weight row requested ahead. kRowTiles: rows of x in units of 8.
template <typename T, int kLines, int kRowTiles>
__global__ void __launch_bounds__(kGateUpThreads, 1) gate_up_kernel(const GateUpArguments arguments) {
  constexpr int kColumns = 8 * kRowTiles;
  constexpr unsigned kColumnLanes = (1u << kColumns) - 1;
  constexpr int kPartialStride = kPassRows * kColumns + 2;  // + 2: no bank conflicts when partial sums are added up
  constexpr int kParts = kWarp / kColumns;

  extern __shared__ __align__(16) unsigned char x_shared[];
  __shared__ __align__(16) float partial[kGateUpWarps * kPartialStride];
  __shared__ float queue_gate[kQueue][kColumns];  // 0 for rows that do not activate the neuron
  __shared__ int queue_neuron[kQueue], queue_place[kQueue];  // place: gate pass * 16 + slot
  __shared__ int queue_tail;
  __shared__ uint32_t wanted[kMaxGatePasses];  // by gate pass
  __shared__ int counted_active, counted_union;

  struct Pass {
    int first;  // neuron, or number in the queue
    int count;  // 0: nothing to do
    bool up;
  };

  const int rows = arguments.rows, d_model = arguments.d_model, d_ff = arguments.d_ff;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int g = lane / 4, t = lane % 4;

  // What follows is the same in every thread of the block.
  const Passes& passes = arguments.passes;
  const int gate_passes = passes.per_block;
  int gate_passes_begun = 0, queue_head = 0;
  const auto next_gate_pass = [&]() -> Pass {
    const int pass = gate_passes_begun++ * passes.blocks + blockIdx.x, first = passes.first_neuron(pass);
    return {first, passes.first_neuron(pass + 1) - first, false};
  };
  // The queue only grows between the two barriers at the end of a gate pass.
  const auto next_pass = [&]() -> Pass {
    const int waiting = queue_tail - queue_head;
    if (gate_passes_begun < gate_passes && waiting < kPassRows) return next_gate_pass();
    const int first = queue_head, count = min(waiting, kPassRows);
    queue_head += count;
    return {first, count, true};
  };

  const int lines = line_count(d_model);
  const int chunks = ((lines + kGateUpWarps - 1) / kGateUpWarps + kLines - 1) / kLines;
  Chunk weights[kLines][2][2];  // [line][half of the line][row g or g + 8]
  const T* const matrix = static_cast<const T*>(arguments.gate_up);
  const auto weight_row = [&](const Pass& pass, int slot) -> const T* {
    if (slot >= pass.count) return nullptr;
    const int row = pass.up ? d_ff + queue_neuron[(pass.first + slot) % kQueue] : pass.first + slot;
    return matrix + static_cast<int64_t>(row) * d_model;
  };
  // Line l of a warp is line warp + 16 l of the row. A lane's 8 values stand for k = 2t, 2t + 1, 2t + 8 and 2t + 9 of two
  // products: any order of k will do as long as x is read in the same one.
  const auto request = [&](Chunk(&into)[2][2], int line, const T* row0, const T* row1) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int element = (warp + kGateUpWarps * line) * kLine + half * (kLine / 2) + t * kChunk;
      const bool inside = element < d_model;
      into[half][0] = inside && row0 ? load_weights(row0 + element) : Chunk{};
      into[half][1] = inside && row1 ? load_weights(row1 + element) : Chunk{};
    }
  };

  Pass current = next_gate_pass();
  {
    const T *row0 = weight_row(current, g), *row1 = weight_row(current, g + 8);
#pragma unroll
    for (int line = 0; line < kLines; ++line) request(weights[line], line, row0, row1);
  }

  // Everything above reads weights only; x and the scratch memory belong to the predecessor.
  wait_for_predecessor();
  if (warp == 0) {
    // The second kernel may start once every block is past this line, and then waits for the masks it needs.
    if (!arguments.gates)
      for (int pass = lane; pass < gate_passes; pass += kWarp) arguments.masks[blockIdx.x * gate_passes + pass] = 0;
    __syncwarp();
    if (lane == 0) {
      __threadfence();
      let_successor_start();
    }
  }

  // Each warp brings in the lines of x it will multiply.
  const int x_stride = x_stride_bytes(d_model);
  {
    const T* const x = static_cast<const T*>(arguments.x);
    const int row_chunks = (lines - warp + kGateUpWarps - 1) / kGateUpWarps * (kLineBytes / 16);
    for (int i = lane; i < row_chunks; i += kWarp) {
      const int element = (warp + i / 8 * kGateUpWarps) * kLine + i % 8 * kChunk;
      const bool inside = element < d_model;
      for (int row = 0; row < rows; ++row)
        copy_async(shared_address(x_shared + row * x_stride + element * 2),
                   x + (inside ? static_cast<int64_t>(row) * d_model + element : 0), inside);
    }
    end_copy_group();
    wait_for_copies<0>();
  }
  for (int pass = threadIdx.x; pass < gate_passes; pass += kGateUpThreads) wanted[pass] = 0;
  if (threadIdx.x == 0) queue_tail = counted_active = counted_union = 0;
  __syncthreads();
  int gate_passes_ended = 0;
  const int column = lane % kColumns;
  const bool real = column < rows && !(arguments.is_padding && arguments.is_padding[column]);

  while (current.count > 0) {
    Pass next = next_pass();
    float sums[kRowTiles][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bool last = chunk == chunks - 1;
      const Pass requested{last ? next.first : current.first, last ? next.count : current.count, last ? next.up : current.up};
      const T *row0 = weight_row(requested, g), *row1 = weight_row(requested, g + 8);
      const int ahead = last ? 0 : (chunk + 1) * kLines;
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        const int line = warp + kGateUpWarps * (chunk * kLines + i);
        if (line < lines) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Chunk(&w)[2] = weights[i][half];
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
              const int row = g + 8 * tile;
              Chunk x{};
              const int at = row * x_stride + line * kLineBytes + half * (kLineBytes / 2) + t * 16;
              if (row < rows) x = *reinterpret_cast<const Chunk*>(x_shared + at);
              mma<T>(sums[tile], w[0].x, w[1].x, w[0].y, w[1].y, x.x, x.y);
              mma<T>(sums[tile], w[0].z, w[1].z, w[0].w, w[1].w, x.z, x.w);
            }
          }
        }
        request(weights[i], ahead + i, row0, row1);
      }
    }

#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      float* const to = partial + warp * kPartialStride + g * kColumns + tile * 8 + 2 * t;
      *reinterpret_cast<float2*>(to) = {sums[tile][0], sums[tile][1]};
      *reinterpret_cast<float2*>(to + 8 * kColumns) = {sums[tile][2], sums[tile][3]};
    }
    __syncthreads();
    // Weight row `warp` of the pass, all of d_model.
    const bool inside = warp < current.count;
    float value = 0;
#pragma unroll
    for (int i = 0; i < kGateUpWarps / kParts; ++i)
      value += partial[(lane / kColumns * (kGateUpWarps / kParts) + i) * kPartialStride + warp * kColumns + column];
#pragma unroll
    for (int offset = kColumns; offset < kWarp; offset *= 2) value += __shfl_xor_sync(kAllLanes, value, offset);

    if (current.up) {
      // where(active, gate, 0) * up, so that an infinite up value shows as in the dense layer; padding has no output.
      const int number = (current.first + warp) % kQueue;
      if (inside && lane < kColumns)
        static_cast<T*>(arguments.h)[(blockIdx.x * gate_passes * kPassRows + queue_place[number]) * kColumns + lane] =
            from_float<T>(real ? queue_gate[number][lane] * value : 0.0f);
    } else {
      const bool active = inside && real && !(value <= arguments.threshold);
      const unsigned rows_active = __ballot_sync(kAllLanes, active) & kColumnLanes;
      // A gate of -inf comes from an infinite x: its up value is no number that the dense layer would ignore.
      const bool has_h = __any_sync(kAllLanes, active || (inside && real && value == -INFINITY));
      if (arguments.gates) {
        if (inside && lane < rows) arguments.gates[static_cast<int64_t>(lane) * d_ff + current.first + warp] = value;
      } else if (has_h) {
        int number = 0;
        if (lane == 0) {
          number = atomicAdd(&queue_tail, 1) % kQueue;
          queue_neuron[number] = current.first + warp;
          queue_place[number] = gate_passes_ended * kPassRows + warp;
          atomicOr(&wanted[gate_passes_ended], 1u << warp);
          if (rows_active) atomicAdd(&counted_active, __popc(rows_active)), atomicAdd(&counted_union, 1);
        }
        number = __shfl_sync(kAllLanes, number, 0);
        if (lane < kColumns) queue_gate[number][lane] = active ? value : 0.0f;
      }
      ++gate_passes_ended;
    }
    __syncthreads();
    if (next.count == 0) {
      next = next_pass();
      const T *row0 = weight_row(next, g), *row1 = weight_row(next, g + 8);
#pragma unroll
      for (int line = 0; line < kLines; ++line) request(weights[line], line, row0, row1);
    }
    current = next;
  }

  if (arguments.gates) return;
  for (int pass = threadIdx.x; pass < gate_passes; pass += kGateUpThreads)
    store_release(arguments.masks + blockIdx.x * gate_passes + pass, wanted[pass] | kDone);
  if (threadIdx.x == 0) {
    const auto add = [&](int kind, int count) {
      atomicAdd(reinterpret_cast<unsigned long long*>(arguments.counters) + kind, static_cast<unsigned long long>(count));
    };
    if (counted_active) add(1, counted_active);
    if (counted_union) add(2, counted_union);
    if (blockIdx.x == 0) {
      int real_rows = rows;
      for (int row = 0; arguments.is_padding && row < rows; ++row) real_rows -= arguments.is_padding[row];
      if (real_rows) add(0, real_rows), add(3, 1);
    }
  }
}

}  // namespace prosparse::cuda

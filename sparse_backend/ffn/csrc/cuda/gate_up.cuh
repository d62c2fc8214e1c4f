// The first kernel: gate values of all neurons, then up values of those that at least one row activates; for a few rows also
// what the block's neurons contribute to y.
//
// A block, one per multiprocessor, works in passes of up to 16 weight rows: the gate rows of its next neurons or, once enough
// active neurons wait in its queue, their up rows, gathered. A pass is one tensor-core product [16 weight rows] x [8 or 16 rows
// of x]; its 16 warps split d_model and their partial sums meet in shared memory. The weights of the next pass are requested
// while the current one is multiplied, so that reading never stops. What a neuron's values are does not depend on when and in
// which slot they are computed, and they are kept by the neuron's place in its gate pass: the output is deterministic.
//
// Every warp keeps a ring of stages in shared memory, most of them on their way: a stage is one memory line of each of the pass's
// 16 weight rows. x stays in registers where it fits: read again for every pass, it would be the larger part of what a
// multiprocessor reads from shared memory.
//
// Where the down rows are left to the second kernel, its blocks divide them evenly, but its start costs 2 µs. Where they follow in
// this one, they are on their way while the last up values are computed; y is then a sum over all blocks, more of them than the
// second kernel has, and each row of it costs as much again: it pays for a few, of a wide model for one or two (plan.cuh).
//
// With dReLU only the up value tells whether a neuron is active: what the second kernel waits for, the masks, grows with the up
// passes, and is complete for a gate pass when the up pass with the last of its neurons has ended.
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
constexpr int kStageBytes = kPassRows * kLineBytes;
constexpr uint32_t kDone = 1u << 31;  // in a mask

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
  const void* down_t;   // [d_ff, d_model]
  const bool* is_padding;
  int64_t* counters;
  int32_t* row_active;  // [rows], or null
  float* gates;  // [rows, d_ff] to write gate values and nothing else, or null
  Passes passes;
  int rows;
  int d_model;
  int d_ff;
  float threshold;
  bool drelu;
  // For the second kernel.
  uint32_t* masks;  // [blocks, gate passes]: bit i tells whether neuron i of the pass has an h; with kDone once it is known
  void* h;          // [blocks, gate passes, 16, 8 * row tiles]; kMissing until it is known
  // For the last kernel, where there is no second one.
  float* shares;  // [blocks, rows, d_model]
};

// Lines of d_model, the last one possibly not whole.
__host__ __device__ inline int line_count(int d_model) { return (d_model + kLine - 1) / kLine; }

// Bytes between two rows of x in shared memory: 64 past a multiple of 128, so that lanes 4 g + t of a warp hit different banks.
__host__ __device__ inline int x_stride_bytes(int d_model) { return line_count(d_model) * kLineBytes + kLineBytes / 2; }

// With kDown a block of the last kernel waits on every multiprocessor, which takes 32 registers of 128 threads. It must not keep
// out the next call's first kernel, which is to begin early: that one leaves so many free.
#if CUDART_VERSION >= 12040
#define PROSPARSE_GATE_UP_BOUNDS(kDown) __maxnreg__((kDown) ? 120 : 128)
#else
#define PROSPARSE_GATE_UP_BOUNDS(kDown) __launch_bounds__(kGateUpThreads, 1)
#endif

// Bytes of what a block that reads down rows as well keeps until then: an h for every place and one of zeros, and a mask for each
// gate pass. The compiler reads four masks at once, also behind the last one.
__host__ __device__ constexpr int h_bytes(int gate_passes) {
  return (gate_passes * kPassRows + 1) * 16 + (gate_passes + 3) / 4 * 16;
}

// kLines: memory lines per warp and weight row, x being kept in registers; 0: any number of them, x in shared memory.
// kAhead: stages of a warp on their way while one is multiplied, not more than it has lines. kRowTiles: rows of x in units of 8.
// kDown: passes of down rows follow, and there is no second kernel; with one row tile, and x in registers.
template <typename T, int kLines, int kRowTiles, int kAhead, bool kDown = false>
__global__ void PROSPARSE_GATE_UP_BOUNDS(kDown) gate_up_kernel(const GateUpArguments arguments) {
  static_assert(kLines == 0 || kAhead <= kLines);
  static_assert(!kDown || (kLines > 0 && kRowTiles == 1));
  constexpr int kStages = kAhead + 1;
  constexpr int kColumns = 8 * kRowTiles;
  constexpr unsigned kColumnLanes = (1u << kColumns) - 1;
  constexpr int kPartialStride = kPassRows * kColumns + 2;  // + 2: no bank conflicts when partial sums are added up
  constexpr int kParts = kWarp / kColumns;

  extern __shared__ __align__(128) unsigned char shared[];  // rings, and x unless it is in registers
  __shared__ __align__(16) float partial[kGateUpWarps * kPartialStride];
  __shared__ float queue_gate[kQueue][kColumns];  // 0 for rows that do not activate the neuron
  __shared__ int queue_neuron[kQueue], queue_place[kQueue];  // place: gate pass * 16 + slot
  __shared__ bool queue_is_last[kQueue];  // of its gate pass, with dReLU
  __shared__ int queue_tail;
  __shared__ uint32_t wanted;  // of the gate pass that has just been computed
  __shared__ int counted_active[kColumns], counted_union;  // active by row

  enum class Weights { kOfGate, kOfUp, kOfDown };
  struct Pass {
    int first;  // neuron, number in the queue, or number among the neurons that have an h
    int count;  // 0: nothing to do
    Weights weights;
  };

  const int rows = arguments.rows, d_model = arguments.d_model, d_ff = arguments.d_ff;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int g = lane / 4, t = lane % 4;
  const int lines = kLines > 0 ? kLines : (line_count(d_model) + kGateUpWarps - 1) / kGateUpWarps;
  const int row_chunks = d_model / kChunk;

  // What follows is the same in every thread of the block.
  const Passes& passes = arguments.passes;
  const int gate_passes = passes.per_block;
  const bool drelu = arguments.drelu;
  int gate_passes_begun = 0, gate_passes_ended = 0, queue_head = 0, up_rows_ended = 0, down_rows_begun = 0;
  // With kDown: h by place, and which neurons of a gate pass have one.
  T* const block_h = reinterpret_cast<T*>(shared + kGateUpWarps * kStages * kStageBytes);
  uint32_t* const block_masks = reinterpret_cast<uint32_t*>(block_h + (gate_passes * kPassRows + 1) * kColumns);
  const auto next_gate_pass = [&]() -> Pass {
    const int pass = gate_passes_begun++ * passes.blocks + blockIdx.x, first = passes.first_neuron(pass);
    return {first, passes.first_neuron(pass + 1) - first, Weights::kOfGate};
  };
  const auto next_down_pass = [&]() -> Pass {
    int count = -down_rows_begun;
    for (int pass = 0; pass < gate_passes; ++pass) count += __popc(block_masks[pass]);
    const int first = down_rows_begun;
    count = min(count, kPassRows);
    down_rows_begun += count;
    return {first, count, Weights::kOfDown};
  };
  // The queue only grows between the two barriers at the end of a gate pass.
  const auto next_pass = [&]() -> Pass {
    const int waiting = queue_tail - queue_head;
    if (gate_passes_begun < gate_passes && waiting < kPassRows) return next_gate_pass();
    // Their h are known by the time that the down rows are there.
    if (kDown && waiting == 0 && gate_passes_ended == gate_passes && (!drelu || up_rows_ended == queue_head)) return next_down_pass();
    const int first = queue_head, count = min(waiting, kPassRows);
    queue_head += count;
    return {first, count, Weights::kOfUp};
  };

  // The weights of a pass, as this thread requests them: rows copied_row + 4 i.
  struct Rows {
    const Chunk* matrix;
    int first_chunk[4];  // of each row in the matrix; -1 for none
  };
  const int copied_row = lane / 8, copied_chunk = lane % 8;
  const auto gate_rows = [&](const Pass& pass) -> Rows {
    Rows result{static_cast<const Chunk*>(arguments.gate_up), {}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int slot = copied_row + 4 * i;
      result.first_chunk[i] = slot < pass.count ? (pass.first + slot) * row_chunks : -1;
    }
    return result;
  };
  const auto gathered_rows = [&](const Chunk* matrix, int first_chunk) -> Rows {  // lane i has the first chunk of row i
    Rows result{matrix, {}};
#pragma unroll
    for (int i = 0; i < 4; ++i) result.first_chunk[i] = __shfl_sync(kAllLanes, first_chunk, copied_row + 4 * i);
    return result;
  };
  const auto up_rows = [&](const Pass& pass) -> Rows {
    return gathered_rows(static_cast<const Chunk*>(arguments.gate_up) + static_cast<int64_t>(d_ff) * row_chunks,
                         lane < pass.count ? queue_neuron[(pass.first + lane) % kQueue] * row_chunks : -1);
  };
  // The place of neuron `number` of those that have an h.
  const auto down_place = [&](int number) {
    int pass = 0, rest = 0, before = 0;
    for (int i = 0; i < gate_passes; ++i) {
      if (before <= number) pass = i, rest = number - before;
      before += __popc(block_masks[i]);
    }
    uint32_t mask = block_masks[pass];
    for (; rest > 0; --rest) mask &= mask - 1;
    return pass * kPassRows + __ffs(mask) - 1;
  };
  const auto down_rows = [&](const Pass& pass) -> Rows {
    int first_chunk = -1;
    if (lane < pass.count) {
      const int place = down_place(pass.first + lane);
      first_chunk = (passes.first_neuron(place / kPassRows * passes.blocks + blockIdx.x) + place % kPassRows) * row_chunks;
    }
    return gathered_rows(static_cast<const Chunk*>(arguments.down_t), first_chunk);
  };
  const auto rows_of = [&](const Pass& pass) -> Rows {
    if (kDown && pass.weights == Weights::kOfDown) return down_rows(pass);
    return pass.weights == Weights::kOfUp ? up_rows(pass) : gate_rows(pass);
  };
  // Chunk c of row r of a stage lies at place c ^ swizzle(r): the two rows that a quarter of a warp reads at once meet no bank
  // twice, nor do eight rows of which the same chunk is read.
  const auto swizzle = [](int row) { return row % 2 * 4 + row / 2 % 4; };
  const uint32_t ring = shared_address(shared + warp * kStages * kStageBytes);
  int next_stage = 0;  // to be requested
  const auto request = [&](const Rows& from, int line) {
    const int chunk = (warp + kGateUpWarps * line) * (kLine / kChunk) + copied_chunk;
    const uint32_t stage = ring + next_stage * kStageBytes;
    next_stage = next_stage == kStages - 1 ? 0 : next_stage + 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = from.first_chunk[i] >= 0 && chunk < row_chunks;
      const int row = copied_row + 4 * i;
      copy_async(stage + row * kLineBytes + (copied_chunk ^ swizzle(row)) * 16,
                 from.matrix + (exists ? static_cast<unsigned>(from.first_chunk[i] + chunk) : 0u), exists);
    }
    end_copy_group();
  };

  Pass current = next_gate_pass();
  Rows current_rows = gate_rows(current);
#pragma unroll
  for (int line = 0; line < kAhead; ++line) request(current_rows, line);
  // The stage with a memory line of the current pass, once it is there; a line further on is requested meanwhile.
  const auto next_line = [&](int line, const Rows& next_rows) -> uint32_t {
    wait_for_copies<kAhead - 1>();
    __syncwarp();
    // The oldest stage is the next one but one to be requested; what takes the place of the one before it comes first.
    const int oldest = next_stage == kStages - 1 ? 0 : next_stage + 1;
    const bool same_pass = line + kAhead < lines;
    request(same_pass ? current_rows : next_rows, same_pass ? line + kAhead : line + kAhead - lines);
    return ring + oldest * kStageBytes;
  };

  if (threadIdx.x == 0) queue_tail = 0, wanted = 0, counted_union = 0;
  if (threadIdx.x < kColumns) counted_active[threadIdx.x] = 0;
  if (threadIdx.x < kQueue) queue_is_last[threadIdx.x] = false;
  if constexpr (kDown) {
    for (int pass = threadIdx.x; pass < gate_passes; pass += kGateUpThreads) block_masks[pass] = 0;
    if (threadIdx.x < kColumns) block_h[gate_passes * kPassRows * kColumns + threadIdx.x] = from_float<T>(0);
  }
  // Everything above reads weights only; x and the scratch memory belong to the predecessor.
  wait_for_predecessor();
  const auto x_chunk = [&](int row, int element) {
    const T* const from = static_cast<const T*>(arguments.x) + static_cast<int64_t>(row) * d_model + element;
    return row < rows && element < d_model ? __ldcg(reinterpret_cast<const Chunk*>(from)) : Chunk{};
  };
  Chunk x_registers[kLines > 0 ? kLines : 1][2][kRowTiles];
  unsigned char* const x_shared = shared + kGateUpWarps * kStages * kStageBytes;
  const int x_stride = x_stride_bytes(d_model);
  if constexpr (kLines > 0) {
#pragma unroll
    for (int line = 0; line < kLines; ++line)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile)
          x_registers[line][half][tile] =
              x_chunk(g + 8 * tile, (warp + kGateUpWarps * line) * kLine + half * (kLine / 2) + t * kChunk);
  } else {
    for (int row = 0; row < rows; ++row)
      for (int i = threadIdx.x; i < line_count(d_model) * (kLine / kChunk); i += kGateUpThreads)
        *reinterpret_cast<Chunk*>(x_shared + row * x_stride + i * 16) = x_chunk(row, i * kChunk);
  }
  const auto x_of = [&](int line, int half, int tile) {
    if constexpr (kLines > 0) return x_registers[line][half][tile];
    // Zeros for what is not there, weights are zero then, too: a product with an infinity would be seen.
    const int row = g + 8 * tile, at = (warp + kGateUpWarps * line) * kLineBytes + half * (kLineBytes / 2) + t * 16;
    return row < rows && at < x_stride - kLineBytes / 2 ? *reinterpret_cast<const Chunk*>(x_shared + row * x_stride + at) : Chunk{};
  };
  // What the second kernel waits for.
  if (!kDown && warp == 0 && !arguments.gates) {
    for (int pass = lane; pass < gate_passes; pass += kWarp) arguments.masks[blockIdx.x * gate_passes + pass] = 0;
    const int h_chunks = gate_passes * kPassRows * kRowTiles;
    for (int i = lane; i < h_chunks; i += kWarp)
      static_cast<Chunk*>(arguments.h)[blockIdx.x * h_chunks + i] = {kMissing, kMissing, kMissing, kMissing};
  }
  __syncthreads();
  const int column = lane % kColumns;
  const bool real = column < rows && !(arguments.is_padding && arguments.is_padding[column]);

  while (current.count > 0 && current.weights != Weights::kOfDown) {
    Pass next = next_pass();
    const Rows next_rows = rows_of(next);
    float sums[kRowTiles][4] = {};
    const auto multiply = [&](int line) {
      const uint32_t row_g = next_line(line, next_rows) + g * kLineBytes + (t ^ swizzle(g)) * 16;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Chunk low = load_shared(row_g ^ (half * 64)), high = load_shared((row_g ^ (half * 64)) + 8 * kLineBytes);
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
          const Chunk v = x_of(line, half, tile);
          mma<T>(sums[tile], low.x, high.x, low.y, high.y, v.x, v.y);
          mma<T>(sums[tile], low.z, high.z, low.w, high.w, v.z, v.w);
        }
      }
    };
    if constexpr (kLines > 0) {
#pragma unroll
      for (int line = 0; line < kLines; ++line) multiply(line);
    } else {
      for (int line = 0; line < lines; ++line) multiply(line);
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

    if (current.weights == Weights::kOfUp) {
      // where(active, gate, 0) * up, so that an infinite up value shows as in the dense layer; padding has no output.
      const int number = (current.first + warp) % kQueue;
      bool has_h = real;
      if (drelu) {
        has_h = inside && real && queue_gate[number][column] != 0 && !(value <= arguments.threshold);
        const unsigned rows_active = __ballot_sync(kAllLanes, has_h) & kColumnLanes;
        if (lane == 0 && rows_active) {
          const int place = queue_place[number];
          uint32_t* const masks = kDown ? block_masks : arguments.masks + blockIdx.x * gate_passes;
          atomicOr(masks + place / kPassRows, 1u << place % kPassRows);
          atomicAdd(&counted_union, 1);
        }
        if (has_h && lane < kColumns) atomicAdd(counted_active + lane, 1);
      }
      if (inside && lane < kColumns) {
        const T h = from_float<T>(has_h ? queue_gate[number][lane] * value : 0.0f);
        const int place = queue_place[number];
        if constexpr (kDown) {
          block_h[place * kColumns + lane] = h;
        } else {
          store_relaxed(static_cast<T*>(arguments.h) + (blockIdx.x * gate_passes * kPassRows + place) * kColumns + lane, h);
        }
      }
      up_rows_ended += current.count;
    } else {
      const bool active = inside && real && !(value <= arguments.threshold);
      const unsigned rows_active = __ballot_sync(kAllLanes, active) & kColumnLanes;
      // A gate of -inf comes from an infinite x: its up value is no number that the dense layer would ignore, but for dReLU.
      const bool has_h = __any_sync(kAllLanes, active || (inside && real && value == -INFINITY && !drelu));
      if (arguments.gates) {
        if (inside && lane < rows) arguments.gates[static_cast<int64_t>(lane) * d_ff + current.first + warp] = value;
      } else if (has_h) {
        int number = 0;
        if (lane == 0) {
          number = atomicAdd(&queue_tail, 1) % kQueue;
          queue_neuron[number] = current.first + warp;
          queue_place[number] = gate_passes_ended * kPassRows + warp;
          if constexpr (!kDown) atomicOr(&wanted, 1u << warp);
          if (kDown && !drelu) atomicOr(block_masks + gate_passes_ended, 1u << warp);
          if (rows_active && !drelu) atomicAdd(&counted_union, 1);
        }
        number = __shfl_sync(kAllLanes, number, 0);
        if (lane < kColumns) queue_gate[number][lane] = active ? value : 0.0f;
        if (lane < kColumns && active && !drelu) atomicAdd(counted_active + lane, 1);
      }
      ++gate_passes_ended;
    }
    __syncthreads();
    if (kDown) {
      if (threadIdx.x == 0 && gate_passes_ended == 1) let_successor_start();
    } else if (threadIdx.x == 0 && current.weights == Weights::kOfGate && !arguments.gates) {
      if (gate_passes_ended == 1) {
        // The second kernel may start once every block is here: what it waits for is no longer what an earlier call left. It
        // does not start before blocks end, and the fence is not waited for by now.
        __threadfence();
        let_successor_start();
      }
      uint32_t* const mask = arguments.masks + blockIdx.x * gate_passes + gate_passes_ended - 1;
      if (!drelu || wanted == 0) {
        store_relaxed(mask, wanted | kDone);
      } else {
        queue_is_last[(queue_tail - 1) % kQueue] = true;
      }
      wanted = 0;
    }
    if (!kDown && threadIdx.x == 0 && current.weights == Weights::kOfUp && drelu) {
      for (int i = 0; i < current.count; ++i) {
        const int number = (current.first + i) % kQueue;
        if (!queue_is_last[number]) continue;
        queue_is_last[number] = false;
        // Behind the barrier, and so behind what other warps have put into the same mask.
        atomicOr(arguments.masks + blockIdx.x * gate_passes + queue_place[number] / kPassRows, kDone);
      }
    }

    current_rows = next_rows;
    if (next.count == 0) {
      // Nothing was known to be needed when this pass began: the stages requested for it are empty. Request them again.
      next = next_pass();
      if (next.count > 0) {
        current_rows = rows_of(next);
        wait_for_copies<0>();
        __syncwarp();
        next_stage = next_stage == kStages - 1 ? 0 : next_stage + 1;  // kAhead before it, in a ring of kAhead + 1
#pragma unroll
        for (int line = 0; line < kAhead; ++line) request(current_rows, line);
      }
    }
    current = next;
  }

  if (!arguments.gates && warp == 0) {
    const int of_row = lane < kColumns ? counted_active[lane] : 0;
    const int of_block = __reduce_add_sync(kAllLanes, of_row);
    if (arguments.row_active && of_row) atomicAdd(arguments.row_active + lane, of_row);
    if (lane == 0) {
      const auto add = [&](int kind, int count) {
        atomicAdd(reinterpret_cast<unsigned long long*>(arguments.counters) + kind, static_cast<unsigned long long>(count));
      };
      if (of_block) add(1, of_block);
      if (counted_union) add(2, counted_union);
      if (blockIdx.x == 0) {
        int real_rows = rows;
        for (int row = 0; arguments.is_padding && row < rows; ++row) real_rows -= arguments.is_padding[row];
        if (real_rows) add(0, real_rows), add(3, 1);
      }
    }
  }

  if constexpr (kDown) {
    // A warp has the columns of y whose weights it requests: no sum leaves it. m of the product is the column, k the neuron.
    float sums[kLines][kLine / 16][4] = {};
    while (current.count > 0) {
      const Pass next = next_pass();
      const Rows next_rows = down_rows(next);
      const int place = lane < current.count ? down_place(current.first + lane) : gate_passes * kPassRows;
      uint32_t b[2];
      load_transposed(b, shared_address(block_h + place * kColumns));
#pragma unroll
      for (int line = 0; line < kLines; ++line) {
        const uint32_t stage = next_line(line, next_rows);
#pragma unroll
        for (int i = 0; i < kLine / 16; ++i) {
          const int row = lane % 8 + lane / 16 * 8, chunk = 2 * i + lane / 8 % 2;
          uint32_t a[4];
          load_transposed(a, stage + row * kLineBytes + (chunk ^ swizzle(row)) * 16);
          mma<T>(sums[line][i], a[0], a[1], a[2], a[3], b[0], b[1]);
        }
      }
      current = next;
      current_rows = next_rows;
    }
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
#pragma unroll
      for (int i = 0; i < kLine / 8; ++i) {
        const int y_column = (warp + kGateUpWarps * line) * kLine + i * 8 + g;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = 2 * t + j;
          if (row < rows && y_column < d_model)
            arguments.shares[(static_cast<int64_t>(blockIdx.x) * rows + row) * d_model + y_column] = sums[line][i / 2][i % 2 * 2 + j];
        }
      }
    }
  }
  wait_for_copies<0>();
}

}  // namespace prosparse::cuda

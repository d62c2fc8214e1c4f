// The second kernel: y = h @ down_t over the neurons that have an h.
//
// The grid is splits x column groups: a split takes the neurons of some consecutive blocks of the first kernel, a column group
// 512 columns of y. A warp reads the same 64 columns of all down rows of its neurons: side by side, the warps read long pieces of
// each row at nearly the same time, which the memory needs to be fast. Every warp keeps a ring of tiles of its own in shared
// memory, [16 neurons] x [64 columns], most of them still on their way. A block starts as soon as the blocks it depends on know which
// neurons are active, waits for each h by itself, and adds its sums up in an order that only the input determines.
#pragma once

#include "device.cuh"
#include "gate_up.cuh"

namespace prosparse::cuda {

constexpr int kDownWarps = 16;
constexpr int kDownThreads = kDownWarps * kWarp;
constexpr int kTileNeurons = 16;  // k of the tensor-core product
constexpr int kTileColumns = 64;  // columns of a warp: a memory line of each row
constexpr int kTileBytes = kTileNeurons * kTileColumns * 2;
constexpr int kColumnWarps = 8;  // lie side by side; the others share the split's neurons out
constexpr int kNeuronWarps = kDownWarps / kColumnWarps;
constexpr int kDownColumns = kColumnWarps * kTileColumns;  // of y, per block

struct DownArguments {
  const uint32_t* masks;  // [blocks, gate passes]
  const void* h;          // [blocks, gate passes, 16, 8 * row tiles]
  const void* down_t;     // [d_ff, d_model]
  float* shares;          // [splits, rows, d_model]
  Passes passes;
  int neuron_capacity;  // of one split, at most; a multiple of 16
  int rows;
  int d_model;
};

// kStages: tiles in a ring.
template <typename T, int kRowTiles, int kStages>
__global__ void __launch_bounds__(kDownThreads, 1) down_kernel(const DownArguments arguments) {
  constexpr int kColumns = 8 * kRowTiles;  // of h: rows of x and y
  constexpr int kRowBytes = kTileColumns * 2;

  extern __shared__ __align__(128) unsigned char shared[];
  T* const h_shared = reinterpret_cast<T*>(shared + kDownWarps * kStages * kTileBytes);  // [neuron][column]
  int* const list = reinterpret_cast<int*>(h_shared + arguments.neuron_capacity * kColumns);  // of the split's neurons
  int* const places = list + arguments.neuron_capacity;  // of their h: gate pass * 16 + slot

  const int rows = arguments.rows, d_model = arguments.d_model;
  const Passes& passes = arguments.passes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int column_warp = warp % kColumnWarps, neuron_warp = warp / kColumnWarps;
  const int first_block = passes.blocks * blockIdx.x / gridDim.x, end_block = passes.blocks * (blockIdx.x + 1) / gridDim.x;

  let_successor_start();

  // List the neurons, in the order of blocks, passes and slots: a warp takes every 16th pass. Each lane waits for a mask; all
  // blocks of the first kernel are running by now, or done.
  const int first_pass = first_block * passes.per_block, pass_count = (end_block - first_block) * passes.per_block;
  int neurons = 0;
  for (int start = 0; start < pass_count; start += kWarp) {
    uint32_t mask = 0;
    if (start + lane < pass_count) {
      const uint32_t* const from = arguments.masks + first_pass + start + lane;
      while (mask = load_relaxed(from), !(mask & kDone)) __nanosleep(100);
      mask ^= kDone;
    }
    __syncwarp();
    int end = __popc(mask);  // of this pass and those before it
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, offset);
      if (lane >= offset) end += before;
    }
    for (int i = warp; i < min(kWarp, pass_count - start); i += kDownWarps) {
      const uint32_t pass_mask = __shfl_sync(kAllLanes, mask, i);
      const int to = neurons + __shfl_sync(kAllLanes, end, i) - __popc(pass_mask >> (lane % kPassRows));
      if (lane >= kPassRows || !(pass_mask >> lane & 1)) continue;
      const int pass = first_pass + start + i;
      const int block = pass / passes.per_block, pass_of_block = pass % passes.per_block;
      list[to] = passes.first_neuron(pass_of_block * passes.blocks + block) + lane;
      places[to] = pass * kPassRows + lane;
    }
    neurons += __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  const int all_tiles = (neurons + kTileNeurons - 1) / kTileNeurons;
  __syncthreads();

  const auto load_h = [&](int i) {
    return load_relaxed(static_cast<const Chunk*>(arguments.h) + places[i / kRowTiles] * kRowTiles + i % kRowTiles);
  };
  // For most blocks they are there by now, and faster ahead of the down rows than behind them.
  Chunk first_h{};
  if (threadIdx.x < neurons * kRowTiles) first_h = load_h(threadIdx.x);

  const uint32_t ring = shared_address(shared + warp * kStages * kTileBytes);
  const int tiles = (all_tiles - neuron_warp + kNeuronWarps - 1) / kNeuronWarps;
  // Row r of a tile holds its chunk c at place c ^ (r % 8): reading a column of chunks meets no bank twice.
  const int copied_row = lane / 8, copied_chunk = lane % 8;
  const int first_column = (blockIdx.y * kColumnWarps + column_warp) * kTileColumns;
  const bool inside = first_column + copied_chunk * kChunk < d_model;
  const T* const down_t = static_cast<const T*>(arguments.down_t) + (inside ? first_column + copied_chunk * kChunk : 0);
  const auto request = [&](int tile) {
    if (tile < tiles) {
      const uint32_t stage = ring + tile % kStages * kTileBytes;
#pragma unroll
      for (int i = 0; i < kTileNeurons / 4; ++i) {
        const int row = i * 4 + copied_row, place = (tile * kNeuronWarps + neuron_warp) * kTileNeurons + row;
        const bool exists = place < neurons && inside;
        const T* const from = exists ? down_t + static_cast<int64_t>(list[place]) * d_model : down_t;
        copy_async(stage + row * kRowBytes + ((copied_chunk ^ (row % 8)) * 16), from, exists);
      }
    }
    end_copy_group();  // an empty one, too: the ring counts groups
  };

#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) request(tile);
  // The h, as soon as the first kernel has them; the down rows are on their way meanwhile.
  for (int i = threadIdx.x; i < all_tiles * kTileNeurons * kRowTiles; i += kDownThreads) {
    Chunk h{};
    if (i < neurons * kRowTiles) {
      h = i == threadIdx.x ? first_h : load_h(i);
      while (is_missing(h)) h = load_h(i);
    }
    reinterpret_cast<Chunk*>(h_shared)[i] = h;
  }
  __syncthreads();
  float d[kRowTiles][kTileColumns / 16][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<kStages - 2>();
    __syncwarp();
    request(tile + kStages - 1);
    const uint32_t stage = ring + tile % kStages * kTileBytes;
    const uint32_t h =
        shared_address(h_shared + ((tile * kNeuronWarps + neuron_warp) * kTileNeurons + lane % kTileNeurons) * kColumns);
    uint32_t b[kRowTiles][2];
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) load_transposed(b[row_tile], h + row_tile * 16);
#pragma unroll
    for (int i = 0; i < kTileColumns / 16; ++i) {
      // m of the product is the column, k the neuron: matrices (k, m) = (0, 0), (0, 1), (1, 0), (1, 1) of 8 x 8.
      const int row = lane % 8 + lane / 16 * 8, chunk = 2 * i + lane / 8 % 2;
      uint32_t a[4];
      load_transposed(a, stage + row * kRowBytes + ((chunk ^ (row % 8)) * 16));
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile)
        mma<T>(d[row_tile][i], a[0], a[1], a[2], a[3], b[row_tile][0], b[row_tile][1]);
    }
  }

  wait_for_copies<0>();
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(shared);  // [neuron warp but the first][row][column], where the rings were
  const auto for_each_sum = [&](auto&& body) {
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = row_tile * 8 + lane % 4 * 2 + i;
#pragma unroll
        for (int j = 0; j < kTileColumns / 8; ++j)
          if (row < rows) body(row, column_warp * kTileColumns + 8 * j + lane / 4, d[row_tile][j / 2][i + j % 2 * 2]);
      }
    }
  };
  if (neuron_warp > 0)
    for_each_sum([&](int row, int column, float sum) { sums[((neuron_warp - 1) * rows + row) * kDownColumns + column] = sum; });
  __syncthreads();
  if (neuron_warp == 0) {
    for_each_sum([&](int row, int column, float sum) {
#pragma unroll
      for (int other = 0; other < kNeuronWarps - 1; ++other) sum += sums[(other * rows + row) * kDownColumns + column];
      const int y_column = blockIdx.y * kDownColumns + column;
      if (y_column < d_model) arguments.shares[(static_cast<int64_t>(blockIdx.x) * rows + row) * d_model + y_column] = sum;
    });
  }
  wait_for_predecessor();  // for the sake of what follows this kernel and relies on the first one's end
}

}  // namespace prosparse::cuda

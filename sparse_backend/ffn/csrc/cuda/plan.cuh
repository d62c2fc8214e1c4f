// How a call of the sparse path is divided into blocks, for any card and shape. Host code only: it is tested without a card.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include "down.cuh"
#include "gate_up.cuh"
#include "kernels.h"

namespace prosparse::cuda {

struct Card {
  int multiprocessors;
  int shared_memory;  // bytes a block may have: 99 KB or more from compute capability 8.0 on
};

constexpr int kMaxRowTiles = 2;
// The kernels count in 32 bits, products of block numbers among it.
constexpr int64_t kMaxNeurons = int64_t{1} << 24;
// Weights and their places are counted in chunks of 8 values, in 31 bits.
constexpr int64_t kMaxChunks = INT_MAX;
// Static shared memory of the first kernel, at most: partial sums and the queue.
constexpr int kGateUpStaticBytes = 22 * 1024;
// Stages of the first kernel on their way, tiles in a ring of the second one: deep where there is room for it.
constexpr int kDeepAhead = 4, kShallowAhead = 1;
constexpr int kDeepStages = 5, kShallowStages = 2;
// Lanes of the last kernel that read a share side by side, 16 bytes each.
constexpr int kManyLanes = 32, kFewLanes = 16, kFewestLanes = 8;
// Lines whose sums of y fit into registers.
constexpr int kMostLinesWithDown = 5;

inline int row_tiles(int64_t rows) { return rows <= 8 ? 1 : 2; }

template <typename Integer>
constexpr Integer ceil_div(Integer value, Integer divisor) {
  return (value + divisor - 1) / divisor;
}

// Memory lines of each weight row that a warp of the first kernel takes, as the kernels are compiled for: x is in registers then.
// 0: more of them, x is in shared memory.
inline int lines_in_registers(int row_tiles, int64_t d_model) {
  for (const int lines : {2, 3, 4, 5, 8})
    if (lines <= (row_tiles == 1 ? 8 : 5) && d_model <= int64_t{lines} * kGateUpWarps * kLine) return lines;
  return 0;
}

// Dynamic shared memory of the kernels, in bytes.
inline int gate_up_shared_memory(int ahead, int lines, int rows, int d_model) {
  const int stages = (lines > 0 ? std::min(ahead, lines) : ahead) + 1;
  return kGateUpWarps * stages * kStageBytes + (lines > 0 ? 0 : rows * x_stride_bytes(d_model));
}

inline int down_shared_memory(int stages, int row_tiles, int neuron_capacity) {
  return kDownWarps * stages * kTileBytes + neuron_capacity * (row_tiles * 16 + 8);
}

// As many rows of x as fit into registers or shared memory.
inline int most_rows(const Card& card, int64_t d_model) {
  if (lines_in_registers(kMaxRowTiles, d_model)) return 8 * kMaxRowTiles;
  const int in_registers = lines_in_registers(1, d_model) ? 8 : 0;
  const int room = card.shared_memory - kGateUpStaticBytes - gate_up_shared_memory(kShallowAhead, 0, 0, 0);
  if (d_model > room) return in_registers;  // not one row in shared memory, and perhaps more than an int holds
  return std::clamp(room / x_stride_bytes(static_cast<int>(d_model)), in_registers, 8 * kMaxRowTiles);
}

// What the kernels can work on: most_rows, and as many neurons and weights as they can count.
inline bool is_supported(const Card& card, const Shape& shape) {
  return shape.rows > 0 && shape.rows <= most_rows(card, shape.d_model) && shape.d_ff <= kMaxNeurons &&
         shape.d_ff * (shape.d_model / kChunk) <= kMaxChunks;
}

// For a supported shape: the grids, and where the scratch memory holds what, in bytes from its start.
struct Plan {
  Passes passes;              // of the first kernel, one block per multiprocessor unless there are very many neurons for them
  int column_groups, splits;  // of the second one, nearly as many blocks
  int neuron_capacity;        // of a split, at most
  int lines, ahead;           // of the first kernel
  int stages;                 // of the second one
  bool down_in_first;         // there is no second one
  int share_count;            // of y
  int share_lanes;            // of the last kernel: few of them where that makes enough blocks
  int64_t masks = 0, h, shares, size;

  Plan(const Card& card, const Shape& shape) {
    const int d_model = static_cast<int>(shape.d_model), d_ff = static_cast<int>(shape.d_ff), tiles = row_tiles(shape.rows);
    // A split's neurons must fit into shared memory beside the rings. Where they would not, there are more and smaller
    // blocks, some of which start when others have ended: no block waits for one that is not running yet.
    const int ring_bytes = down_shared_memory(kShallowStages, tiles, 0), pass_bytes = down_shared_memory(0, tiles, kPassRows);
    const int most_passes = (card.shared_memory - ring_bytes) / pass_bytes;
    const int least_blocks = ceil_div(d_ff, most_passes * kPassRows);
    passes = Passes::deal_out(d_ff, std::max(std::min(card.multiprocessors, d_ff / 8), least_blocks));
    column_groups = ceil_div(d_model, kDownColumns);
    const int least_splits = ceil_div(passes.blocks, most_passes / passes.per_block);
    splits = std::clamp(card.multiprocessors / column_groups, least_splits, passes.blocks);
    neuron_capacity = ceil_div(passes.blocks, splits) * passes.per_block * kPassRows;
    lines = lines_in_registers(tiles, shape.d_model);
    const int rows = static_cast<int>(shape.rows), room = card.shared_memory - kGateUpStaticBytes;
    ahead = gate_up_shared_memory(kDeepAhead, lines, rows, d_model) <= room ? kDeepAhead : kShallowAhead;
    stages = down_shared_memory(kDeepStages, tiles, neuron_capacity) <= card.shared_memory ? kDeepStages : kShallowStages;
    // One block on each multiprocessor, beside one of the first kernel, can add shares up as soon as they are there. Where they suffice,
    // leaving the second kernel out pays: measured on an H200 for widths of 1536 to 5120 and 1 to 4 rows.
    const auto share_blocks = [&](int of_lanes) { return ceil_div(d_model, 4 * of_lanes) * rows; };
    down_in_first = tiles == 1 && lines > 0 && lines <= kMostLinesWithDown && share_blocks(kFewLanes) <= card.multiprocessors &&
                    gate_up_shared_memory(ahead, lines, rows, d_model) + h_bytes(passes.per_block) <= room;
    share_count = down_in_first ? passes.blocks : splits;
    if (down_in_first) {
      share_lanes = share_blocks(kFewestLanes) <= card.multiprocessors ? kFewestLanes : kFewLanes;
    } else {
      share_lanes = d_model * rows < 4096 ? kFewestLanes : kManyLanes;
    }

    constexpr int64_t kAlignment = 256;
    const auto aligned = [](int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; };
    const int64_t pass_count = static_cast<int64_t>(passes.blocks) * passes.per_block;
    h = aligned(pass_count * 4);
    shares = aligned(h + pass_count * kPassRows * tiles * 16);
    size = shares + share_count * shape.rows * shape.d_model * 4;
  }
};

}  // namespace prosparse::cuda

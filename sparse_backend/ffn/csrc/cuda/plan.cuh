// How a call of the sparse path is divided into blocks, for any card and shape. Host code only: it is tested without a card.
#pragma once

#include <algorithm>
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
// Static shared memory of the first kernel, at most: partial sums and the queue.
constexpr int kGateUpStaticBytes = 26 * 1024;
// Tiles in a ring of the second kernel: deep where there is room for it.
constexpr int kDeepStages = 3, kShallowStages = 2;

inline int row_tiles(int64_t rows) { return rows <= 8 ? 1 : 2; }

template <typename Integer>
constexpr Integer ceil_div(Integer value, Integer divisor) {
  return (value + divisor - 1) / divisor;
}

// Dynamic shared memory of the kernels, in bytes.
inline int gate_up_shared_memory(int rows, int d_model) { return rows * x_stride_bytes(d_model); }

inline int down_shared_memory(int stages, int row_tiles, int neuron_capacity) {
  return kDownWarps * stages * kTileBytes + neuron_capacity * (row_tiles * 16 + 4);
}

// As many rows of x as fit into shared memory.
inline int most_rows(const Card& card, int64_t d_model) {
  const int room = card.shared_memory - kGateUpStaticBytes;
  if (d_model > room) return 0;  // not one row, and perhaps more than an int holds
  return std::clamp(room / x_stride_bytes(static_cast<int>(d_model)), 0, 8 * kMaxRowTiles);
}

// What the kernels can work on: most_rows, and as many neurons as they can count.
inline bool is_supported(const Card& card, const Shape& shape) {
  return shape.rows > 0 && shape.rows <= most_rows(card, shape.d_model) && shape.d_ff <= kMaxNeurons;
}

// For a supported shape: the grids, and where the scratch memory holds what, in bytes from its start.
struct Plan {
  Passes passes;              // of the first kernel, one block per multiprocessor unless there are very many neurons for them
  int column_groups, splits;  // of the second one, nearly as many blocks
  int neuron_capacity;        // of a split, at most
  int stages;
  int64_t masks = 0, h, shares, size;

  Plan(const Card& card, const Shape& shape) {
    const int d_model = static_cast<int>(shape.d_model), d_ff = static_cast<int>(shape.d_ff), tiles = row_tiles(shape.rows);
    // A split's neurons must fit into shared memory beside the rings. Where they would not, there are more and smaller
    // blocks, some of which start when others have ended: no block waits for one that is not running yet.
    const int ring_bytes = down_shared_memory(kShallowStages, tiles, 0), pass_bytes = down_shared_memory(0, tiles, kPassRows);
    const int most_passes = (card.shared_memory - ring_bytes) / pass_bytes;
    const int least_blocks = ceil_div(d_ff, std::min(most_passes, kMaxGatePasses) * kPassRows);
    passes = Passes::deal_out(d_ff, std::max(std::min(card.multiprocessors, d_ff / 8), least_blocks));
    column_groups = ceil_div(d_model, kDownColumns);
    const int least_splits = ceil_div(passes.blocks, most_passes / passes.per_block);
    splits = std::clamp(card.multiprocessors / column_groups, least_splits, passes.blocks);
    neuron_capacity = ceil_div(passes.blocks, splits) * passes.per_block * kPassRows;
    stages = down_shared_memory(kDeepStages, tiles, neuron_capacity) <= card.shared_memory ? kDeepStages : kShallowStages;

    constexpr int64_t kAlignment = 256;
    const auto aligned = [](int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; };
    const int64_t pass_count = static_cast<int64_t>(passes.blocks) * passes.per_block;
    h = aligned(pass_count * 4);
    shares = aligned(h + pass_count * kPassRows * tiles * 16);
    size = shares + splits * shape.rows * shape.d_model * 4;
  }
};

}  // namespace prosparse::cuda

// Dot products of weight rows with the rows of x: out[n][r] = w[n] . x[r], accumulated in float32.
//
// K, one instruction set and one dtype (see traits_*.h), offers here:
//   Weight, Input              element types of the weights and of the packed x
//   Vec, kLanes                a vector of float32 accumulators
//   kDotStep, kInputStep       weights and packed inputs that one step consumes
//   kDotNeurons, kDotRows      the register tile
//   kDotBlock                  weights per row in one block, so that the x of a register tile stays in L1
//   kTileRows                  from so many rows on tile_dots takes over, 16 neurons x 32 rows (0: there is none)
#pragma once

#include "support.h"

namespace prosparse::cpu {
namespace {

constexpr int kChunkRows = 32;    // rows that share one pass over the weights; x and y of a chunk fit in L2
constexpr int kNeuronBlock = 16;  // neurons handed to the dot products at once

// x of one chunk of rows in the layout the dot products read, padded with zeros to whole steps.
template <class K>
struct PackedInput {
  int64_t stride;
  typename K::Input* rows;
  typename K::Input* tiles = nullptr;

  PackedInput(Arena& arena, int64_t d_model)
      : stride(round_up<int64_t>(d_model, K::kDotStep) / K::kDotStep * K::kInputStep),
        rows(arena.take<typename K::Input>(kChunkRows * stride)) {
    if constexpr (K::kTileRows > 0) tiles = arena.take<typename K::Input>(kChunkRows * stride);
  }

  void fill(const typename K::Weight* x, int count, int64_t d_model) const {
    for (int r = 0; r < count; ++r) K::pack_input(x + r * d_model, d_model, rows + r * stride);
    if constexpr (K::kTileRows > 0) {
      if (count >= K::kTileRows) K::pack_tiles(rows, stride, count, tiles);
    }
  }
};

// Sums that wait for the next block of d_model: [kNeuronBlock][kChunkRows][kLanes].
template <class K>
constexpr int64_t kCarrySize = int64_t{kNeuronBlock} * kChunkRows * K::kLanes;

template <class K>
struct DotTile {
  const typename K::Weight* const* w;      // [kDotNeurons] rows
  const typename K::Weight* const* ahead;  // [kDotNeurons] rows that are read next: requested line by line, or null
  int64_t at;                              // first weight of the block in each of them
  int64_t steps;
  const typename K::Input* x;
  int64_t x_stride;
  float* carry;
  bool carry_in;
  bool carry_out;
  float* out;
  int64_t out_stride;

  template <int R, bool kAhead>
  void run() const {
    constexpr int N = K::kDotNeurons;
    // Every loop over the register tile is unrolled: otherwise the compiler keeps the tile in memory.
    typename K::Vec sum[N][R];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sum[n][r] = carry_in ? K::load(carry + (n * kChunkRows + r) * K::kLanes) : K::zero();
      }
    }
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t k = at + s * K::kDotStep;
      typename K::WeightVec weight[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        weight[n] = K::load_weights(w[n] + k);
        if constexpr (kAhead) __builtin_prefetch(ahead[n] + k, 0, 2);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const typename K::InputVec input = K::load_input(x + r * x_stride + s * K::kInputStep);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[n][r] = K::dot(sum[n][r], weight[n], input);
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        if (carry_out) {
          K::store(carry + (n * kChunkRows + r) * K::kLanes, sum[n][r]);
        } else {
          out[n * out_stride + r] = K::sum(sum[n][r]);
        }
      }
    }
  }

  template <int R = K::kDotRows>
  void run(int rows) const {
    if (rows == R) {
      ahead ? run<R, true>() : run<R, false>();
    } else if constexpr (R > 1) {
      run<R - 1>(rows);
    }
  }
};

// w and ahead (rows to request meanwhile): `neurons` pointers each, a multiple of K::kDotNeurons and at most kNeuronBlock.
// out [neurons][rows].
template <class K>
void register_dots(const typename K::Weight* const* w, const typename K::Weight* const* ahead, int neurons,
                   const PackedInput<K>& x, int rows, int64_t d_model, float* carry, float* out) {
  using Weight = typename K::Weight;
  const int64_t whole = d_model / K::kDotStep * K::kDotStep;
  const int64_t tail = d_model - whole;
  const int groups = (rows + K::kDotRows - 1) / K::kDotRows;
  const int64_t block = groups > 1 ? K::kDotBlock : round_up<int64_t>(d_model, K::kDotStep);

  alignas(kAlignment) Weight tail_weights[kNeuronBlock][K::kDotStep] = {};
  const Weight* tail_rows[kNeuronBlock];
  if (tail) {
    for (int n = 0; n < neurons; ++n) {
      std::memcpy(tail_weights[n], w[n] + whole, tail * sizeof(Weight));
      tail_rows[n] = tail_weights[n];
    }
  }

  for (int64_t k = 0; k < whole; k += block) {
    const int64_t steps = smaller(block, whole - k) / K::kDotStep;
    const bool last = k + block >= whole && !tail;
    for (int g = 0; g < groups; ++g) {
      const int first = rows * g / groups;
      const int count = rows * (g + 1) / groups - first;
      for (int n = 0; n < neurons; n += K::kDotNeurons) {
        const DotTile<K> tile{w + n,
                              g == 0 ? ahead + n : nullptr,
                              k,
                              steps,
                              x.rows + first * x.stride + k / K::kDotStep * K::kInputStep,
                              x.stride,
                              carry + (n * kChunkRows + first) * K::kLanes,
                              k > 0,
                              !last,
                              out + n * rows + first,
                              rows};
        tile.run(count);
      }
    }
  }
  if (!tail) return;
  for (int g = 0; g < groups; ++g) {
    const int first = rows * g / groups;
    const int count = rows * (g + 1) / groups - first;
    for (int n = 0; n < neurons; n += K::kDotNeurons) {
      const DotTile<K> tile{tail_rows + n,
                            nullptr,
                            0,
                            1,
                            x.rows + first * x.stride + whole / K::kDotStep * K::kInputStep,
                            x.stride,
                            carry + (n * kChunkRows + first) * K::kLanes,
                            whole > 0,
                            false,
                            out + n * rows + first,
                            rows};
      tile.run(count);
    }
  }
}

// As register_dots, by the tile unit where it pays; there w and ahead always hold kNeuronBlock pointers.
template <class K>
void dots(const typename K::Weight* const* w, const typename K::Weight* const* ahead, int neurons, const PackedInput<K>& x,
          int rows, int64_t d_model, float* carry, float* out) {
  if constexpr (K::kTileRows > 0) {
    if (rows >= K::kTileRows) {
      K::tile_dots(w, ahead, neurons, x.tiles, x.stride, rows, d_model, out);
      return;
    }
  }
  register_dots<K>(w, ahead, neurons, x, rows, d_model, carry, out);
}

}  // namespace
}  // namespace prosparse::cpu

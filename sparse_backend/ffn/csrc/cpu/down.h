// The down product over a list of weight rows: y[r] += sum over n of h[r][n] * row[n], accumulated in float32.
//
// K, one instruction set and one dtype (see traits_*.h), offers here:
//   Hidden                     element type of h
//   kDepth                     neurons that one multiply_add joins
//   kColumnVecs, kDownRows     the register tile: column vectors x rows
//   kTileRows                  from so many rows on tile_down takes over, 16 rows x the register tile's columns (0: none)
#pragma once

#include "support.h"

namespace prosparse::cpu {
namespace {

template <class K>
constexpr int kTileColumns = K::kColumnVecs * K::kLanes;

// Neurons and rows of h and y are padded to these. A tile joins 32 neurons; below its rows, that many would be mostly zeros.
template <class K>
constexpr int neuron_padding(int rows) {
  return K::kTileRows > 0 && rows >= K::kTileRows ? 32 : K::kDepth;
}
template <class K>
constexpr int kRowPadding = K::kTileRows > 0 ? 16 : 1;

// Where a register tile takes the weights from: the rows as they lie in memory, the same while it packs them in the order they
// are used for the row groups that follow, or what was packed.
enum class Source { kRows, kRowsToPack, kPacked };

template <class K>
struct DownTile {
  const typename K::Weight* const* rows;
  const typename K::Weight* const* ahead;  // as many rows, of which a tile at ahead_column is requested meanwhile
  int64_t ahead_column;
  int neurons;
  int64_t column;
  float* packed;
  const typename K::Hidden* h;
  int64_t h_stride;
  float* y;
  int64_t y_stride;

  template <int R, Source kSource, bool kAhead>
  void run() const {
    typename K::Vec sum[R][K::kColumnVecs];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < K::kColumnVecs; ++c) sum[r][c] = K::load(y + r * y_stride + c * K::kLanes);
    }
    for (int n = 0; n < neurons; n += K::kDepth) {
      typename K::ColumnVec weight[K::kColumnVecs];
      float* const place = packed + n / K::kDepth * kTileColumns<K>;
      if constexpr (kSource == Source::kPacked) {
        K::load_packed(place, weight);
      } else {
        K::load_columns(rows + n, column, weight);
      }
      if constexpr (kSource == Source::kRowsToPack) K::store_packed(place, weight);
      if constexpr (kAhead) {
        constexpr int64_t kBytes = kTileColumns<K> * sizeof(typename K::Weight);
#pragma GCC unroll 2
        for (int d = 0; d < K::kDepth; ++d) {
          const char* const line = reinterpret_cast<const char*>(ahead[n + d] + ahead_column);
#pragma GCC unroll 4
          for (int64_t b = 0; b < kBytes; b += kAlignment) __builtin_prefetch(line + b, 0, 2);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const typename K::HiddenVec hidden = K::broadcast(h + r * h_stride + n);
#pragma GCC unroll 8
        for (int c = 0; c < K::kColumnVecs; ++c) sum[r][c] = K::multiply_add(sum[r][c], hidden, weight[c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < K::kColumnVecs; ++c) K::store(y + r * y_stride + c * K::kLanes, sum[r][c]);
    }
  }

  template <Source kSource, bool kAhead, int R = K::kDownRows>
  void run(int count) const {
    if (count == R) {
      run<R, kSource, kAhead>();
    } else if constexpr (R > 1) {
      run<kSource, kAhead, R - 1>(count);
    }
  }
};

// Room of one thread for blocks of up to `neurons` rows: a tile in the order it is used, and a tile at the right edge.
template <class K>
struct DownRoom {
  PerThread<float> packed;
  PerThread<typename K::Weight> edge;
  PerThread<const typename K::Weight*> edge_rows;

  DownRoom(Arena& arena, int threads, int neurons)
      : packed(arena.take_each<float>(threads, int64_t{neurons} * kTileColumns<K>)),
        edge(arena.take_each<typename K::Weight>(threads, int64_t{neurons} * kTileColumns<K>)),
        edge_rows(arena.take_each<const typename K::Weight*>(threads, neurons)) {}
};

template <class K>
struct DownBlock {
  const typename K::Weight* const* ahead;  // rows to request meanwhile, as many,
  int64_t ahead_shift;                     // so many columns further on
  const typename K::Weight* const* rows;
  int neurons;                  // a multiple of neuron_padding
  const typename K::Hidden* h;             // [row_count, padded to kRowPadding][h_stride]
  int64_t h_stride;
  int row_count;
  float* y;  // [row_count, padded to kRowPadding][y_stride], whole tiles
  int64_t y_stride;

  // Columns [begin, end); y starts at column `begin`, `end` is a whole number of tiles further or d_model.
  void run(int64_t begin, int64_t end, int64_t d_model, const DownRoom<K>& room, int thread) const {
    const int groups = (row_count + K::kDownRows - 1) / K::kDownRows;
    float* const packed = room.packed(thread);
    for (int64_t column = begin; column < end; column += kTileColumns<K>) {
      DownTile<K> tile{rows,   ahead, column + ahead_shift, neurons, column,
                       packed, h,     h_stride,             y + (column - begin), y_stride};
      if (column + kTileColumns<K> > d_model) use_edge(tile, d_model, room, thread);
      if constexpr (K::kTileRows > 0) {
        if (row_count >= K::kTileRows) {
          for (int n = 0; n < neurons; n += K::kDepth) {
            typename K::ColumnVec weight[K::kColumnVecs];
            K::load_columns(tile.rows + n, tile.column, weight);
            K::store_packed(packed + n / K::kDepth * kTileColumns<K>, weight);
          }
          K::tile_down(packed, ahead, tile.ahead_column, neurons, h, h_stride, row_count, tile.y, y_stride);
          continue;
        }
      }
      for (int g = 0; g < groups; ++g) {
        const int first = row_count * g / groups;
        const int count = row_count * (g + 1) / groups - first;
        DownTile<K> part = tile;
        part.h += first * h_stride;
        part.y += first * y_stride;
        if (g > 0) {
          part.template run<Source::kPacked, false>(count);
        } else if (groups > 1) {
          part.template run<Source::kRowsToPack, true>(count);
        } else {
          part.template run<Source::kRows, true>(count);
        }
      }
    }
  }

 private:
  void use_edge(DownTile<K>& tile, int64_t d_model, const DownRoom<K>& room, int thread) const {
    using Weight = typename K::Weight;
    Weight* const edge = room.edge(thread);
    std::memset(edge, 0, neurons * kTileColumns<K> * sizeof(Weight));
    for (int n = 0; n < neurons; ++n) {
      std::memcpy(edge + n * kTileColumns<K>, rows[n] + tile.column, (d_model - tile.column) * sizeof(Weight));
      room.edge_rows(thread)[n] = edge + n * kTileColumns<K>;
    }
    tile.rows = room.edge_rows(thread);
    tile.column = 0;
  }
};

}  // namespace
}  // namespace prosparse::cpu

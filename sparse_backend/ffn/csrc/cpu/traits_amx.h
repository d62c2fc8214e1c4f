// AMX: bfloat16 by tiles from a few rows on; below that memory is the limit, and AVX-512-BF16 does.
#pragma once

#include <immintrin.h>

#include "traits_avx512.h"

namespace prosparse::cpu {
namespace {

// The tile intrinsics do not tell the compiler which memory they read: it has to be written before them.
inline void publish(const void* memory) { __asm__ volatile("" ::"r"(memory) : "memory"); }

struct AmxBf16 : Avx512Bf16 {
  static constexpr int kTileRows = 5;
  static constexpr int kSide = 16;   // rows and float32 columns of a tile
  static constexpr int kDeep = 32;   // bfloat16 columns of a tile
  static constexpr int64_t kTileElements = int64_t{kSide} * kDeep;

  // Tile registers belong to the thread: claimed for one phase, all eight of full size.
  struct Unit {
    Unit() {
      struct alignas(64) {
        uint8_t palette = 1;
        uint8_t start_row = 0;
        uint8_t reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      publish(&config);
      _tile_loadconfig(&config);
    }
    ~Unit() { _tile_release(); }
    Unit(const Unit&) = delete;
    Unit& operator=(const Unit&) = delete;
  };

  // tiles [row group][step][pair of k][row][2], from rows packed by pack_input.
  static void pack_tiles(const uint16_t* packed, int64_t stride, int rows, uint16_t* tiles) {
    const int64_t steps = stride / kDeep;
    for (int group = 0; group * kSide < rows; ++group) {
      for (int64_t s = 0; s < steps; ++s) {
        uint16_t* const tile = tiles + (group * steps + s) * kTileElements;
        for (int r = 0; r < kSide; ++r) {
          const int row = group * kSide + r;
          for (int k = 0; k < kDeep; ++k) {
            tile[k / 2 * kDeep + r * 2 + k % 2] = row < rows ? packed[row * stride + s * kDeep + k] : 0;
          }
        }
      }
    }
  }

  // Sixteen neurons by up to 32 rows: the weights are the left operand as they lie in memory, x^T is the right one.
  static void tile_dots(const uint16_t* const* w, const uint16_t* const* ahead, int neurons, const uint16_t* tiles,
                        int64_t stride, int rows, int64_t d_model, float* out) {
    const int64_t steps = stride / kDeep;
    const bool two_groups = rows > kSide;
    bool evenly_spaced = true;
    for (int n = 1; n < kSide; ++n) evenly_spaced &= w[n] == w[0] + n * d_model;
    alignas(64) uint16_t gathered[kSide][kDeep] = {};

    publish(tiles);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t k = s * kDeep;
      for (int n = 0; n < kSide; ++n) __builtin_prefetch(ahead[n] + k, 0, 2);
      if (evenly_spaced && k + kDeep <= d_model) {
        _tile_loadd(2, w[0] + k, d_model * static_cast<int64_t>(sizeof(uint16_t)));
      } else {
        const int64_t width = smaller<int64_t>(kDeep, d_model - k);
        if (width < kDeep) std::memset(gathered, 0, sizeof(gathered));
        for (int n = 0; n < kSide; ++n) std::memcpy(gathered[n], w[n] + k, width * sizeof(uint16_t));
        publish(gathered);
        _tile_loadd(2, gathered, sizeof(gathered[0]));
      }
      _tile_loadd(3, tiles + s * kTileElements, 64);
      _tile_dpbf16ps(0, 2, 3);
      if (two_groups) {
        _tile_loadd(4, tiles + (steps + s) * kTileElements, 64);
        _tile_dpbf16ps(1, 2, 4);
      }
    }
    alignas(64) float result[2][kSide][kSide];
    _tile_stored(0, result[0], sizeof(result[0][0]));
    _tile_stored(1, result[1], sizeof(result[0][0]));
    publish(result);
    for (int n = 0; n < neurons; ++n) {
      for (int r = 0; r < rows; ++r) out[n * rows + r] = result[r / kSide][n][r % kSide];
    }
  }

  // Sixteen rows by the register tile's 64 columns: h is the left operand, pairs of down rows are the right one.
  static void tile_down(const float* packed, const uint16_t* const* ahead, int64_t ahead_column, int neurons,
                        const uint16_t* h, int64_t h_stride, int rows, float* y, int64_t y_stride) {
    constexpr int64_t kColumns = kColumnVecs * kLanes;
    constexpr int64_t kPackedBytes = kColumns * sizeof(float);
    const int64_t y_bytes = y_stride * static_cast<int64_t>(sizeof(float));
    publish(packed);
    publish(h);
    publish(y);
    for (int first = 0; first < rows; first += kSide) {
      float* const target = y + first * y_stride;
      _tile_loadd(0, target, y_bytes);
      _tile_loadd(1, target + kLanes, y_bytes);
      _tile_loadd(2, target + 2 * kLanes, y_bytes);
      _tile_loadd(3, target + 3 * kLanes, y_bytes);
      for (int n = 0; n < neurons; n += kDeep) {
        if (first == 0) {
          for (int i = n; i < n + kDeep; ++i) {
            __builtin_prefetch(ahead[i] + ahead_column, 0, 2);
            __builtin_prefetch(ahead[i] + ahead_column + kDeep, 0, 2);
          }
        }
        const float* const weights = packed + n / kDepth * kColumns;
        _tile_loadd(4, h + first * h_stride + n, h_stride * static_cast<int64_t>(sizeof(uint16_t)));
        _tile_loadd(5, weights, kPackedBytes);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, weights + kLanes, kPackedBytes);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(5, weights + 2 * kLanes, kPackedBytes);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, weights + 3 * kLanes, kPackedBytes);
        _tile_dpbf16ps(3, 4, 6);
      }
      _tile_stored(0, target, y_bytes);
      _tile_stored(1, target + kLanes, y_bytes);
      _tile_stored(2, target + 2 * kLanes, y_bytes);
      _tile_stored(3, target + 3 * kLanes, y_bytes);
    }
    publish(y);
  }
};

}  // namespace
}  // namespace prosparse::cpu

// AVX2 with FMA: float32, and bfloat16 widened to float32.
#pragma once

#include <immintrin.h>

#include "support.h"

namespace prosparse::cpu {
namespace {

struct Avx2 {
  struct Unit {};
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 0;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static float sum(Vec v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

  using Hidden = float;
  static constexpr int kDepth = 1;
  static constexpr int kColumnVecs = 2;
  static constexpr int kDownRows = 5;
  using ColumnVec = __m256;
  using HiddenVec = __m256;
  static void load_packed(const float* packed, ColumnVec* out) {
    for (int c = 0; c < kColumnVecs; ++c) out[c] = _mm256_load_ps(packed + c * kLanes);
  }
  static void store_packed(float* packed, const ColumnVec* in) {
    for (int c = 0; c < kColumnVecs; ++c) _mm256_store_ps(packed + c * kLanes, in[c]);
  }
  static HiddenVec broadcast(const float* h) { return _mm256_set1_ps(*h); }
  static Vec multiply_add(Vec sum, HiddenVec h, ColumnVec w) { return _mm256_fmadd_ps(h, w, sum); }
};

struct Avx2Float : Avx2 {
  using Weight = float;
  using Input = float;

  static constexpr int kDotStep = 8;
  static constexpr int kInputStep = 8;
  static constexpr int kDotNeurons = 4;
  static constexpr int kDotRows = 2;
  static constexpr int kDotBlock = 1024;
  using WeightVec = __m256;
  using InputVec = __m256;
  static void pack_input(const float* x, int64_t d_model, float* out) {
    std::memcpy(out, x, d_model * sizeof(float));
    std::memset(out + d_model, 0, (round_up<int64_t>(d_model, kDotStep) - d_model) * sizeof(float));
  }
  static WeightVec load_weights(const float* w) { return _mm256_loadu_ps(w); }
  static InputVec load_input(const float* x) { return _mm256_loadu_ps(x); }
  static Vec dot(Vec sum, WeightVec w, InputVec x) { return _mm256_fmadd_ps(w, x, sum); }

  static void load_columns(const float* const* rows, int64_t column, ColumnVec* out) {
    for (int c = 0; c < kColumnVecs; ++c) out[c] = _mm256_loadu_ps(rows[0] + column + c * kLanes);
  }
};

// Even and odd elements of a pair are kept apart, as in Avx512WidenedBf16.
struct Avx2WidenedBf16 : Avx2 {
  using Weight = uint16_t;
  using Input = float;

  static constexpr int kDotStep = 16;
  static constexpr int kInputStep = 16;
  static constexpr int kDotNeurons = 2;
  static constexpr int kDotRows = 4;
  static constexpr int kDotBlock = 1024;
  struct Pairs {
    __m256 even;
    __m256 odd;
  };
  using WeightVec = Pairs;
  using InputVec = Pairs;
  static void pack_input(const uint16_t* x, int64_t d_model, float* out) {
    for (int64_t k = 0; k < round_up<int64_t>(d_model, kDotStep); ++k) {
      const int64_t step = k / kDotStep * kInputStep;
      out[step + k % kDotStep / 2 + k % 2 * kLanes] = k < d_model ? widen(x[k]) : 0.0f;
    }
  }
  static WeightVec load_weights(const uint16_t* w) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static InputVec load_input(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + kLanes)}; }
  static Vec dot(Vec sum, const WeightVec& w, const InputVec& x) {
    return _mm256_fmadd_ps(w.odd, x.odd, _mm256_fmadd_ps(w.even, x.even, sum));
  }

  static void load_columns(const uint16_t* const* rows, int64_t column, ColumnVec* out) {
    for (int c = 0; c < kColumnVecs; ++c) {
      const auto* const p = reinterpret_cast<const __m128i*>(rows[0] + column + c * kLanes);
      out[c] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
    }
  }
};

}  // namespace
}  // namespace prosparse::cpu

// AVX-512: float32, and bfloat16 widened to float32 (AVX-512F alone) or multiplied in pairs (AVX-512-BF16).
#pragma once

#include <immintrin.h>

#include "support.h"

namespace prosparse::cpu {
namespace {

struct Avx512 {
  struct Unit {};
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kTileRows = 0;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static float sum(Vec v) { return _mm512_reduce_add_ps(v); }
};

struct Avx512Float : Avx512 {
  using Weight = float;
  using Input = float;
  using Hidden = float;

  static constexpr int kDotStep = 16;
  static constexpr int kInputStep = 16;
  static constexpr int kDotNeurons = 4;
  static constexpr int kDotRows = 6;
  static constexpr int kDotBlock = 1024;
  using WeightVec = __m512;
  using InputVec = __m512;
  static void pack_input(const float* x, int64_t d_model, float* out) {
    std::memcpy(out, x, d_model * sizeof(float));
    std::memset(out + d_model, 0, (round_up<int64_t>(d_model, kDotStep) - d_model) * sizeof(float));
  }
  static WeightVec load_weights(const float* w) { return _mm512_loadu_ps(w); }
  static InputVec load_input(const float* x) { return _mm512_loadu_ps(x); }
  static Vec dot(Vec sum, WeightVec w, InputVec x) { return _mm512_fmadd_ps(w, x, sum); }

  static constexpr int kDepth = 1;
  static constexpr int kColumnVecs = 4;
  static constexpr int kDownRows = 6;
  using ColumnVec = __m512;
  using HiddenVec = __m512;
  static void load_columns(const float* const* rows, int64_t column, ColumnVec* out) {
    for (int c = 0; c < kColumnVecs; ++c) out[c] = _mm512_loadu_ps(rows[0] + column + c * kLanes);
  }
  static void load_packed(const float* packed, ColumnVec* out) {
    for (int c = 0; c < kColumnVecs; ++c) out[c] = _mm512_load_ps(packed + c * kLanes);
  }
  static void store_packed(float* packed, const ColumnVec* in) {
    for (int c = 0; c < kColumnVecs; ++c) _mm512_store_ps(packed + c * kLanes, in[c]);
  }
  static HiddenVec broadcast(const float* h) { return _mm512_set1_ps(*h); }
  static Vec multiply_add(Vec sum, HiddenVec h, ColumnVec w) { return _mm512_fmadd_ps(h, w, sum); }
};

// Thirty-two bfloat16 are read as sixteen pairs: the even ones are the pairs shifted up, the odd ones their upper halves. The
// packed x holds even and odd elements apart in the same way.
struct Avx512WidenedBf16 : Avx512 {
  using Weight = uint16_t;
  using Input = float;
  using Hidden = float;

  static constexpr int kDotStep = 32;
  static constexpr int kInputStep = 32;
  static constexpr int kDotNeurons = 4;
  static constexpr int kDotRows = 4;
  static constexpr int kDotBlock = 1024;
  struct Pairs {
    __m512 even;
    __m512 odd;
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
    const __m512i pairs = _mm512_loadu_si512(w);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static InputVec load_input(const float* x) { return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + kLanes)}; }
  static Vec dot(Vec sum, const WeightVec& w, const InputVec& x) {
    return _mm512_fmadd_ps(w.odd, x.odd, _mm512_fmadd_ps(w.even, x.even, sum));
  }

  static constexpr int kDepth = 1;
  static constexpr int kColumnVecs = 4;
  static constexpr int kDownRows = 6;
  using ColumnVec = __m512;
  using HiddenVec = __m512;
  static void load_columns(const uint16_t* const* rows, int64_t column, ColumnVec* out) {
    for (int c = 0; c < kColumnVecs; ++c) {
      const auto* const p = reinterpret_cast<const __m256i*>(rows[0] + column + c * kLanes);
      out[c] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
    }
  }
  static void load_packed(const float* packed, ColumnVec* out) { Avx512Float::load_packed(packed, out); }
  static void store_packed(float* packed, const ColumnVec* in) { Avx512Float::store_packed(packed, in); }
  static HiddenVec broadcast(const float* h) { return _mm512_set1_ps(*h); }
  static Vec multiply_add(Vec sum, HiddenVec h, ColumnVec w) { return _mm512_fmadd_ps(h, w, sum); }
};

#ifdef __AVX512BF16__
struct Avx512Bf16 : Avx512 {
  using Weight = uint16_t;
  using Input = uint16_t;
  using Hidden = uint16_t;

  static constexpr int kDotStep = 32;
  static constexpr int kInputStep = 32;
  static constexpr int kDotNeurons = 4;
  static constexpr int kDotRows = 6;
  static constexpr int kDotBlock = 2048;
  using WeightVec = __m512bh;
  using InputVec = __m512bh;
  static void pack_input(const uint16_t* x, int64_t d_model, uint16_t* out) {
    std::memcpy(out, x, d_model * sizeof(uint16_t));
    std::memset(out + d_model, 0, (round_up<int64_t>(d_model, kDotStep) - d_model) * sizeof(uint16_t));
  }
  static WeightVec load_weights(const uint16_t* w) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(w)); }
  static InputVec load_input(const uint16_t* x) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)); }
  static Vec dot(Vec sum, WeightVec w, InputVec x) { return _mm512_dpbf16_ps(sum, w, x); }

  static constexpr int kDepth = 2;
  static constexpr int kColumnVecs = 4;
  static constexpr int kDownRows = 6;
  using ColumnVec = __m512bh;  // lane c: column c of two neighbouring neurons
  using HiddenVec = __m512bh;
  static void load_columns(const uint16_t* const* rows, int64_t column, ColumnVec* out) {
    // Indices of _mm512_permutex2var_epi16: element i of the first row is i, of the second 32 + i.
    alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int c = 0; c < kColumnVecs; c += 2) {
      const __m512i first = _mm512_loadu_si512(rows[0] + column + c * kLanes);
      const __m512i second = _mm512_loadu_si512(rows[1] + column + c * kLanes);
      out[c] = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(first, low, second));
      out[c + 1] = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(first, high, second));
    }
  }
  static void load_packed(const float* packed, ColumnVec* out) {
    for (int c = 0; c < kColumnVecs; ++c) out[c] = reinterpret_cast<__m512bh>(_mm512_load_si512(packed + c * kLanes));
  }
  static void store_packed(float* packed, const ColumnVec* in) {
    for (int c = 0; c < kColumnVecs; ++c) _mm512_store_si512(packed + c * kLanes, reinterpret_cast<__m512i>(in[c]));
  }
  static HiddenVec broadcast(const uint16_t* h) {
    int32_t pair;
    std::memcpy(&pair, h, sizeof(pair));
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  static Vec multiply_add(Vec sum, HiddenVec h, ColumnVec w) { return _mm512_dpbf16_ps(sum, h, w); }
};
#endif

}  // namespace
}  // namespace prosparse::cpu

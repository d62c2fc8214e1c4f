// Any CPU: four lanes in the compiler's own vector type, which it maps to what the target has.
#pragma once

#include "support.h"

namespace prosparse::cpu {
namespace {

template <class Element>
struct Portable {
  struct Unit {};
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kTileRows = 0;

  static Vec zero() { return Vec{}; }
  static Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
  static float sum(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }

  using Weight = Element;
  using Input = float;
  using Hidden = float;

  static constexpr int kDotStep = 4;
  static constexpr int kInputStep = 4;
  static constexpr int kDotNeurons = 4;
  static constexpr int kDotRows = 2;
  static constexpr int kDotBlock = 1024;
  using WeightVec = Vec;
  using InputVec = Vec;
  static void pack_input(const Element* x, int64_t d_model, float* out) {
    for (int64_t k = 0; k < round_up<int64_t>(d_model, kDotStep); ++k) out[k] = k < d_model ? widen(x[k]) : 0.0f;
  }
  static WeightVec load_weights(const Element* w) { return Vec{widen(w[0]), widen(w[1]), widen(w[2]), widen(w[3])}; }
  static InputVec load_input(const float* x) { return load(x); }
  static Vec dot(Vec sum, WeightVec w, InputVec x) { return sum + w * x; }

  static constexpr int kDepth = 1;
  static constexpr int kColumnVecs = 4;
  static constexpr int kDownRows = 2;
  using ColumnVec = Vec;
  using HiddenVec = Vec;
  static void load_columns(const Element* const* rows, int64_t column, ColumnVec* out) {
    for (int c = 0; c < kColumnVecs; ++c) out[c] = load_weights(rows[0] + column + c * kLanes);
  }
  static void load_packed(const float* packed, ColumnVec* out) {
    for (int c = 0; c < kColumnVecs; ++c) out[c] = load(packed + c * kLanes);
  }
  static void store_packed(float* packed, const ColumnVec* in) {
    for (int c = 0; c < kColumnVecs; ++c) store(packed + c * kLanes, in[c]);
  }
  static HiddenVec broadcast(const float* h) { return Vec{*h, *h, *h, *h}; }
  static Vec multiply_add(Vec sum, HiddenVec h, ColumnVec w) { return sum + h * w; }
};

}  // namespace
}  // namespace prosparse::cpu

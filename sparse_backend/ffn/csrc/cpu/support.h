// What all kernels share: element conversion, the activation's comparison, shares of threads, pieces of scratch memory.
//
// Every header below kernels.h is compiled once per instruction set with its own -m flags. Everything is in an unnamed
// namespace, and nothing of the standard library that could be emitted out of line is used: the linker must never merge code
// compiled for different CPUs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace prosparse::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kBytesPerThread = 64 * 1024;  // a thread that reads less costs more than it brings

template <class T>
constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}

template <class T>
constexpr T round_up(T value, T multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

inline float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline float widen(float value) { return value; }

// To bfloat16, to nearest, ties to even; a NaN stays a NaN.
inline void narrow(float value, uint16_t& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

inline void narrow(float value, float& out) { out = value; }

inline bool is_active(float gate, float threshold) { return !(gate <= threshold); }

inline bool is_finite(uint16_t value) { return (value & 0x7f80) != 0x7f80; }

inline bool is_finite(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return (bits & 0x7f800000) != 0x7f800000;
}

// ---- threads -----------------------------------------------------------------------------------------------------------------

template <class Body>
void run_threads(ThreadPool pool, int threads, Body& body) {
  if (threads == 1) {
    body(0);
    return;
  }
  pool.run(threads, [](int thread, void* context) { (*static_cast<Body*>(context))(thread); }, &body);
}

inline int useful_threads(ThreadPool pool, int64_t weight_bytes) {
  return static_cast<int>(smaller<int64_t>(pool.threads, weight_bytes / kBytesPerThread + 1));
}

struct Range {
  int64_t begin;
  int64_t end;
};

// The static share of one thread in [0, size), in multiples of `unit`.
inline Range share(int64_t size, int64_t unit, int thread, int threads) {
  const int64_t units = (size + unit - 1) / unit;
  return {smaller(units * thread / threads * unit, size), smaller(units * (thread + 1) / threads * unit, size)};
}

// ---- scratch memory ----------------------------------------------------------------------------------------------------------

// One buffer per thread, each starting on a cache line of its own.
template <class T>
struct PerThread {
  T* base;
  int64_t stride;

  T* operator()(int thread) const { return base + thread * stride; }
};

// Hands out pieces of one block of memory. Without a block it only adds up how large the block has to be.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* take(int64_t count) {
    char* const piece = block_ ? block_ + used_ : nullptr;
    used_ += round_up<int64_t>(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return reinterpret_cast<T*>(piece);
  }

  template <class T>
  PerThread<T> take_each(int threads, int64_t count) {
    const int64_t stride = round_up<int64_t>(count, kAlignment);
    return {take<T>(threads * stride), stride};
  }

  int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

// Builds a Room, whose constructor takes its pieces from an arena, in the calling thread's scratch memory.
template <class Room, class... Args>
Room make_room(Args... args) {
  Arena measure(nullptr);
  static_cast<void>(Room(measure, args...));
  Arena arena(scratch(measure.used()));
  return Room(arena, args...);
}

}  // namespace
}  // namespace prosparse::cpu

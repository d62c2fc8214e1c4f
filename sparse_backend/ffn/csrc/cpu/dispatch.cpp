// Chooses the instruction set at run time, and keeps the scratch memory.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "isa.h"

#ifdef PROSPARSE_ISA_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace prosparse::cpu {
namespace {

#ifdef PROSPARSE_ISA_AMX
// The CPU having AMX is not enough: Linux traps its first use unless the process has asked for the tile state.
bool may_use_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22;
  constexpr unsigned kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx & kAmxBf16) || !(edx & kAmxTile)) return false;
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> found;
#if defined(PROSPARSE_ISA_AVX512_BF16)
  const bool avx512_bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") &&
                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512dq");
#if defined(PROSPARSE_ISA_AMX)
  if (avx512_bf16 && may_use_amx()) found.push_back(&kAmxKernels);
#endif
  if (avx512_bf16) found.push_back(&kAvx512Bf16Kernels);
#endif
#if defined(PROSPARSE_ISA_AVX512F)
  if (__builtin_cpu_supports("avx512f")) found.push_back(&kAvx512fKernels);
#endif
#if defined(PROSPARSE_ISA_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2Kernels);
#endif
  found.push_back(&kPortableKernels);
  return found;
}

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> isas = detect();
  return isas;
}

const Kernels*& selected() {
  static const Kernels* kernels = available().front();
  return kernels;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

const Kernels& kernels() { return *selected(); }

const char* available_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* isa : available()) joined += (joined.empty() ? "" : ",") + std::string(isa->isa);
    return joined;
  }();
  return names.c_str();
}

bool select_isa(const char* isa) {
  for (const Kernels* candidate : available()) {
    if (std::strcmp(candidate->isa, isa) == 0) {
      selected() = candidate;
      return true;
    }
  }
  return false;
}

void* scratch(int64_t bytes) {
  constexpr size_t kCacheLine = 64;
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  const size_t needed = (static_cast<size_t>(bytes) + kCacheLine - 1) / kCacheLine * kCacheLine;
  if (needed > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(std::aligned_alloc(kCacheLine, needed));
    if (!memory) throw std::bad_alloc();
    capacity = needed;
  }
  return memory.get();
}

}  // namespace prosparse::cpu

// Which instruction set a kernel is compiled for and which ones this CPU runs.
//
// A kernel file includes every header first, then writes LUTGEMM_TARGET_AVX512_BEGIN ... LUTGEMM_TARGET_END around its
// own code. So templates and lambdas in it get the instructions, and no shared inline function ever does: the linker
// could otherwise keep the copy that an older CPU cannot run.
#pragma once

#include "../params.h"

#if defined(__x86_64__) || defined(_M_X64)
#define LUTGEMM_X86 1
#else
#define LUTGEMM_X86 0
#endif

#if defined(__aarch64__)
#define LUTGEMM_ARM64 1
#else
#define LUTGEMM_ARM64 0
#endif

#if defined(__clang__)
#define LUTGEMM_PRAGMA(text) _Pragma(#text)
#define LUTGEMM_TARGET_BEGIN(features) \
  LUTGEMM_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LUTGEMM_TARGET_AVX2_BEGIN LUTGEMM_TARGET_BEGIN("avx2,fma,f16c")
#define LUTGEMM_TARGET_AVX512_BEGIN LUTGEMM_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define LUTGEMM_TARGET_AVX512VBMI_BEGIN \
  LUTGEMM_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")
#define LUTGEMM_TARGET_END _Pragma("clang attribute pop")
#else
#define LUTGEMM_TARGET_AVX2_BEGIN _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define LUTGEMM_TARGET_AVX512_BEGIN \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl\")")
#define LUTGEMM_TARGET_AVX512VBMI_BEGIN \
  _Pragma("GCC push_options")           \
      _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni\")")
#define LUTGEMM_TARGET_END _Pragma("GCC pop_options")
#endif

namespace lutgemm {

// The best of Isa that this CPU and its operating system run.
inline Isa cpu_isa() {
#if LUTGEMM_X86
  static const Isa found = [] {
    __builtin_cpu_init();
    // Every CPU with AVX2 has F16C, a name that older clang does not know here.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vbmi = avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("gfni");
    return vbmi ? Isa::kAvx512Vbmi : avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kScalar;
  }();
  return found;
#elif LUTGEMM_ARM64
  return Isa::kNeon;  // part of the architecture
#else
  return Isa::kScalar;
#endif
}

}  // namespace lutgemm

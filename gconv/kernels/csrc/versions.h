/* The instruction sets and the versions of the kernels. */

#ifndef GCONV_VERSIONS_H
#define GCONV_VERSIONS_H

#include "layer.h"

/* Instruction sets; ANY is what the compiler makes without being told of one. */
enum { ANY, AVX2, AVX512, INSTRUCTION_SETS };

/* A version of the kernels of a layer. `lanes`: it pads channels to a multiple of this. `sums`: it keeps so many sums of
 * each value of the gradients of the parameters, which are added up at the end; versions over pixels have more than 1. */
struct version { int instructions, lanes, sums; forward_rows *forward; backward_rows *backward; };

extern const struct version versions[];
extern const int version_count;

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

#if defined(__x86_64__)
#define TARGET_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")))
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#endif
#define TARGET_ANY

#endif

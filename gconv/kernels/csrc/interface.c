/* What Python asks of the library before it uses it. */

#include "layer.h"
#include "versions.h"
#include "workers.h"

/* The number of the interface, and the sizes of what the two sides share; Python compares them with its own. */
EXPORT void gconv_interface(int *numbers)
{
    numbers[0] = INTERFACE;
    numbers[1] = sizeof(struct layer);
    numbers[2] = ENTRIES;
    numbers[3] = MOST_K;
    numbers[4] = MOST_ORDER;
}

/* A digest of the sources that this library was built from. */
EXPORT const char *gconv_sources(void) { return GCONV_SOURCES; }

/* Whether this processor has an instruction set. */
EXPORT int gconv_supports(int instructions)
{
    if (instructions == ANY) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (instructions == AVX2) return avx2;
    if (instructions == AVX512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
               && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
#endif
    return 0;
}

/* The instruction set of a version of the kernels, and to a multiple of what it pads channels; -1 if there is no version of
 * that number. */
EXPORT int gconv_version_instructions(int version)
{
    return version < 0 || version >= version_count ? -1 : versions[version].instructions;
}

EXPORT int gconv_version_lanes(int version)
{
    return version < 0 || version >= version_count ? -1 : versions[version].lanes;
}

/* Memory of a thread for what lies between the steps of a layer: one piece, from which parts are taken in order. Parts
 * that must be zeros at first come before the others. A part keeps its values from one call to the next.
 *
 * With GCONV_SEPARATE_SCRATCH every part is an allocation of exactly its size, and parts that need not be zeros are filled
 * with NaN. AddressSanitizer then sees what reads or writes beyond a part, and results show what reads it too early. */

#ifndef GCONV_SCRATCH_H
#define GCONV_SCRATCH_H

#include <stdlib.h>
#include <string.h>

#include "layer.h"

#ifdef GCONV_SEPARATE_SCRATCH

enum { MOST_PARTS = 16 };

struct scratch { int used; float **parts; };

static inline struct scratch new_scratch(size_t all, size_t zeros)
{
    (void)all, (void)zeros;
    return (struct scratch){0, calloc(MOST_PARTS, sizeof(float *))};
}

static inline int is_missing(struct scratch s) { return !s.parts; }

static inline void free_scratch(struct scratch s)
{
    for (int i = 0; s.parts && i < MOST_PARTS; i++) free(s.parts[i]);
    free(s.parts);
}

static inline float *take_part(struct scratch *s, size_t size, int zeros)
{
    float **part = &s->parts[s->used++];
    if (s->used > MOST_PARTS) abort();
    if (*part) return *part;
    *part = malloc(sizeof(float) * size);
    if (!*part) abort();
    for (size_t i = 0; i < size; i++) (*part)[i] = zeros ? 0 : __builtin_nanf("");
    return *part;
}

#else

struct scratch { float *next, *all; };

/* Of so many bytes, the first of which are zeros. */
static inline struct scratch new_scratch(size_t all, size_t zeros)
{
    float *memory = aligned_alloc(64, (all + 63) / 64 * 64);
    if (memory) memset(memory, 0, zeros);
    return (struct scratch){memory, memory};
}

static inline int is_missing(struct scratch s) { return !s.all; }

static inline void free_scratch(struct scratch s) { free(s.all); }

static inline float *take_part(struct scratch *s, size_t size, int zeros)
{
    float *taken = s->next;
    (void)zeros;
    s->next += (size + SPARE - 1) / SPARE * SPARE;
    return taken;
}

#endif

/* The next `size` floats: zeros at first, or with any values. */
static inline float *take_zeros(struct scratch *s, size_t size) { return take_part(s, size, 1); }

static inline float *take(struct scratch *s, size_t size) { return take_part(s, size, 0); }

#endif

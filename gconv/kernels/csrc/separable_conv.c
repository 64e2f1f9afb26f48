/* Group convolutions of the forms gc and gc_in, factorised, in one pass over their maps.
 *
 * Maps are channels-last and group-major: the values of a position are [S][C]. A layer mixes them by small matrix
 * products, in a basis of the group axis or directly, and filters every channel by itself with a spatial kernel. In `gc`
 * the mix comes first, in `gc_in` the spatial kernels do. Run one after the other on whole maps, these two steps are
 * limited by memory. Here each thread works on a few rows at a time, so that the values between the steps stay in its
 * cache: row by row with vectors of channels (over_channels.h), or in bands of rows with vectors of pixels, where
 * channels are few (over_pixels.h). Both files are included once for each instruction set that they support. */

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "layer.h"
#include "scratch.h"
#include "versions.h"
#include "workers.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define NAME(x) x##_pixels
#define TARGET TARGET_AVX512
#define V 8
#define REGISTERS 32
#define WIDE 5
#define LOAD_MASKED(mask, from) _mm256_maskz_loadu_ps((__mmask8)(mask), from)
#define STORE_MASKED(to, mask, value) _mm256_mask_storeu_ps(to, (__mmask8)(mask), (__m256)(value))
#include "over_pixels.h"

#define NAME(x) x##_avx512
#define TARGET TARGET_AVX512
#define V 16
#define REGISTERS 32
#define WIDE 3
#define LOAD_MASKED(mask, from) _mm512_maskz_loadu_ps((__mmask16)(mask), from)
#define STORE_MASKED(to, mask, value) _mm512_mask_storeu_ps(to, (__mmask16)(mask), (__m512)(value))
#include "over_channels.h"

#define NAME(x) x##_avx2
#define TARGET TARGET_AVX2
#define V 8
#define REGISTERS 16
#define WIDE 3
#include "over_channels.h"
#endif

#define NAME(x) x##_any
#define TARGET TARGET_ANY
#define V 4
#if defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
#define WIDE 3
#include "over_channels.h"

const struct version versions[] = {
#if defined(__x86_64__)
    {AVX512, 1, 8, forward_pixels, backward_pixels},
    {AVX512, 16, 1, forward_avx512, backward_avx512},
    {AVX2, 8, 1, forward_avx2, backward_avx2},
#else
    {AVX512, 1, 8, NULL, NULL}, /* keeps its number, and is never used */
#endif
    {ANY, 4, 1, forward_any, backward_any},
};
const int version_count = sizeof versions / sizeof *versions;

/* The planes that forward or backward of over_pixels.h takes. */
static int planes_needed(const struct layer *l, int backward)
{
    int ci = l->order * l->in_channels, co = l->order * l->out_channels, made = spatial_channels(l) * l->rank;
    return ci + co + made + (backward ? larger(made, ci) : 0) + 2 * SPARE;
}

/* How many rows a band of over_pixels.h may have, of `most`: few enough for its planes to stay in the second-level cache. */
static int band_rows(const struct layer *l, int most, int backward)
{
    enum { CACHE = 1 << 17 }; /* floats */
    int rows = CACHE / planes_needed(l, backward);
    rows = (rows - plane_floats(l, 0)) / pitch_of(l) - l->k + 1;
    if (rows < 1) return most;
    int bands = (most + rows - 1) / rows;
    return (most + bands - 1) / bands;
}

/* Memory for one thread. With `rows` for bands of so many rows (over_pixels.h), without for over_channels.h. */
static struct scratch scratch_for(const struct layer *l, int rows, int backward)
{
    if (rows) {
        size_t all = sizeof(float) * floats(planes_needed(l, backward), plane_floats(l, rows + l->k - 1));
        return new_scratch(all, all);
    }
    size_t row = padded(l->order * l->in_channels * l->rank) + padded(l->order * l->out_channels * l->rank);
    size_t wide = larger(l->width, l->out_width) + 2 * (l->k + l->padding);
    size_t most = 2 * l->k + 8 + (backward ? l->height + 4 * batch_of(l) : 0);
    /* What must be zeros at first, because the borders stay so: the ring of rows, and a copy of the map. */
    int around = l->width + 2 * l->padding, ring = l->k * (backward ? l->width + l->k - 1 : around);
    int channels = spatial_channels(l), kept = l->spatial_first == backward ? channels * l->rank : channels;
    size_t copy = backward && l->spatial_first ? floats(l->height * around, padded(channels)) : 0;
    size_t zeros = floats(ring, padded(kept)) + copy + padded(l->in_channels);
    return new_scratch(sizeof(float) * (most * wide * row + padded(l->in_channels)), sizeof(float) * zeros);
}

/* Multiply-accumulates of a forward pass for one image. */
static double macs_of(const struct layer *l)
{
    double inputs = (double)l->height * l->width, outputs = (double)l->out_height * l->out_width, mix = 0;
    for (int i = 0; i < l->products; i++) {
        const int *t = l->table + ENTRIES * i;
        mix += (double)t[DEPTH] * t[COLUMNS];
    }
    double filters = l->whole ? 0 : (double)l->rank * l->k * l->k * spatial_channels(l);
    return mix * (l->spatial_first ? outputs : inputs) + filters * outputs;
}

static size_t rows_of(const struct layer *l, int backward) { return backward ? l->height : l->out_height; }

/* How many floats the gradients of the parameters have, as one worker adds them up. */
static size_t sums_of(int version, const struct layer *l)
{
    int lanes = versions[version].lanes;
    size_t products = l->weights + spatial_floats(l, lanes), biases = rounded(l->order * l->out_channels, lanes);
    return (products * versions[version].sums + biases + SPARE - 1) / SPARE * SPARE;
}

/* How many threads a pass over n images uses, of `threads` that there are: no more than have enough to do, and no more
 * than there are rows. Backward each worker adds up gradients of its own. Together these take no more memory than the
 * maps do, or 32 MiB, whichever is more. */
EXPORT int gconv_workers(int version, const struct layer *l, int n, int threads, int backward)
{
    double rows = (double)n * rows_of(l, backward);
    int workers = workers_for(threads, n * macs_of(l) * (backward ? 3 : 1));
    if (workers > rows) workers = rows;
    if (backward) {
        double maps = (double)n * l->order * ((double)l->in_channels * l->height * l->width
                                              + (double)l->out_channels * l->out_height * l->out_width);
        double most = (maps > 1 << 23 ? maps : 1 << 23) / sums_of(version, l);
        if (workers > most) workers = most < 1 ? 1 : most;
    }
    return workers;
}

/* The share of a worker of the rows of n images: the rows of the output, or, backward, of the map. They are numbered
 * through all images, and each worker gets `begin` to `end` - 1; shares differ by one row at most. */
EXPORT void gconv_rows(const struct layer *l, int n, int workers, int worker, int backward, size_t *begin, size_t *end)
{
    size_t rows = n * rows_of(l, backward);
    *begin = share(rows, worker, workers);
    *end = share(rows, worker + 1, workers);
}

struct pass {
    const struct layer *l;
    const struct version *version;
    struct parts parts;
    int n, workers, backward, failed;
    const float *x, *residual, *gy;
    int relu, biased, filters;
    float *y, *gx, *sums;
    size_t each;
};

/* Rows `first` to `last` - 1 of one image. */
static void work_on_image(const struct pass *p, int number, size_t image, int first, int last, struct scratch scratch)
{
    const struct layer *l = p->l;
    size_t in = floats(l->height * l->width, l->order * l->in_channels) * image;
    size_t out = floats(l->out_height * l->out_width, l->order * l->out_channels) * image;
    if (!p->backward) {
        p->version->forward(l, &p->parts, p->x + in, p->residual ? p->residual + out : NULL, p->relu, p->y + out, first,
                            last, scratch);
        return;
    }
    float *sums = p->sums + number * p->each;
    size_t weights = l->weights, products = weights + spatial_floats(l, p->version->lanes), apart = p->version->sums;
    p->version->backward(l, &p->parts, p->x + in, p->gy + out, p->gx + in, sums, p->filters ? sums + weights * apart : NULL,
                         p->biased ? sums + products * apart : NULL, first, last, scratch);
}

static void work_on_share(void *context, int number)
{
    struct pass *p = context;
    size_t height = rows_of(p->l, p->backward), at, end, next;
    if (p->backward) memset(p->sums + number * p->each, 0, sizeof(float) * p->each);
    struct scratch scratch = scratch_for(p->l, p->parts.rows, p->backward);
    if (is_missing(scratch)) {
        __atomic_store_n(&p->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    gconv_rows(p->l, p->n, p->workers, number, p->backward, &at, &end);
    for (; at < end; at = next) {
        size_t image = at / height;
        next = (image + 1) * height;
        next = next < end ? next : end;
        work_on_image(p, number, image, at - image * height, next - image * height, scratch);
    }
    free_scratch(scratch);
}

/* Fills in how a pass is run, and runs it. */
static void run_pass(struct pass *p, int version, const float *packed)
{
    p->version = versions + version;
    p->parts = parts_of(p->l, p->version->lanes, packed);
    if (p->version->sums > 1) {
        size_t height = rows_of(p->l, p->backward), most = (p->n * height + p->workers - 1) / p->workers;
        p->parts.rows = band_rows(p->l, most < height ? most : height, p->backward);
    }
    run_workers(p->workers, work_on_share, p);
}

/* y [n][H'][W'][S O] from x [n][H][W][S I]. `residual`, if given, is added; then comes ReLU, if asked. Returns 0, or 1
 * if there is no memory. */
EXPORT int gconv_forward(int version, const struct layer *l, int n, int threads, const float *packed, const float *x,
                         const float *residual, int relu, float *y)
{
    struct pass p = {.l = l, .n = n, .x = x, .residual = residual, .relu = relu, .y = y};
    p.workers = gconv_workers(version, l, n, threads, 0);
    run_pass(&p, version, packed);
    return p.failed;
}

/* Adds up what the workers of a backward pass found, pair by pair, pairs of pairs and so on. Each worker does so for its
 * share of the values. */
static void add_pairs(void *context, int number)
{
    struct pass *p = context;
    enum { BLOCK = 4096 }; /* floats that stay in the first-level cache */
    size_t first = share(p->each, number, p->workers), end = share(p->each, number + 1, p->workers);
    for (size_t begin = first; begin < end; begin += BLOCK) {
        size_t last = begin + BLOCK < end ? begin + BLOCK : end;
        for (int step = 1; step < p->workers; step *= 2)
            for (int w = 0; w + step < p->workers; w += 2 * step) {
                float *to = p->sums + w * p->each;
                const float *from = p->sums + (w + step) * p->each;
                for (size_t i = begin; i < last; i++) to[i] += from[i];
            }
    }
}

/* The gradient of the spatial kernels, [C][R][k k], from that of the packed kernels; in `gc` that is found flipped. */
static void unpack_spatial(const struct layer *l, int lanes, const float *sums, float *spatial)
{
    int kk = l->k * l->k, s = l->order, channels = spatial_channels(l), each = channels / s;
    memset(spatial, 0, sizeof(float) * l->rank * kk * each);
    for (int r = 0; r < l->rank; r++)
        for (int n = 0; n < s; n++)
            for (int y = 0; y < kk; y++) {
                int at = l->spatial_first ? y : kk - 1 - y;
                const float *from = sums + (size_t)(r * kk + at) * rounded(channels, lanes) + n * each;
                for (int c = 0; c < each; c++) spatial[(c * l->rank + r) * kk + l->pixels[n * kk + y]] += from[c];
            }
}

/* The gradients of the map and of the parameters, in the layout that gconv_pack takes; those of spatial and of the bias
 * only where these are not NULL. For a number of threads the sums are the same each time. Returns 0, or 1 if there is no
 * memory. */
EXPORT int gconv_backward(int version, const struct layer *l, int n, int threads, const float *packed, const float *x,
                          const float *gy, float *gx, float *mix, float *spatial, float *bias)
{
    int lanes = versions[version].lanes, apart = versions[version].sums, outs = l->out_channels;
    size_t products = l->weights + spatial_floats(l, lanes);
    struct pass p = {.l = l, .n = n, .x = x, .gy = gy, .gx = gx, .backward = 1};
    p.biased = !!bias, p.filters = !!spatial;
    p.workers = gconv_workers(version, l, n, threads, 1);
    p.each = sums_of(version, l);
    float *sums = p.sums = aligned_alloc(64, sizeof(float) * p.each * p.workers);
    if (!sums) return 1;
    run_pass(&p, version, packed);
    if (p.workers > 1) run_workers(p.workers, add_pairs, &p);
    for (size_t i = 0; i < products && apart > 1; i++) {
        float sum = 0;
        for (int j = 0; j < apart; j++) sum += sums[i * apart + j];
        sums[i] = sum;
    }
    if (unpack_mix(l, lanes, threads, sums, mix)) p.failed = 1;
    if (spatial) unpack_spatial(l, lanes, sums + l->weights, spatial);
    for (int o = 0; o < outs && bias; o++) {
        bias[o] = 0;
        for (int i = 0; i < l->order; i++) bias[o] += sums[products * apart + i * outs + o];
    }
    free(sums);
    return p.failed;
}

/* Batch norm, with ReLU or without, of channels-last maps: n positions of S C values each. The S values of a channel share
 * its statistics. Sums are taken over a fixed number of parts of the map, and added up in a fixed order, so that no result
 * depends on the number of threads. */

#include <math.h>
#include <stddef.h>
#include <stdlib.h>

#include "versions.h"
#include "workers.h"

enum { BLOCK = 256 }; /* positions whose sums are in single precision */
enum { PARTS = 64 };  /* the most parts of a map */

#define NAME(x) x##_any
#define TARGET TARGET_ANY
#include "batch_norm.h"

#if defined(__x86_64__)
#define NAME(x) x##_avx2
#define TARGET TARGET_AVX2
#include "batch_norm.h"

#define NAME(x) x##_avx512
#define TARGET TARGET_AVX512
#include "batch_norm.h"

#define FOR_INSTRUCTIONS(set, f, ...) \
    ((set) == AVX512 ? f##_avx512(__VA_ARGS__) : (set) == AVX2 ? f##_avx2(__VA_ARGS__) : f##_any(__VA_ARGS__))
#else
#define FOR_INSTRUCTIONS(set, f, ...) f##_any(__VA_ARGS__)
#endif

struct norm {
    int instructions, workers, parts, relu, c;
    size_t n;
    const float *x, *g, *gated, *factor, *slope, *offset, *means;
    float *y;
    double *found; /* of each part 2 c sums */
    float *blocks; /* for each worker 2 c sums of a block */
};

/* Where a part begins: at a whole number of blocks. */
static size_t begin_of(const struct norm *m, int part)
{
    size_t begin = share((m->n + BLOCK - 1) / BLOCK, part, m->parts) * BLOCK;
    return begin < m->n ? begin : m->n;
}

/* As many threads as have enough to do; a value is about as much work as eight multiply-accumulates. */
static int norm_workers(int threads, size_t n, int c)
{
    int workers = workers_for(threads, 8.0 * n * c);
    return workers > PARTS ? PARTS : workers;
}

/* What the mean of all values of a channel is, and what their squared differences from it add up to. */
static void join(double *mean, double *squares, double *count, double other_mean, double other_squares, double other)
{
    double total = *count + other, difference = other_mean - *mean;
    if (other == 0) return;
    *mean += difference * other / total;
    *squares += other_squares + difference * difference * *count * other / total;
    *count = total;
}

static void apply_share(void *context, int number)
{
    const struct norm *m = context;
    size_t first = share(m->n, number, m->workers), n = share(m->n, number + 1, m->workers) - first;
    FOR_INSTRUCTIONS(m->instructions, apply, n, m->c, m->x + first * m->c, m->factor, m->offset, m->relu,
                     m->y + first * m->c);
}

/* y = factor x + offset, and ReLU of that if asked. Returns 0. */
EXPORT int gconv_norm(int instructions, int threads, size_t n, int c, const float *x, const float *factor,
                      const float *offset, int relu, float *y)
{
    struct norm m = {.instructions = instructions, .relu = relu, .c = c, .n = n};
    m.x = x, m.factor = factor, m.offset = offset, m.y = y;
    m.workers = norm_workers(threads, n, c);
    run_workers(m.workers, apply_share, &m);
    return 0;
}

/* Mean and sum of squared differences of each of c values, for the parts of a worker. */
static void statistics_of_parts(void *context, int number)
{
    const struct norm *m = context;
    int c = m->c, last = share(m->parts, number + 1, m->workers);
    float *first = m->blocks + (size_t)number * 2 * c, *second = first + c;
    for (int part = share(m->parts, number, m->workers); part < last; part++) {
        size_t begin = begin_of(m, part), end = begin_of(m, part + 1);
        double *means = m->found + (size_t)part * 2 * c, *squares = means + c;
        for (int i = 0; i < 2 * c; i++) means[i] = 0;
        for (size_t p = begin; p < end; p += BLOCK) {
            double many = end - p < BLOCK ? end - p : BLOCK;
            const float *shift = m->x + p * c; /* near the mean, so that little is lost in single precision */
            for (int i = 0; i < 2 * c; i++) first[i] = 0;
            FOR_INSTRUCTIONS(m->instructions, add_up_squares, many, c, shift, shift, first, second);
            for (int i = 0; i < c; i++) {
                double count = p - begin, sum = first[i];
                join(means + i, squares + i, &count, shift[i] + sum / many, second[i] - sum * sum / many, many);
            }
        }
    }
}

/* Sums of the gradient, and of the gradient times x - mean, for the parts of a worker. */
static void gradients_of_parts(void *context, int number)
{
    const struct norm *m = context;
    int c = m->c, last = share(m->parts, number + 1, m->workers);
    float *some = m->blocks + (size_t)number * 2 * c;
    for (int part = share(m->parts, number, m->workers); part < last; part++) {
        size_t end = begin_of(m, part + 1);
        double *sums = m->found + (size_t)part * 2 * c;
        for (int i = 0; i < 2 * c; i++) sums[i] = 0;
        for (size_t p = begin_of(m, part); p < end; p += BLOCK) {
            size_t many = end - p < BLOCK ? end - p : BLOCK, at = p * c;
            for (int i = 0; i < 2 * c; i++) some[i] = 0;
            FOR_INSTRUCTIONS(m->instructions, add_up, many, c, m->g + at, m->x + at, m->gated ? m->gated + at : NULL,
                             m->means, some, some + c);
            for (int i = 0; i < 2 * c; i++) sums[i] += some[i];
        }
    }
}

static void line_of_share(void *context, int number)
{
    const struct norm *m = context;
    size_t first = share(m->n, number, m->workers), n = share(m->n, number + 1, m->workers) - first, at = first * m->c;
    FOR_INSTRUCTIONS(m->instructions, line, n, m->c, m->g + at, m->x + at, m->gated ? m->gated + at : NULL, m->factor,
                     m->slope, m->offset, m->y + at);
}

/* Fills in how the sums are taken, with memory for them. Returns whether there was some. */
static int prepare(struct norm *m, int threads)
{
    size_t blocks = (m->n + BLOCK - 1) / BLOCK;
    m->parts = blocks < PARTS ? blocks : PARTS;
    m->workers = norm_workers(threads, m->n, m->c);
    m->found = malloc(sizeof(double) * 2 * m->c * m->parts);
    m->blocks = malloc(sizeof(float) * 2 * m->c * m->workers);
    return m->found && m->blocks;
}

/* y = x normalised by the mean and the variance (divided by n, not n - 1) of each of `channels` channels, which are
 * returned too; then weight, bias and, if asked, ReLU. Returns 0, or 1 if there is no memory. */
EXPORT int gconv_norm_train(int instructions, int threads, size_t n, int channels, int order, const float *x,
                            const float *weight, const float *bias, double eps, int relu, float *y, float *mean, float *var)
{
    int c = order * channels;
    struct norm m = {.instructions = instructions, .relu = relu, .c = c, .n = n, .x = x, .y = y};
    float *room = malloc(sizeof(float) * 2 * c), *factor = room, *offset = room + c;
    int failed = !prepare(&m, threads) || !room;
    if (!failed) {
        run_workers(m.workers, statistics_of_parts, &m);
        for (int i = 0; i < channels; i++) {
            double all = 0, squares = 0, count = 0;
            for (int part = 0; part < m.parts; part++)
                for (int at = i; at < c; at += channels) {
                    const double *own = m.found + (size_t)part * 2 * c + at;
                    join(&all, &squares, &count, own[0], own[c], (double)(begin_of(&m, part + 1) - begin_of(&m, part)));
                }
            mean[i] = all;
            var[i] = squares / count;
            double scale = weight[i] / sqrt(var[i] + eps);
            for (int at = i; at < c; at += channels) factor[at] = scale, offset[at] = bias[i] - scale * mean[i];
        }
        m.factor = factor, m.offset = offset;
        run_workers(m.workers, apply_share, &m);
    }
    free(m.found), free(m.blocks), free(room);
    return failed;
}

/* The gradients of x, the weight and the bias from that of y: through y itself, and through mean and variance, which adds a
 * line in x for each channel. The map y is given if ReLU was applied, else NULL. Returns 0, or 1 if there is no memory. */
EXPORT int gconv_norm_backward(int instructions, int threads, size_t n, int channels, int order, const float *g,
                               const float *x, const float *y, const float *weight, const float *mean, const float *var,
                               double eps, float *dx, float *dw, float *db)
{
    int c = order * channels;
    struct norm m = {.instructions = instructions, .c = c, .n = n, .x = x, .g = g, .gated = y, .y = dx};
    float *room = malloc(sizeof(float) * 4 * c), *means = room, *factor = room + c, *slope = factor + c, *offset = slope + c;
    int failed = !prepare(&m, threads) || !room;
    if (!failed) {
        for (int at = 0; at < c; at++) means[at] = mean[at % channels];
        m.means = means;
        run_workers(m.workers, gradients_of_parts, &m);
        for (int i = 0; i < channels; i++) {
            double first = 0, second = 0, count = (double)n * order, inverse = 1 / sqrt(var[i] + eps);
            for (int part = 0; part < m.parts; part++)
                for (int at = i; at < c; at += channels) {
                    first += m.found[(size_t)part * 2 * c + at];
                    second += m.found[(size_t)part * 2 * c + c + at];
                }
            db[i] = first;
            dw[i] = second * inverse;
            double scale = weight[i] * inverse, tilt = -scale * inverse * inverse * second / count;
            for (int at = i; at < c; at += channels) {
                factor[at] = scale, slope[at] = tilt;
                offset[at] = -scale * first / count - tilt * mean[i];
            }
        }
        m.factor = factor, m.slope = slope, m.offset = offset;
        run_workers(m.workers, line_of_share, &m);
    }
    free(m.found), free(m.blocks), free(room);
    return failed;
}

/* Batch norm, with ReLU or without, of channels-last maps: n positions of S C values each. The S values of a channel share
 * its statistics. The compiler makes vectors of the loops. */

#include <math.h>
#include <stddef.h>
#include <stdlib.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define ANY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ANY_PROCESSOR
#endif

enum { BLOCK = 256 }; /* positions whose sums are in single precision */

ANY_PROCESSOR static void apply(size_t n, int c, const float *restrict x, const float *restrict factor,
                                const float *restrict offset, int relu, float *restrict y)
{
    for (size_t p = 0; p < n; p++, x += c, y += c)
        if (relu)
            for (int i = 0; i < c; i++) {
                float value = factor[i] * x[i] + offset[i];
                y[i] = value < 0 ? 0 : value; /* what is not a number stays so */
            }
        else
            for (int i = 0; i < c; i++) y[i] = factor[i] * x[i] + offset[i];
}

ANY_PROCESSOR static void add_up(size_t n, int c, const float *restrict g, const float *restrict x,
                                 const float *restrict y, const float *restrict mean, float *restrict first,
                                 float *restrict second)
{
    for (size_t p = 0; p < n; p++, x += c, g += c) {
        if (y) {
            for (int i = 0; i < c; i++) {
                float value = y[i] <= 0 ? 0 : g[i];
                first[i] += value;
                second[i] += value * (x[i] - mean[i]);
            }
            y += c;
        } else
            for (int i = 0; i < c; i++) {
                first[i] += g[i];
                second[i] += g[i] * (x[i] - mean[i]);
            }
    }
}

ANY_PROCESSOR static void line(size_t n, int c, const float *restrict g, const float *restrict x,
                               const float *restrict y, const float *restrict factor, const float *restrict slope,
                               const float *restrict offset, float *restrict dx)
{
    for (size_t p = 0; p < n; p++, x += c, g += c, dx += c) {
        if (y) {
            for (int i = 0; i < c; i++)
                dx[i] = (y[i] <= 0 ? 0 : g[i]) * factor[i] + x[i] * slope[i] + offset[i];
            y += c;
        } else
            for (int i = 0; i < c; i++) dx[i] = g[i] * factor[i] + x[i] * slope[i] + offset[i];
    }
}

/* Sums of x - shift and of its square. */
ANY_PROCESSOR static void add_up_squares(size_t n, int c, const float *restrict x, const float *restrict shift,
                                         float *restrict first, float *restrict second)
{
    for (size_t p = 0; p < n; p++, x += c)
        for (int i = 0; i < c; i++) {
            float value = x[i] - shift[i];
            first[i] += value;
            second[i] += value * value;
        }
}

/* Of all values of a channel: what their mean is, and their squared differences from it add up to. */
static void join(double *mean, double *squares, double *count, double other_mean, double other_squares, double other)
{
    double total = *count + other, difference = other_mean - *mean;
    if (other == 0) return;
    *mean += difference * other / total;
    *squares += other_squares + difference * difference * *count * other / total;
    *count = total;
}

/* y = factor x + offset, and ReLU of that. Returns 0. */
int gconv_norm(int threads, size_t n, int c, const float *x, const float *factor, const float *offset, int relu,
               float *y)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; t++) {
        size_t first = n * t / threads, last = n * (t + 1) / threads;
        apply(last - first, c, x + first * c, factor, offset, relu, y + first * c);
    }
    return 0;
}

/* The same with the mean and the variance (of n, not n - 1) of each of `channels`, which are found too.
 * Returns 0, or 1 if there is no memory. */
int gconv_norm_train(int threads, size_t n, int channels, int order, const float *x, const float *weight,
                     const float *bias, double eps, int relu, float *y, float *mean, float *var)
{
    int c = order * channels;
    double *found = malloc(sizeof(double) * 2 * c * threads);
    float *room = malloc(sizeof(float) * 2 * c * (threads + 1)), *factor = room, *offset = room + c;
    if (!found || !room) {
        free(found), free(room);
        return 1;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; t++) {
        size_t begin = n * t / threads, end = n * (t + 1) / threads;
        double *means = found + (size_t)t * 2 * c, *squares = means + c;
        float *first = room + (size_t)(t + 1) * 2 * c, *second = first + c;
        for (int i = 0; i < 2 * c; i++) means[i] = 0;
        for (size_t p = begin; p < end; p += BLOCK) {
            double many = end - p < BLOCK ? end - p : BLOCK;
            const float *shift = x + p * c; /* near the mean, so that little is lost in single precision */
            for (int i = 0; i < 2 * c; i++) first[i] = 0;
            add_up_squares(many, c, shift, shift, first, second);
            for (int i = 0; i < c; i++) {
                double count = p - begin, sum = first[i];
                join(means + i, squares + i, &count, shift[i] + sum / many, second[i] - sum * sum / many, many);
            }
        }
    }
    for (int i = 0; i < channels; i++) {
        double all = 0, squares = 0, count = 0;
        for (int t = 0; t < threads; t++)
            for (int at = i; at < c; at += channels) {
                const double *own = found + (size_t)t * 2 * c + at;
                join(&all, &squares, &count, own[0], own[c], (double)(n * (t + 1) / threads - n * t / threads));
            }
        mean[i] = all;
        var[i] = squares / count;
        double scale = weight[i] / sqrt(var[i] + eps);
        for (int at = i; at < c; at += channels) factor[at] = scale, offset[at] = bias[i] - scale * mean[i];
    }
    gconv_norm(threads, n, c, x, factor, offset, relu, y);
    free(found), free(room);
    return 0;
}

/* The gradients of x, the weight and the bias, from that of y: through y itself, and through mean and variance, which
 * adds a line in x for each channel. The map y is given if ReLU was applied, else NULL. */
int gconv_norm_backward(int threads, size_t n, int channels, int order, const float *g, const float *x, const float *y,
                        const float *weight, const float *mean, const float *var, double eps, float *dx, float *dw,
                        float *db)
{
    int c = order * channels;
    double *found = calloc((size_t)2 * c * threads, sizeof(double));
    float *room = malloc(sizeof(float) * c * (2 * threads + 4));
    if (!found || !room) {
        free(found), free(room);
        return 1;
    }
    float *means = room, *factor = means + c, *slope = factor + c, *offset = slope + c, *blocks = offset + c;
    for (int at = 0; at < c; at++) means[at] = mean[at % channels];
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; t++) {
        size_t begin = n * t / threads, end = n * (t + 1) / threads;
        double *sums = found + (size_t)t * 2 * c;
        float *some = blocks + (size_t)t * 2 * c;
        for (size_t p = begin; p < end; p += BLOCK) {
            size_t many = end - p < BLOCK ? end - p : BLOCK, at = p * c;
            for (int i = 0; i < 2 * c; i++) some[i] = 0;
            add_up(many, c, g + at, x + at, y ? y + at : NULL, means, some, some + c);
            for (int i = 0; i < 2 * c; i++) sums[i] += some[i];
        }
    }
    for (int i = 0; i < channels; i++) {
        double first = 0, second = 0, count = (double)n * order, inverse = 1 / sqrt(var[i] + eps);
        for (int t = 0; t < threads; t++)
            for (int at = i; at < c; at += channels) {
                first += found[(size_t)t * 2 * c + at];
                second += found[(size_t)t * 2 * c + c + at];
            }
        db[i] = first;
        dw[i] = second * inverse;
        double scale = weight[i] * inverse, tilt = -scale * inverse * inverse * second / count;
        for (int at = i; at < c; at += channels) {
            factor[at] = scale, slope[at] = tilt;
            offset[at] = -scale * first / count - tilt * mean[i];
        }
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; t++) {
        size_t begin = n * t / threads, many = n * (t + 1) / threads - begin, at = begin * c;
        line(many, c, g + at, x + at, y ? y + at : NULL, factor, slope, offset, dx + at);
    }
    free(found), free(room);
    return 0;
}

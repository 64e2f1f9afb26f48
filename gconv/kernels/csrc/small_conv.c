/* Ordinary convolutions of few channels, without padding, over channels-last maps: [n][H][W][C] to [n][H'][W'][O].
 *
 * The values that a position reads with one row of the filter are neighbours in memory, k C of them. Vectors of eight are
 * all full with 40 channels, where those of sixteen would not be, and a processor with AVX-512 runs twice as many of
 * them. */

#include <stddef.h>

#include "versions.h"
#include "workers.h"

#if defined(__x86_64__)

enum { LANES = 8, TALL = 5, WIDE = 5 }; /* of 32 registers, 25 hold sums and 5 weights */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int ints __attribute__((vector_size(4 * LANES)));

struct sizes { int channels, out_channels, k, height, width; };

/* `rows` positions of a row, and `cols` vectors of output channels, with weights [k][k C][out_channels]. */
INLINE TARGET_AVX512 void tile(const struct sizes *s, const float *x, const float *w, const float *bias, int relu, float *y,
                               const int rows, const int cols)
{
    vec sums[TALL][WIDE];
    int span = s->k * s->channels;
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < cols; j++) sums[i][j] = bias ? *(const vec *)(bias + j * LANES) : (vec){0};
    for (int dy = 0; dy < s->k; dy++, x += (size_t)s->width * s->channels)
        for (int t = 0; t < span; t++, w += s->out_channels) {
            vec here[WIDE];
            UNROLLED for (int j = 0; j < cols; j++) here[j] = *(const vec *)(w + j * LANES);
            UNROLLED for (int i = 0; i < rows; i++) {
                float value = x[i * s->channels + t];
                UNROLLED for (int j = 0; j < cols; j++) sums[i][j] += value * here[j];
            }
        }
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < cols; j++) {
            vec value = sums[i][j];
            if (relu) value = (vec)(~(value < 0) & (ints)value); /* NaN stays NaN */
            *(vec *)(y + (size_t)i * s->out_channels + j * LANES) = value;
        }
}

TARGET_AVX512 static void row(const struct sizes *s, const float *x, const float *w, const float *bias, int relu, float *y)
{
    for (int j = 0; j < s->out_channels;) {
        int cols = (s->out_channels - j) / LANES, left = s->width - s->k + 1;
        cols = cols == 6 ? 3 : cols > WIDE ? cols == 7 || cols == 8 ? 4 : WIDE : cols;
        const float *from = x;
        float *to = y + j;
        while (left) {
            int rows = left <= TALL ? left : left < 2 * TALL ? (left + 1) / 2 : TALL;
#define COLS(R, C) case C: tile(s, from, w + j, bias ? bias + j : NULL, relu, to, R, C); break;
#define ROWS(R) case R: switch (cols) { COLS(R, 1) COLS(R, 2) COLS(R, 3) COLS(R, 4) COLS(R, 5) } break;
            switch (rows) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) }
#undef ROWS
#undef COLS
            left -= rows, from += rows * s->channels, to += (size_t)rows * s->out_channels;
        }
        j += cols * LANES;
    }
}

struct convolution { struct sizes s; int n, workers, relu; const float *x, *w, *bias; float *y; };

static void work_on_rows(void *context, int number)
{
    const struct convolution *c = context;
    const struct sizes *s = &c->s;
    size_t rows = s->height - s->k + 1, last = share(c->n * rows, number + 1, c->workers);
    for (size_t at = share(c->n * rows, number, c->workers); at < last; at++)
        row(s, c->x + (at / rows * s->height + at % rows) * s->width * s->channels, c->w, c->bias, c->relu,
            c->y + at * (s->width - s->k + 1) * s->out_channels);
}

/* With weights [k][k][C][O], O a multiple of eight, a bias or NULL, and ReLU if asked. For processors with AVX512. Returns
 * 0. */
EXPORT int gconv_small_conv(int threads, int n, int channels, int out_channels, int k, int height, int width, const float *x,
                            const float *w, const float *bias, int relu, float *y)
{
    struct convolution c = {{channels, out_channels, k, height, width}, n, 0, relu, x, w, bias, y};
    double rows = (double)n * (height - k + 1);
    c.workers = workers_for(threads, rows * (width - k + 1) * k * k * channels * out_channels);
    if (c.workers > rows) c.workers = rows;
    run_workers(c.workers, work_on_rows, &c);
    return 0;
}

#else

EXPORT int gconv_small_conv(int threads, int n, int channels, int out_channels, int k, int height, int width, const float *x,
                            const float *w, const float *bias, int relu, float *y)
{
    (void)threads, (void)n, (void)channels, (void)out_channels, (void)k, (void)height, (void)width, (void)x, (void)w;
    (void)bias, (void)relu, (void)y;
    return 1; /* Python never calls it here */
}

#endif

/* Ordinary convolutions of few channels, without padding, over channels-last maps: [n][H][W][C] to [n][H'][W'][O].
 *
 * Of a row of the filter, what a position reads lies together in memory, k C values. Vectors of eight waste nothing on 40
 * channels, as sixteen would, and go through a processor with AVX-512 at twice the number. */

#include <stddef.h>

#if defined(__x86_64__)

enum { LANES = 8, TALL = 5, WIDE = 5 }; /* of 32 registers 25 hold sums, 5 weights */

#define TARGET __attribute__((target("avx512f,avx512vl,fma")))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int ints __attribute__((vector_size(4 * LANES)));

struct sizes { int channels, out_channels, k, height, width; };

/* rows positions in a row, cols vectors of output channels from w [k][k C][out_channels]. */
static inline __attribute__((always_inline)) TARGET void tile(const struct sizes *s, const float *x, const float *w,
                                                              const float *bias, int relu, float *y, const int rows,
                                                              const int cols)
{
    vec sums[TALL][WIDE];
    int span = s->k * s->channels;
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) sums[i][j] = bias ? *(const vec *)(bias + j * LANES) : (vec){0};
    for (int dy = 0; dy < s->k; dy++, x += (size_t)s->width * s->channels)
        for (int t = 0; t < span; t++, w += s->out_channels) {
            vec here[WIDE];
            for (int j = 0; j < cols; j++) here[j] = *(const vec *)(w + j * LANES);
            for (int i = 0; i < rows; i++) {
                float value = x[i * s->channels + t];
                for (int j = 0; j < cols; j++) sums[i][j] += value * here[j];
            }
        }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) {
            vec value = sums[i][j];
            if (relu) value = (vec)(~(value < 0) & (ints)value); /* what is not a number stays so */
            *(vec *)(y + (size_t)i * s->out_channels + j * LANES) = value;
        }
}

TARGET static void row(const struct sizes *s, const float *x, const float *w, const float *bias, int relu, float *y)
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

/* Whether this processor can. */
int gconv_small_conv_runs(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

/* With weights [k][k][C][O], O a multiple of eight, a bias or NULL, and ReLU if asked. Returns 0. */
int gconv_small_conv(int threads, int n, int channels, int out_channels, int k, int height, int width, const float *x,
               const float *w, const float *bias, int relu, float *y)
{
    const struct sizes s = {channels, out_channels, k, height, width};
    int rows = height - k + 1, bands = n < threads ? (threads + n - 1) / n : 1;
    if (bands > rows) bands = rows;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int task = 0; task < n * bands; task++) {
        int image = task / bands, band = task % bands;
        for (int i = rows * band / bands; i < rows * (band + 1) / bands; i++)
            row(&s, x + ((size_t)image * height + i) * width * channels, w, bias, relu,
                y + ((size_t)image * rows + i) * (width - k + 1) * out_channels);
    }
    return 0;
}

#else

int gconv_small_conv_runs(void) { return 0; }

#endif

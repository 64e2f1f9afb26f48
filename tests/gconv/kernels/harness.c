/* Runs the kernels without Python on the cases of a file that harness.py writes, and compares with what is expected there.
 * For each case every version is run that pads channels as the case says and that this processor has. */

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer.h"
#include "versions.h"

int gconv_supports(int);
void gconv_use_threads(void *, void *, void *, double);
int gconv_workers(int, const struct layer *, int, int, int);
int gconv_pack(int, const struct layer *, int, const float *, const float *, const float *, float *);
int gconv_forward(int, const struct layer *, int, int, const float *, const float *, const float *, int, float *);
int gconv_backward(int, const struct layer *, int, int, const float *, const float *, const float *, float *, float *,
                   float *, float *);
int gconv_small_conv(int, int, int, int, int, int, int, const float *, const float *, const float *, int, float *);
int gconv_norm_train(int, int, size_t, int, int, const float *, const float *, const float *, double, int, float *, float *,
                     float *);
int gconv_norm_backward(int, int, size_t, int, int, const float *, const float *, const float *, const float *,
                        const float *, const float *, double, float *, float *, float *);

/* Threads as OpenMP gives them. */
static __thread int own_number, team_size = 1;
struct member { void (*work)(void *); void *context; int number, size; };

static void *start(void *given)
{
    struct member *m = given;
    own_number = m->number, team_size = m->size;
    m->work(m->context);
    return NULL;
}

static void parallel(void (*work)(void *), void *context, unsigned threads, unsigned flags)
{
    (void)flags;
    pthread_t ids[64];
    struct member members[64];
    for (unsigned i = 0; i < threads; i++) {
        members[i] = (struct member){work, context, i, threads};
        if (pthread_create(ids + i, NULL, start, members + i)) abort();
    }
    for (unsigned i = 0; i < threads; i++) pthread_join(ids[i], NULL);
}

static int number(void) { return own_number; }

static int size(void) { return team_size; }

static FILE *file;
static int cases, runs, wrong;

/* Memory of exactly this size, so that a sanitizer sees what reads or writes beyond it. */
static void *memory(size_t bytes)
{
    void *made = malloc(bytes ? bytes : 1);
    if (!made) abort();
    return made;
}

static void *values(size_t count)
{
    void *made = memory(4 * count);
    if (fread(made, 4, count, file) != count) {
        fprintf(stderr, "the file of cases ends early\n");
        exit(2);
    }
    return made;
}

static float *output(size_t count)
{
    float *made = memory(sizeof(float) * count);
    for (size_t i = 0; i < count; i++) made[i] = NAN;
    return made;
}

static void compare(const char *what, int version, const float *found, const float *expected, size_t count)
{
    float most = 1e-3f, difference = 0;
    for (size_t i = 0; i < count; i++) {
        float apart = fabsf(found[i] - expected[i]);
        most = fmaxf(most, fabsf(expected[i]));
        difference = isnan(apart) ? INFINITY : fmaxf(difference, apart);
    }
    if (difference <= 3e-5f * most) return;
    wrong++;
    printf("case %d, version %d: %s differs by %g of %g\n", cases, version, what, difference, most);
}

static void run_layer(int version, const struct layer *l, int n, int threads, int relu, const float *mix,
                      const float *spatial, const float *bias, const float *x, const float *residual, const float *gy,
                      float *const *expected, const size_t *counts)
{
    int lanes = versions[version].lanes;
    float *packed = output(l->weights + l->weights_back + 2 * spatial_floats(l, lanes)
                           + (l->biased ? rounded(l->order * l->out_channels, lanes) : 0));
    float *found[5];
    for (int i = 0; i < 5; i++) found[i] = output(counts[i]);
    int failed = gconv_pack(version, l, threads, mix, spatial, bias, packed);
    failed |= gconv_forward(version, l, n, threads, packed, x, residual, relu, found[0]);
    failed |= gconv_backward(version, l, n, threads, packed, x, gy, found[1], found[2], counts[3] ? found[3] : NULL,
                             bias ? found[4] : NULL);
    if (failed) wrong++;
    const char *names[] = {"y", "gradient of x", "gradient of mix", "gradient of spatial", "gradient of bias"};
    for (int i = 0; i < 5; i++)
        if (counts[i]) compare(names[i], version, found[i], expected[i], counts[i]);
    for (int i = 0; i < 5; i++) free(found[i]);
    free(packed);
    runs++;
}

static void separable_conv(void)
{
    int *numbers = values(6);
    int lanes = numbers[0], n = numbers[1], threads = numbers[2], relu = numbers[3], with_residual = numbers[4];
    int matrices = numbers[5];
    struct layer l;
    int *fields = values(18);
    memcpy(&l, fields, sizeof(int) * 18);
    int s = l.order, kk = l.k * l.k;
    size_t pairs = (size_t)l.rank * l.in_channels * l.out_channels * s;
    size_t in = (size_t)n * l.height * l.width * s * l.in_channels;
    size_t out = (size_t)n * l.out_height * l.out_width * s * l.out_channels;
    size_t kernels = l.whole ? 0 : (size_t)l.rank * kk * (spatial_channels(&l) / s), biases = l.biased ? l.out_channels : 0;
    void *table = values(l.products * ENTRIES), *parts = values(matrices), *basis = values(s * s), *pixels = values(s * kk);
    l.table = table, l.matrices = parts, l.basis = basis, l.pixels = pixels;
    float *mix = values(pairs), *spatial = values(kernels), *bias = values(biases), *x = values(in);
    float *residual = values(with_residual ? out : 0), *gy = values(out);
    size_t counts[] = {out, in, pairs, kernels, biases};
    float *expected[5];
    for (int i = 0; i < 5; i++) expected[i] = values(counts[i]);
    for (int version = 0; version < version_count; version++)
        if (versions[version].forward && versions[version].lanes == lanes && gconv_supports(versions[version].instructions)
            && (lanes > 1 || l.stride == 1))
            run_layer(version, &l, n, threads, relu, mix, spatial, l.biased ? bias : NULL, x,
                      with_residual ? residual : NULL, gy, expected, counts);
    for (int i = 0; i < 5; i++) free(expected[i]);
    free(gy), free(residual), free(x), free(bias), free(spatial), free(mix);
    free(pixels), free(basis), free(parts), free(table), free(fields), free(numbers);
}

static void batch_norm(void)
{
    int *numbers = values(5);
    int n = numbers[0], channels = numbers[1], order = numbers[2], relu = numbers[3], threads = numbers[4];
    size_t all = (size_t)n * channels * order, counts[] = {all, channels, channels, all, channels, channels};
    float *x = values(all), *weight = values(channels), *bias = values(channels), *g = values(all), *expected[6];
    for (int i = 0; i < 6; i++) expected[i] = values(counts[i]);
    for (int set = 0; set < INSTRUCTION_SETS; set++) {
        if (!gconv_supports(set)) continue;
        float *found[6];
        for (int i = 0; i < 6; i++) found[i] = output(counts[i]);
        int failed = gconv_norm_train(set, threads, n, channels, order, x, weight, bias, 1e-5, relu, found[0], found[1],
                                      found[2]);
        failed |= gconv_norm_backward(set, threads, n, channels, order, g, x, relu ? found[0] : NULL, weight, found[1],
                                      found[2], 1e-5, found[3], found[4], found[5]);
        if (failed) wrong++;
        const char *names[] = {"y", "mean", "variance", "gradient of x", "gradient of weight", "gradient of bias"};
        for (int i = 0; i < 6; i++) compare(names[i], set, found[i], expected[i], counts[i]);
        for (int i = 0; i < 6; i++) free(found[i]);
        runs++;
    }
    for (int i = 0; i < 6; i++) free(expected[i]);
    free(g), free(bias), free(weight), free(x), free(numbers);
}

static void small_conv(void)
{
    int *numbers = values(8);
    int n = numbers[0], channels = numbers[1], outs = numbers[2], k = numbers[3], height = numbers[4], width = numbers[5];
    size_t out = (size_t)n * (height - k + 1) * (width - k + 1) * outs;
    float *x = values((size_t)n * height * width * channels), *w = values((size_t)k * k * channels * outs);
    float *bias = values(outs), *expected = values(out), *found = output(out);
    if (gconv_supports(AVX512)) {
        if (gconv_small_conv(numbers[7], n, channels, outs, k, height, width, x, w, bias, numbers[6], found)) wrong++;
        compare("small convolution", AVX512, found, expected, out);
        runs++;
    }
    free(found), free(expected), free(bias), free(w), free(x), free(numbers);
}

int main(int count, char **arguments)
{
    file = count == 2 ? fopen(arguments[1], "rb") : NULL;
    if (!file) {
        fprintf(stderr, "usage: harness FILE\n");
        return 2;
    }
    gconv_use_threads((void *)parallel, (void *)number, (void *)size, 1);
    int kind;
    while (fread(&kind, 4, 1, file) == 1) {
        if (kind == 0) separable_conv();
        else if (kind == 1) batch_norm();
        else small_conv();
        cases++;
    }
    fclose(file);
    printf("%d cases, %d runs, %d wrong\n", cases, runs, wrong);
    return !!wrong || !runs;
}

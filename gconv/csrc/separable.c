/* Group convolutions of the forms gc and gc_in, factorised, in one pass over their maps.
 *
 * Maps are channels-last and group-major: the values of a position are [S][C]. A layer mixes them by small matrix
 * products, in a basis of the group axis or directly, and filters every channel in the plane by itself, in the one
 * order or the other. Done one after the other for whole maps that is a matter of memory; here each thread takes an
 * image and does it row by row, so that what lies between the two stays in its cache.
 *
 * Everything that is specific to an instruction set is in rows.h, which is included once for each. Threads are those of
 * the OpenMP library that PyTorch has loaded, to which this one leaves its symbols to be resolved.
 */

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* The mix is a sum of matrix products. The entries of a row of `table` that describes one of them: */
enum {
    READ,          /* the first value of a position that it reads, */
    DEPTH,         /* how many, */
    WRITTEN,       /* the first value that it writes */
    COLUMNS,       /* and how many; */
    ADDED,         /* whether it adds them to what is there, and */
    ADDED_BACK,    /* whether the transposed product, of the gradients, does; */
    MATRIX,        /* where [COLUMNS][DEPTH] is among the matrices as given, */
    PACKED,        /* where among those packed, and */
    PACKED_BACK,   /* where the transposed one is */
    ENTRIES
};

struct layer {
    int order, in_channels, out_channels, rank, planar_first;
    int k, stride, padding, height, width, out_height, out_width;
    int products, in_basis, biased;
    int weights, weights_back; /* how many floats the packed matrices are */
    const int *table;
    const float *packed;       /* what `pack` wrote */
};

/* What `pack` writes, one after the other. The kernels read vectors, so channels are rounded up to their length. */
struct parts {
    float *weights;            /* each matrix [COLUMNS / lanes][DEPTH][lanes] */
    float *weights_back;       /* likewise, of the transposed ones */
    float *planar;             /* [rank][k k][channels] */
    float *planar_back;        /* the same, turned by a half */
    float *basis, *basis_back; /* [S][S] and its transpose, or NULL for direct mixing */
    float *bias;               /* [S out_channels], or NULL */
};

enum { MOST_K = 15, MOST_ORDER = 8, SPARE = 16 };

/* A row length with room for a vector that begins at the last value. */
static inline int padded(int values) { return (values + SPARE - 1) / SPARE * SPARE + SPARE; }

static inline int rounded(int values, int lanes) { return (values + lanes - 1) / lanes * lanes; }

static inline int planar_channels(const struct layer *l)
{
    return l->order * (l->planar_first ? l->in_channels : l->out_channels);
}

static inline struct parts parts_of(const struct layer *l, int lanes)
{
    size_t planes = (size_t)l->rank * l->k * l->k * rounded(planar_channels(l), lanes), square = l->order * l->order;
    struct parts p;
    p.weights = (float *)l->packed;
    p.weights_back = p.weights + l->weights;
    p.planar = p.weights_back + l->weights_back;
    p.planar_back = p.planar + planes;
    p.basis = p.planar_back + planes;
    p.basis_back = p.basis + square;
    p.bias = p.basis_back + square;
    if (!l->in_basis) p.basis = p.basis_back = NULL;
    if (!l->biased) p.bias = NULL;
    return p;
}

/* Rows whose matrix gradients are computed together: of short ones the sums would be read and written too often. */
static inline int batch_of(const struct layer *l)
{
    int width = l->planar_first ? l->out_width : l->width;
    return width < 64 ? 64 / width : 1;
}

static inline size_t floats(int positions, int row) { return (size_t)positions * row; }

typedef void forward_rows(const struct layer *, const float *x, const float *more, int relu, float *y, int first, int last,
                          float *scratch);
typedef void backward_image(const struct layer *, const float *x, const float *gy, float *gx, float *gw, float *gd,
                            float *scratch);

#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma")))
#define V 16
#define TALL 8
#define MASKED 1
#include "rows.h"

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define V 8
#define TALL 4
#define MASKED 0
#include "rows.h"
#endif

#define NAME(x) x##_any
#define TARGET
#define V 4
#define TALL 4
#define MASKED 0
#include "rows.h"

static const struct { int lanes; forward_rows *forward; backward_image *backward; } variants[] = {
#if defined(__x86_64__)
    {16, forward_avx512, backward_avx512},
    {8, forward_avx2, backward_avx2},
#endif
    {4, forward_any, backward_any},
};

/* The floats a vector of that variant has; 0 if this processor cannot run it, -1 if there is none of that number. */
int gconv_lanes(int variant)
{
    if (variant < 0 || variant >= (int)(sizeof variants / sizeof *variants)) return -1;
    int lanes = variants[variant].lanes;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (lanes == 16 && !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
                         && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")))
        return 0;
    if (lanes == 8 && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return 0;
#endif
    return lanes;
}

/* Matrices [COLUMNS][DEPTH], planes [rank][channels][k k], the basis [S][S] and the bias as the kernels read them. */
void gconv_pack(int variant, const struct layer *l, const float *matrices, const float *planes, const float *basis,
                const float *bias)
{
    int lanes = variants[variant].lanes, kk = l->k * l->k, c = planar_channels(l), s = l->order;
    int co = s * l->out_channels;
    struct parts p = parts_of(l, lanes);
    for (int i = 0; i < l->products; i++) {
        const int *t = l->table + ENTRIES * i;
        const float *from = matrices + t[MATRIX];
        for (int j = 0; j < rounded(t[COLUMNS], lanes); j++)
            for (int d = 0; d < t[DEPTH]; d++)
                p.weights[t[PACKED] + (j / lanes * t[DEPTH] + d) * lanes + j % lanes] =
                    j < t[COLUMNS] ? from[j * t[DEPTH] + d] : 0;
        for (int d = 0; d < rounded(t[DEPTH], lanes); d++)
            for (int j = 0; j < t[COLUMNS]; j++)
                p.weights_back[t[PACKED_BACK] + (d / lanes * t[COLUMNS] + j) * lanes + d % lanes] =
                    d < t[DEPTH] ? from[j * t[DEPTH] + d] : 0;
    }
    for (int r = 0; r < l->rank; r++)
        for (int t = 0; t < kk; t++)
            for (int i = 0; i < rounded(c, lanes); i++) {
                float value = i < c ? planes[(r * c + i) * kk + t] : 0;
                p.planar[(r * kk + t) * rounded(c, lanes) + i] = value;
                p.planar_back[(r * kk + kk - 1 - t) * rounded(c, lanes) + i] = value;
            }
    if (basis)
        for (int i = 0; i < s; i++)
            for (int j = 0; j < s; j++) p.basis[i * s + j] = p.basis_back[j * s + i] = basis[i * s + j];
    if (bias)
        for (int i = 0; i < rounded(co, lanes); i++) p.bias[i] = i < co ? bias[i] : 0;
}

/* More than any function of rows.h takes from its scratch. */
static size_t scratch_bytes(const struct layer *l, int whole_image)
{
    size_t row = padded(l->order * l->in_channels * l->rank) + padded(l->order * l->out_channels * l->rank);
    size_t wide = (l->width > l->out_width ? l->width : l->out_width) + 2 * (l->k + l->padding);
    size_t rows = 2 * l->k + 8 + (whole_image ? l->height + 4 * batch_of(l) : 0);
    return (rows * wide * row * sizeof(float) + 63) / 64 * 64;
}

/* y [n][H'][W'][S O] from x [n][H][W][S I]; `more`, if given, is added, and then comes a ReLU if asked. Returns 0, or 1 if
 * there is no memory. */
int gconv_forward(int variant, const struct layer *l, int n, int threads, const float *x, const float *more, int relu,
                  float *y)
{
    int bands = n < threads ? (threads + n - 1) / n : 1, failed = 0;
    if (bands > l->out_height) bands = l->out_height;
    size_t in = floats(l->height * l->width, l->order * l->in_channels);
    size_t out = floats(l->out_height * l->out_width, l->order * l->out_channels);
#pragma omp parallel num_threads(threads)
    {
        float *scratch = aligned_alloc(64, scratch_bytes(l, 0));
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int task = 0; task < n * bands; task++) {
            int image = task / bands, band = task % bands;
            if (scratch)
                variants[variant].forward(l, x + image * in, more ? more + image * out : NULL, relu, y + image * out,
                                          l->out_height * band / bands, l->out_height * (band + 1) / bands, scratch);
        }
        free(scratch);
    }
    return failed;
}

/* The gradients of the map, the matrices and, if not NULL, the planes, the last two as pack gets them. Each thread adds up those of its
 * images in `sums` [threads][weights + planes], zeros at first; which they are is fixed, so that sums are the same each
 * time. Returns 0, or 1 if there is no memory. */
int gconv_backward(int variant, const struct layer *l, int n, int threads, const float *x, const float *gy, float *sums,
                   float *gx, float *matrices, float *planes)
{
    int failed = 0, lanes = variants[variant].lanes, kk = l->k * l->k, c = planar_channels(l);
    size_t in = floats(l->height * l->width, l->order * l->in_channels);
    size_t out = floats(l->out_height * l->out_width, l->order * l->out_channels);
    size_t each = l->weights + (size_t)l->rank * kk * rounded(c, lanes);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int t = 0; t < threads; t++) {
        float *scratch = aligned_alloc(64, scratch_bytes(l, 1));
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
        for (int image = t; scratch && image < n; image += threads)
            variants[variant].backward(l, x + image * in, gy + image * out, gx + image * in, sums + t * each,
                                       planes ? sums + t * each + l->weights : NULL, scratch);
        free(scratch);
    }
    for (int t = 1; t < threads; t++)
        for (size_t i = 0; i < each; i++) sums[i] += sums[t * each + i];
    for (int i = 0; i < l->products; i++) {
        const int *t = l->table + ENTRIES * i;
        for (int j = 0; j < t[COLUMNS]; j++)
            for (int d = 0; d < t[DEPTH]; d++)
                matrices[t[MATRIX] + j * t[DEPTH] + d] = sums[t[PACKED] + d * rounded(t[COLUMNS], lanes) + j];
    }
    for (int r = 0; r < l->rank && planes; r++)
        for (int i = 0; i < c; i++)
            for (int t = 0; t < kk; t++) {
                int at = l->planar_first ? t : kk - 1 - t; /* the gradients that gc finds are turned by a half */
                planes[(r * c + i) * kk + t] = sums[l->weights + (r * kk + at) * rounded(c, lanes) + i];
            }
    return failed;
}

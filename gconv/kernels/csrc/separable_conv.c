/* Group convolutions of the forms gc and gc_in, factorised, in one pass over their maps.
 *
 * Maps are channels-last and group-major: the values of a position are [S][C]. A layer mixes them by small matrix
 * products, in a basis of the group axis or directly, and filters every channel in the plane by itself, in the one
 * order or the other. Done one after the other for whole maps that is a matter of memory; here each thread takes an
 * image and does it by rows, so that what lies between the two stays in its cache: row by row with vectors of channels
 * (over_channels.h), or in bands of rows with vectors of positions, where channels are few (over_pixels.h).
 *
 * Both are included once for each instruction set that they are for. Threads are those of the OpenMP library that PyTorch
 * has loaded, to which this one leaves its symbols to be resolved.
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
    PACKED,        /* where its matrix [COLUMNS][DEPTH] is among those packed, and */
    PACKED_BACK,   /* where the transposed one is; */
    TERM,          /* of the R terms of the filter the one that it is of; */
    SIZE,          /* d: the matrix is made of d d blocks [out_channels][in_channels], */
    MATRICES,      /* each a sum over u of the mix, times [S][d][d] at this place of `matrices`; */
    FIRST,         /* whether it is the first product with this matrix */
    ENTRIES
};

struct layer {
    int order, in_channels, out_channels, rank, spatial_first;
    int k, stride, padding, height, width, out_height, out_width;
    int products, in_basis, biased;
    int weights, weights_back; /* how many floats the packed matrices are */
    const int *table;
    const float *matrices, *basis; /* of the group: see TERM, SIZE and MATRICES; and [S][S] */
    const int *pixels;             /* [S][k k]: entry y of a kernel transformed by s is that entry of the kernel */
};

enum { MOST_K = 15, MOST_ORDER = 8, SPARE = 16, BAND = 1 << 17 /* floats of all planes of one, in over_pixels.h */ };

/* What `pack` writes, one after the other, and the basis. Where vectors are of channels, these are rounded up to their
 * length, `lanes`; else to one. */
struct parts {
    float *weights;            /* each matrix [COLUMNS / lanes][DEPTH][lanes] */
    float *weights_back;       /* likewise, of the transposed ones */
    float *spatial;             /* [rank][k k][channels] */
    float *spatial_back;        /* the same, flipped */
    float *bias;               /* [S out_channels], or NULL */
    int rows;                  /* of a band, in over_pixels.h */
    float basis[MOST_ORDER * MOST_ORDER], basis_back[MOST_ORDER * MOST_ORDER]; /* [S][S] and its transpose */
};

/* A row length with room for a vector that begins at the last value. */
static inline int padded(int values) { return (values + SPARE - 1) / SPARE * SPARE + SPARE; }

static inline int rounded(int values, int lanes) { return (values + lanes - 1) / lanes * lanes; }

static inline int spatial_channels(const struct layer *l)
{
    return l->order * (l->spatial_first ? l->in_channels : l->out_channels);
}

/* How many floats the packed spatial kernels are. */
static inline size_t spatial_floats(const struct layer *l, int lanes)
{
    return (size_t)l->rank * l->k * l->k * rounded(spatial_channels(l), lanes);
}

static struct parts parts_of(const struct layer *l, int lanes, const float *packed)
{
    size_t planes = spatial_floats(l, lanes);
    struct parts p;
    p.weights = (float *)packed;
    p.weights_back = p.weights + l->weights;
    p.spatial = p.weights_back + l->weights_back;
    p.spatial_back = p.spatial + planes;
    p.bias = l->biased ? p.spatial_back + planes : NULL;
    for (int i = 0; i < l->order; i++)
        for (int j = 0; j < l->order; j++)
            p.basis[i * l->order + j] = p.basis_back[j * l->order + i] = l->basis[i * l->order + j];
    return p;
}

/* Rows whose matrix gradients are computed together: of short ones the sums would be read and written too often. */
static inline int batch_of(const struct layer *l)
{
    int width = l->spatial_first ? l->out_width : l->width;
    return width < 64 ? 64 / width : 1;
}

static inline size_t floats(int positions, int row) { return (size_t)positions * row; }

/* Of over_pixels.h: how many values a row of a plane has, those before the first row, among them zeros above the map, and all
 * of a plane with this many rows: an odd number of lines, as caches mistake addresses for each other that are a large
 * power of two apart. */
static inline int pitch_of(const struct layer *l) { return l->width > l->out_width ? l->width : l->out_width; }

static inline int margin_of(const struct layer *l)
{
    int border = l->k - 1 - l->padding, most = border > l->padding ? border : l->padding;
    return rounded(most * (pitch_of(l) + 1), SPARE);
}

static inline int plane_of(const struct layer *l, int rows)
{
    return (margin_of(l) + rounded(rows * pitch_of(l) + 8 + l->k, SPARE)) | SPARE;
}

/* What becomes of what the filters give, and where: a bias [S O] and another map are added, if they are not NULL, and
 * then comes ReLU, if asked. */
struct ending { const float *bias, *residual; int relu; float *y; };

/* Into the second cache, as whole maps are seldom there: what will be read or written next. */
static inline void prefetch(const float *from, size_t size)
{
    for (size_t i = 0; i < size; i += 16) __builtin_prefetch(from + i, 0, 2);
}

typedef void forward_rows(const struct layer *, const struct parts *, const float *x, const float *residual, int relu,
                          float *y, int first, int last, float *scratch);
typedef void backward_image(const struct layer *, const struct parts *, const float *x, const float *gy, float *gx,
                            float *gw, float *gd, float *gb, float *scratch);

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

#if defined(__x86_64__)
#define AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma")))

#define NAME(x) x##_avx512
#define TARGET AVX512
#define V 16
#define REGISTERS 32
#define WIDE 3
#define LOAD_MASKED(mask, from) _mm512_maskz_loadu_ps((__mmask16)(mask), from)
#define STORE_MASKED(to, mask, value) _mm512_mask_storeu_ps(to, (__mmask16)(mask), (__m512)(value))
#include "over_channels.h"

#define NAME(x) x##_pixels
#define TARGET AVX512
#define V 8
#define REGISTERS 32
#define WIDE 5
#define LOAD_MASKED(mask, from) _mm256_maskz_loadu_ps((__mmask8)(mask), from)
#define STORE_MASKED(to, mask, value) _mm256_mask_storeu_ps(to, (__mmask8)(mask), (__m256)(value))
#include "over_pixels.h"

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define V 8
#define REGISTERS 16
#define WIDE 3
#include "over_channels.h"
#endif

#define NAME(x) x##_any
#define TARGET
#define V 4
#define REGISTERS 16
#define WIDE 3
#include "over_channels.h"

/* `sums`: how many are kept of each value of the gradients of the parameters, to be added up at the end; above one those
 * of over_pixels.h. */
static const struct { int lanes, sums; forward_rows *forward; backward_image *backward; } variants[] = {
#if defined(__x86_64__)
    {1, 8, forward_pixels, backward_pixels},
    {16, 1, forward_avx512, backward_avx512},
    {8, 1, forward_avx2, backward_avx2},
#endif
    {4, 1, forward_any, backward_any},
};

/* To a multiple of what that variant rounds channels up; 0 if this processor cannot run it, -1 if there is none of that
 * number. */
int gconv_lanes(int variant)
{
    if (variant < 0 || variant >= (int)(sizeof variants / sizeof *variants)) return -1;
    int lanes = variants[variant].lanes;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (variant < 2 && !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
                         && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")))
        return 0;
    if (variant == 2 && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return 0;
#endif
    return lanes;
}

/* Where the S entries of a mix are, `gc` [O][R][I][S] or `gc_in` [I][R][O][S]. */
static inline size_t mix_at(const struct layer *l, int term, int o, int i)
{
    size_t first = l->spatial_first ? i : o, second = l->spatial_first ? o : i;
    return ((first * l->rank + term) * (l->spatial_first ? l->out_channels : l->in_channels) + second) * l->order;
}

/* Of one term of a mix, the S matrices [O][I] one after the other, in `apart`, and from these those of the products. */
static void pack_term(const struct layer *l, const struct parts *p, int lanes, int term, const float *mix, float *apart,
                      float *matrix)
{
    int s = l->order, outs = l->out_channels, ins = l->in_channels;
    size_t pairs = (size_t)outs * ins;
    for (int o = 0; o < outs; o++)
        for (int i = 0; i < ins; i++) {
            const float *from = mix + mix_at(l, term, o, i);
            for (int u = 0; u < s; u++) apart[u * pairs + o * ins + i] = from[u];
        }
    for (int n = 0; n < l->products; n++) {
        const int *t = l->table + ENTRIES * n;
        if (t[TERM] != term || !t[FIRST]) continue;
        int d = t[SIZE], depth = t[DEPTH], columns = t[COLUMNS];
        memset(matrix, 0, sizeof(float) * columns * depth);
        for (int a = 0; a < d; a++)
            for (int b = 0; b < d; b++)
                for (int u = 0; u < s; u++) {
                    float factor = l->matrices[t[MATRICES] + (u * d + a) * d + b];
                    if (factor == 0) continue;
                    for (int o = 0; o < outs; o++) {
                        float *to = matrix + (size_t)(a * outs + o) * depth + b * ins;
                        const float *from = apart + u * pairs + (size_t)o * ins;
                        for (int i = 0; i < ins; i++) to[i] += factor * from[i];
                    }
                }
        float *w = p->weights + t[PACKED], *back = p->weights_back + t[PACKED_BACK];
        for (int j = 0; j < columns; j += lanes)
            for (int e = 0; e < depth; e++)
                for (int n = j; n < j + lanes; n++) *w++ = n < columns ? matrix[(size_t)n * depth + e] : 0;
        for (int e = 0; e < depth; e += lanes)
            for (int j = 0; j < columns; j++)
                for (int n = e; n < e + lanes; n++) *back++ = n < depth ? matrix[(size_t)j * depth + n] : 0;
    }
}

/* The inverse for gradients: from those of the packed matrices, each [DEPTH][COLUMNS], that of one term of the mix. */
static void unpack_term(const struct layer *l, int lanes, int term, const float *sums, float *apart, float *mix)
{
    int s = l->order, outs = l->out_channels, ins = l->in_channels;
    size_t pairs = (size_t)outs * ins;
    memset(apart, 0, sizeof(float) * s * pairs);
    for (int n = 0; n < l->products; n++) {
        const int *t = l->table + ENTRIES * n;
        if (t[TERM] != term || !t[FIRST]) continue;
        int d = t[SIZE], row = rounded(t[COLUMNS], lanes);
        for (int a = 0; a < d; a++)
            for (int b = 0; b < d; b++)
                for (int u = 0; u < s; u++) {
                    float factor = l->matrices[t[MATRICES] + (u * d + a) * d + b];
                    if (factor == 0) continue;
                    for (int i = 0; i < ins; i++) {
                        const float *from = sums + t[PACKED] + (size_t)(b * ins + i) * row + a * outs;
                        float *to = apart + u * pairs + (size_t)i * outs;
                        for (int o = 0; o < outs; o++) to[o] += factor * from[o];
                    }
                }
    }
    for (int o = 0; o < outs; o++)
        for (int i = 0; i < ins; i++) {
            float *to = mix + mix_at(l, term, o, i);
            for (int u = 0; u < s; u++) to[u] = apart[u * pairs + (size_t)i * outs + o];
        }
}

/* Room for the two above. */
static float *room_for_term(const struct layer *l)
{
    size_t pairs = (size_t)l->order * l->in_channels * l->out_channels;
    return malloc(sizeof(float) * pairs * (1 + l->order));
}

/* The parameters of a layer as the kernels read them: mix as above, spatial [C][R][k k], C that of the spatial kernels,
 * and bias [O]. Returns 0, or 1 if there is no memory. */
int gconv_pack(int variant, const struct layer *l, int threads, const float *mix, const float *spatial,
               const float *bias, float *packed)
{
    int lanes = variants[variant].lanes, kk = l->k * l->k, s = l->order, failed = 0;
    int each = spatial_channels(l) / s, row = rounded(spatial_channels(l), lanes), outs = l->out_channels;
    struct parts p = parts_of(l, lanes, packed);
#pragma omp parallel for num_threads(threads) if (l->weights > 1 << 16)
    for (int r = 0; r < l->rank; r++) {
        float *room = room_for_term(l);
        if (room) pack_term(l, &p, lanes, r, mix, room, room + (size_t)s * l->in_channels * outs);
        else {
#pragma omp atomic write
            failed = 1;
        }
        free(room);
    }
    for (int r = 0; r < l->rank; r++)
        for (int y = 0; y < kk; y++) {
            float *to = p.spatial + (size_t)(r * kk + y) * row;
            float *back = p.spatial_back + (size_t)(r * kk + kk - 1 - y) * row;
            for (int n = 0; n < s; n++)
                for (int c = 0; c < each; c++)
                    to[n * each + c] = back[n * each + c] = spatial[(c * l->rank + r) * kk + l->pixels[n * kk + y]];
            for (int c = s * each; c < row; c++) to[c] = back[c] = 0;
        }
    for (int n = 0; n < rounded(s * outs, lanes) && p.bias; n++) p.bias[n] = n < s * outs ? bias[n % outs] : 0;
    return failed;
}

/* The planes that forward or backward of over_pixels.h takes. */
static int planes_needed(const struct layer *l, int backward)
{
    int ci = l->order * l->in_channels, co = l->order * l->out_channels;
    int made = spatial_channels(l) * l->rank, most = made > ci ? made : ci;
    return ci + co + made + (backward ? most : 0) + 2 * SPARE;
}

/* How many rows a band of over_pixels.h has, of `height`: few enough for its planes to stay in the second cache, and alike. */
static int band_of(const struct layer *l, int height, int backward)
{
    int row = pitch_of(l), most = BAND / planes_needed(l, backward), bands;
    most = (most - plane_of(l, 0)) / row - l->k + 1;
    bands = most < 1 ? height : (height + most - 1) / most;
    return (height + bands - 1) / bands;
}

/* More than any function of over_channels.h or over_pixels.h takes from its scratch. */
static size_t scratch_bytes(const struct layer *l, int rows, int backward)
{
    if (rows) return sizeof(float) * floats(planes_needed(l, backward), plane_of(l, rows + l->k - 1));
    size_t row = padded(l->order * l->in_channels * l->rank) + padded(l->order * l->out_channels * l->rank);
    size_t wide = (l->width > l->out_width ? l->width : l->out_width) + 2 * (l->k + l->padding);
    size_t all = 2 * l->k + 8 + (backward ? l->height + 4 * batch_of(l) : 0);
    return (all * wide * row * sizeof(float) + 63) / 64 * 64;
}

/* What of that has to be zeros at first. */
static size_t borders_bytes(const struct layer *l, int rows, int backward)
{
    if (rows) return scratch_bytes(l, rows, backward);
    int around = l->width + 2 * l->padding, wide = backward ? l->width + l->k - 1 : around;
    int channels = spatial_channels(l), kept = l->spatial_first == backward ? channels * l->rank : channels;
    size_t image = backward && l->spatial_first ? floats(l->height * around, padded(channels)) : 0;
    return sizeof(float) * (floats(l->k * wide, padded(kept)) + image);
}

/* Room for a thread, or NULL. */
static float *scratch_for(const struct layer *l, int rows, int backward)
{
    float *scratch = aligned_alloc(64, scratch_bytes(l, rows, backward));
    if (scratch) memset(scratch, 0, borders_bytes(l, rows, backward));
    return scratch;
}

/* y [n][H'][W'][S O] from x [n][H][W][S I]; `residual`, if given, is added, and then comes a ReLU if asked. Returns 0, or
 * 1 if there is no memory. */
int gconv_forward(int variant, const struct layer *l, int n, int threads, const float *packed, const float *x,
                  const float *residual, int relu, float *y)
{
    int rows = variants[variant].sums > 1 ? band_of(l, l->out_height, 0) : 0, failed = 0;
    int bands = n < threads ? (threads + n - 1) / n : 1, needed = rows ? (l->out_height + rows - 1) / rows : 1;
    bands = bands < needed ? needed : bands;
    if (bands > l->out_height) bands = l->out_height;
    size_t in = floats(l->height * l->width, l->order * l->in_channels);
    size_t out = floats(l->out_height * l->out_width, l->order * l->out_channels);
    struct parts p = parts_of(l, variants[variant].lanes, packed);
    p.rows = rows = rows ? (l->out_height + bands - 1) / bands : 0;
#pragma omp parallel num_threads(threads)
    {
        float *scratch = scratch_for(l, rows, 0);
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static) /* the same images each time: they may be in this thread's cache */
        for (int task = 0; task < n * bands; task++) {
            int image = task / bands, band = task % bands;
            if (scratch)
                variants[variant].forward(l, &p, x + image * in, residual ? residual + image * out : NULL, relu,
                                          y + image * out, l->out_height * band / bands,
                                          l->out_height * (band + 1) / bands, scratch);
        }
        free(scratch);
    }
    return failed;
}

/* The gradients of the map and of the parameters, as pack gets them; those of spatial and of the bias only if not NULL.
 * Each thread adds up those of its images; which they are is fixed, so that sums are the same each time. Returns 0, or
 * 1 if there is no memory. */
int gconv_backward(int variant, const struct layer *l, int n, int threads, const float *packed, const float *x,
                   const float *gy, float *gx, float *mix, float *spatial, float *bias)
{
    int failed = 0, lanes = variants[variant].lanes, kk = l->k * l->k, s = l->order, outs = l->out_channels;
    int channels = spatial_channels(l), row = rounded(channels, lanes);
    size_t in = floats(l->height * l->width, s * l->in_channels), out = floats(l->out_height * l->out_width, s * outs);
    int apart = variants[variant].sums, rows = apart > 1 ? band_of(l, l->height, 1) : 0;
    size_t products = l->weights + spatial_floats(l, lanes), each = padded(products * apart + rounded(s * outs, lanes));
    struct parts p = parts_of(l, lanes, packed);
    p.rows = rows;
    float *sums = aligned_alloc(64, sizeof(float) * each * threads);
    if (!sums) return 1;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int t = 0; t < threads; t++) {
        float *scratch = scratch_for(l, rows, 1), *own = sums + t * each;
        memset(own, 0, sizeof(float) * each);
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
        for (int image = n * t / threads; scratch && image < n * (t + 1) / threads; image++)
            variants[variant].backward(l, &p, x + image * in, gy + image * out, gx + image * in, own,
                                       spatial ? own + (size_t)l->weights * apart : NULL,
                                       bias ? own + products * apart : NULL,
                                       scratch);
        free(scratch);
    }
    for (int t = 1; t < threads; t++)
        for (size_t i = 0; i < each; i++) sums[i] += sums[t * each + i];
    for (size_t i = 0; i < products && apart > 1; i++) {
        float sum = 0;
        for (int j = 0; j < apart; j++) sum += sums[i * apart + j];
        sums[i] = sum;
    }
#pragma omp parallel for num_threads(threads) if (l->weights > 1 << 16)
    for (int r = 0; r < l->rank; r++) {
        float *room = room_for_term(l);
        if (room) unpack_term(l, lanes, r, sums, room, mix);
        else {
#pragma omp atomic write
            failed = 1;
        }
        free(room);
    }
    if (spatial) {
        memset(spatial, 0, sizeof(float) * l->rank * kk * (channels / s));
        for (int r = 0; r < l->rank; r++)
            for (int n = 0; n < s; n++)
                for (int y = 0; y < kk; y++) {
                    int at = l->spatial_first ? y : kk - 1 - y; /* the gradients that gc finds are flipped */
                    const float *from = sums + l->weights + (size_t)(r * kk + at) * row + n * (channels / s);
                    for (int c = 0; c < channels / s; c++)
                        spatial[(c * l->rank + r) * kk + l->pixels[n * kk + y]] += from[c];
                }
    }
    for (int o = 0; o < outs && bias; o++) {
        bias[o] = 0;
        for (int n = 0; n < s; n++) bias[o] += sums[products * apart + n * outs + o];
    }
    free(sums);
    return failed;
}

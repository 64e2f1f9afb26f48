/* A layer as Python describes it, and what its kernels share for all instruction sets. */

#ifndef GCONV_LAYER_H
#define GCONV_LAYER_H

#include <stddef.h>

/* The number of the interface: it changes with the arguments of any exported function, with struct layer and with the
 * table of products. gconv/kernels/library.py has the same number. */
enum { INTERFACE = 4 };

/* The mix is a sum of matrix products. A row of `table` describes one of them by these entries: */
enum {
    READ,          /* the first value of a position that it reads, */
    DEPTH,         /* and how many it reads; */
    WRITTEN,       /* the first value that it writes, */
    COLUMNS,       /* and how many it writes; */
    ADDED,         /* whether it adds them to the values that are there; */
    ADDED_BACK,    /* whether the transposed product, of the gradients, does so; */
    PACKED,        /* where its matrix [COLUMNS][DEPTH] begins among the packed ones, */
    PACKED_BACK,   /* and where the transposed matrix begins; */
    TERM,          /* which of the R terms of the filter it belongs to; */
    SIZE,          /* d: the matrix consists of d d blocks [out_channels][in_channels], */
    MATRICES,      /* each a sum over u of the mix, times [S][d][d] at this place of `matrices`; */
    FIRST,         /* whether it is the first product with this matrix. */
    ENTRIES
};

struct layer {
    int order, in_channels, out_channels, rank, spatial_first;
    int k, stride, padding;
    int whole; /* whether this is a full filter: it has k k terms, each with a spatial kernel of one pixel, term r pixel r */
    int height, width, out_height, out_width;
    int products, in_basis, biased;
    int weights, weights_back; /* how many floats the packed matrices have */
    const int *table;
    const float *matrices, *basis; /* of the group: see SIZE and MATRICES; and [S][S] */
    const int *pixels; /* [S][k k]: entry y of the kernel transformed by s is this entry of the kernel */
};

enum { MOST_K = 15, MOST_ORDER = 8, SPARE = 16 };

/* The packed parameters, one after the other, and the basis. Versions that are vectorised over channels pad these to a
 * multiple of the length of a vector, `lanes`; for the others `lanes` is 1. */
struct parts {
    const float *weights;      /* each matrix [COLUMNS / lanes][DEPTH][lanes] */
    const float *weights_back; /* likewise the transposed matrices */
    const float *spatial;      /* [rank][k k][channels] */
    const float *spatial_back; /* the same kernels, flipped */
    const float *bias;         /* [S out_channels], or NULL */
    int rows;                  /* the most rows of a band, in over_pixels.h */
    float basis[MOST_ORDER * MOST_ORDER], basis_back[MOST_ORDER * MOST_ORDER]; /* [S][S] and its transpose */
};

/* Where and how the output is written: a bias [S O] and another map are added, if they are not NULL; then comes ReLU, if
 * asked. */
struct ending { const float *bias, *residual; int relu; float *y; };

static inline int larger(int a, int b) { return a > b ? a : b; }

static inline int smaller(int a, int b) { return a < b ? a : b; }

/* The length of a row that has room for a vector that begins at its last value. */
static inline int padded(int values) { return (values + SPARE - 1) / SPARE * SPARE + SPARE; }

static inline int rounded(int values, int lanes) { return (values + lanes - 1) / lanes * lanes; }

static inline size_t floats(int positions, int row) { return (size_t)positions * row; }

static inline int spatial_channels(const struct layer *l)
{
    return l->order * (l->spatial_first ? l->in_channels : l->out_channels);
}

/* How many floats the packed spatial kernels have. A full filter has none. */
static inline size_t spatial_floats(const struct layer *l, int lanes)
{
    return l->whole ? 0 : (size_t)l->rank * l->k * l->k * rounded(spatial_channels(l), lanes);
}

/* For over_pixels.h: how many values a row of a plane has; the values before its first row, among them the zeros above the
 * map; and all values of a plane of so many rows: an odd number of cache lines, because caches mistake addresses for each
 * other that are a large power of two apart. */
static inline int pitch_of(const struct layer *l) { return larger(l->width, l->out_width); }

static inline int margin_of(const struct layer *l)
{
    return rounded(larger(l->k - 1 - l->padding, l->padding) * (pitch_of(l) + 1), SPARE);
}

static inline int plane_floats(const struct layer *l, int rows)
{
    return (margin_of(l) + rounded(rows * pitch_of(l) + 8 + l->k, SPARE)) | SPARE;
}

/* For over_channels.h: how many rows have their matrix gradients computed together. One by one, short rows would read and
 * write the sums too often. */
static inline int batch_of(const struct layer *l)
{
    int width = l->spatial_first ? l->out_width : l->width;
    return width < 64 ? 64 / width : 1;
}

struct parts parts_of(const struct layer *l, int lanes, const float *packed);

/* The first row of the output that no row of the map before `first` contributes to. A backward pass over the rows `first`
 * to `last` - 1 of the map adds to the gradients of the parameters the rows of the output from own_rows(first) to
 * own_rows(last) - 1, so that several passes over parts of a map count each row once. */
static inline int own_rows(const struct layer *l, int first)
{
    if (first == 0) return 0;
    if (first == l->height) return l->out_height;
    return smaller((first + l->padding - 1) / l->stride + 1, l->out_height);
}

/* Brings values into the second-level cache that will soon be read or written. */
static inline void prefetch(const float *from, size_t size)
{
    for (size_t i = 0; i < size; i += 16) __builtin_prefetch(from + i, 0, 2);
}

/* From the gradients of the packed matrices, each [DEPTH][COLUMNS], the gradient of the mix. Returns 0, or 1 if there is
 * no memory. */
int unpack_mix(const struct layer *l, int lanes, int threads, const float *sums, float *mix);

/* Rows `first` to `last` - 1 of the output of one image. */
struct scratch;
typedef void forward_rows(const struct layer *, const struct parts *, const float *x, const float *residual, int relu,
                          float *y, int first, int last, struct scratch scratch);
/* Rows `first` to `last` - 1 of the gradient gx of one image. Their part of the gradients of the parameters is added to
 * gw and, if they are not NULL, to gd and gb. */
typedef void backward_rows(const struct layer *, const struct parts *, const float *x, const float *gy, float *gx,
                           float *gw, float *gd, float *gb, int first, int last, struct scratch scratch);

#endif

/* The kernels of separable_conv.c with a plane for each channel, for layers of few channels and stride one. A vector holds
 * eight neighbouring pixels of a channel, so no vector is partly empty because a block of a matrix has few channels, and
 * products in the irreducible representations cost no more than they should. Channels-last maps are transposed when they
 * are read and when they are written. An image is processed in bands of rows, whose planes stay in the second-level cache.
 *
 * Where the kernel reads beyond the sides of a map, vectors are masked. Above and below the map there are rows of zeros.
 * Those above are never written; those below are cleared where a band before has written them. */

#include "vectors.h"

/* The planes of a band, one every plane_floats() values; `at` is where row `top` of the first plane begins. */
struct NAME(planes) { float *at; int top; };

/* What filters read and write: from rows of `width` values, with `padding` at the sides, `rows` rows of `columns` values.
 * In both, a row begins `pitch` values after the one before; an entry of the kernel lies `next` values after the one
 * before. */
struct NAME(window) { int k, padding, pitch, next, width, columns, rows; };

/* Which of the eight values from number `at` on lie inside a row of `width` values, as bits. */
INLINE unsigned NAME(inside)(int at, int width)
{
    int before = at < 0 ? -at : 0, beyond = at + V > width ? at + V - width : 0;
    return before < V && beyond < V ? 255u << before & 255u >> beyond : 0;
}

INLINE TARGET vec NAME(load_some)(unsigned which, const float *from) { return (vec)LOAD_MASKED(which, from); }

/* Transposes eight vectors of eight values. */
INLINE TARGET void NAME(transpose)(vec *v)
{
    __m256 pairs[8], fours[8];
    UNROLLED for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
    }
    UNROLLED for (int i = 0; i < 8; i += 4)
        UNROLLED for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
        }
    UNROLLED for (int i = 0; i < 4; i++) {
        v[i] = (vec)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        v[i + 4] = (vec)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
}

/* Writes rows x [rows][width][c] of a channels-last map into planes, with zeros behind them, as far as a vector goes. */
TARGET static void NAME(enter)(const float *x, int c, int width, int rows, float *planes, int plane, int pitch)
{
    if (width == pitch) width *= rows, rows = 1;
    for (int j = 0; j < c; j += V)
        for (int i = 0; i < rows; i++)
            for (int q = 0; q < width; q += V) {
                const float *from = x + floats(i * width + q, c) + j;
                float *to = planes + floats(j, plane) + floats(i, pitch) + q;
                vec v[V];
                if (q + V <= width && j + V <= c) {
                    UNROLLED for (int n = 0; n < V; n++) v[n] = NAME(load)(from + n * c);
                    NAME(transpose)(v);
                    UNROLLED for (int n = 0; n < V; n++) NAME(store)(to + floats(n, plane), v[n]);
                    continue;
                }
                for (int n = 0; n < V; n++) v[n] = q + n < width ? NAME(load_part)(from + n * c, c - j) : (vec){0};
                NAME(transpose)(v);
                for (int n = 0; n < V && n < c - j; n++) NAME(store)(to + floats(n, plane), v[n]);
            }
}

/* Writes planes of at most eight of the c channels, from number `column` on, as such rows of the output. */
INLINE TARGET void NAME(leave)(const float *planes, int plane, int pitch, int column, int c, int width, int rows,
                               const struct ending *end)
{
    int some = c - column < V ? c - column : V;
    if (width == pitch) width *= rows, rows = 1;
    for (int i = 0; i < rows; i++)
        for (int q = 0; q < width; q += V) {
            const float *from = planes + floats(i, pitch) + q;
            float *to = end->y + floats(i * width + q, c) + column;
            vec v[V];
            if (some < V || q + V > width) {
                for (int n = 0; n < V; n++) v[n] = n < some ? NAME(load)(from + floats(n, plane)) : (vec){0};
                NAME(transpose)(v);
                for (int n = 0; n < V && q + n < width; n++)
                    NAME(finished)(to + floats(n, c), v[n], column, some, end);
                continue;
            }
            UNROLLED for (int n = 0; n < V; n++) v[n] = NAME(load)(from + floats(n, plane));
            NAME(transpose)(v);
            UNROLLED for (int n = 0; n < V; n++) NAME(finished)(to + floats(n, c), v[n], column, V, end);
        }
}

/* x[s][i][:values] = sum over t of change[s][t] x[t][i][:values] for all channels i, up to a whole number of vectors. */
INLINE TARGET void NAME(change_of)(const float *change, const int s, float *x, int plane, int channels, int values)
{
    size_t apart = floats(channels, plane);
    for (int i = 0; i < channels; i++, x += plane)
        for (int j = 0; j < values; j += V) {
            float *at = x + j;
            vec in[MOST_ORDER];
            UNROLLED for (int t = 0; t < s; t++) in[t] = NAME(load)(at + t * apart);
            UNROLLED for (int r = 0; r < s; r++) {
                vec sum = change[r * s] * in[0];
                UNROLLED for (int t = 1; t < s; t++) sum += change[r * s + t] * in[t];
                NAME(store)(at + r * apart, sum);
            }
        }
}

/* Changes `rank` times `channels` planes of each group element into the basis or back from it, in place. */
TARGET static void NAME(change)(const struct layer *l, const float *change, float *x, int plane, int channels, int rank,
                                int values)
{
    for (int r = 0; r < rank && l->in_basis; r++, x += floats(l->order * channels, plane))
        switch (l->order) {
#define CHANGE(S) case S: NAME(change_of)(change, S, x, plane, channels, values); break;
            CHANGE(1) CHANGE(2) CHANGE(3) CHANGE(4) CHANGE(5) CHANGE(6) CHANGE(7) CHANGE(8)
#undef CHANGE
        }
}

/* The matrix products of a mix; with `back` the transposed ones, as gradients are. */
TARGET static void NAME(mix)(const struct layer *l, const struct parts *p, int back, const float *x, float *y,
                             int plane, int values)
{
    for (int i = 0; i < l->products; i++) {
        const int *t = l->table + ENTRIES * i;
        int depth = back ? t[COLUMNS] : t[DEPTH], columns = back ? t[DEPTH] : t[COLUMNS];
        NAME(product)(back ? p->weights_back + t[PACKED_BACK] : p->weights + t[PACKED], depth, 1,
                      x + floats(t[back ? WRITTEN : READ], plane), plane, V, depth,
                      y + floats(t[back ? READ : WRITTEN], plane), plane, values, t[back ? ADDED_BACK : ADDED], 1, NULL,
                      columns);
    }
}

/* gw[i][j] += x[i] g[j], products of n values each; the sums of the lanes are kept apart. */
INLINE TARGET void NAME(products)(const float *x, const float *g, int plane, int n, float *gw, int ldw, const int rows,
                                  const int cols)
{
    vec sums[5][5];
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < cols; j++) sums[i][j] = NAME(load)(gw + floats(i * ldw + j, V));
    for (int t = 0; t < n; t += V) {
        vec values[5];
        UNROLLED for (int j = 0; j < cols; j++) values[j] = NAME(load_part)(g + floats(j, plane) + t, n - t);
        UNROLLED for (int i = 0; i < rows; i++) {
            vec value = NAME(load_part)(x + floats(i, plane) + t, n - t);
            UNROLLED for (int j = 0; j < cols; j++) sums[i][j] += value * values[j];
        }
    }
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < cols; j++) NAME(store)(gw + floats(i * ldw + j, V), sums[i][j]);
}

/* The gradient of a mix: that of each product, [DEPTH][COLUMNS][lanes]. */
TARGET static void NAME(mix_gradient)(const struct layer *l, const float *x, const float *g, int plane, float *gw,
                                      int values)
{
    for (int i = 0; i < l->products; i++) {
        const int *t = l->table + ENTRIES * i;
        int depth = t[DEPTH], columns = t[COLUMNS];
        for (int e = 0; e < depth; e += 5)
            for (int j = 0; j < columns; j += 5) {
                const float *from = x + floats(t[READ] + e, plane), *with = g + floats(t[WRITTEN] + j, plane);
                float *to = gw + floats(t[PACKED] + e * columns + j, V);
                int rows = depth - e < 5 ? depth - e : 5, cols = columns - j < 5 ? columns - j : 5;
#define COLS(R, C) case C: NAME(products)(from, with, plane, values, to, columns, R, C); break;
#define ROWS(R) case R: switch (cols) { COLS(R, 1) COLS(R, 2) COLS(R, 3) COLS(R, 4) COLS(R, 5) } break;
                switch (rows) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) }
#undef ROWS
#undef COLS
            }
    }
}

/* `filter` for kernels of size three: each row of the map is read once and added to three rows. */
INLINE TARGET void NAME(filter_three)(const struct NAME(window) *w, const float *x, const float *d, float *y,
                                      const int add)
{
    vec kernel[9], read[3];
    UNROLLED for (int n = 0; n < 9; n++) kernel[n] = d[n * w->next] - (vec){0};
    for (int q = 0; q < w->columns; q += V) {
        const float *from = x + q;
        float *to = y + q;
        unsigned masks[3], all = NAME(inside)(q, w->columns);
        UNROLLED for (int dx = 0; dx < 3; dx++) masks[dx] = NAME(inside)(q + dx - w->padding, w->width);
        vec upper = {0}, lower = {0}; /* of the next two rows */
        for (int i = -2; i < w->rows; i++, from += w->pitch) {
            vec sum = upper;
            upper = lower, lower = (vec){0};
            UNROLLED for (int dx = 0; dx < 3; dx++) {
                read[dx] = NAME(load_some)(masks[dx], from + dx);
                sum += kernel[6 + dx] * read[dx];
                upper += kernel[3 + dx] * read[dx];
                lower += kernel[dx] * read[dx];
            }
            if (i < 0) continue;
            if (add) sum += NAME(load_some)(all, to);
            STORE_MASKED(to, all, sum);
            to += w->pitch;
        }
    }
}

/* y[i][q] = or += sum over dy, dx of d[dy][dx] x[i + dy][q + dx] */
TARGET static void NAME(filter)(const struct NAME(window) *w, const float *x, const float *d, float *y, int add)
{
    if (w->k == 3) {
        if (add) NAME(filter_three)(w, x, d, y, 1);
        else NAME(filter_three)(w, x, d, y, 0);
        return;
    }
    for (int q = 0; q < w->columns; q += V)
        for (int i = 0; i < w->rows; i++) {
            float *to = y + floats(i, w->pitch) + q;
            unsigned all = NAME(inside)(q, w->columns);
            vec sum = add ? NAME(load_some)(all, to) : (vec){0};
            for (int dx = 0; dx < w->k; dx++) {
                const float *from = x + floats(i, w->pitch) + q + dx, *entry = d + dx * w->next;
                unsigned mask = NAME(inside)(q + dx - w->padding, w->width);
                for (int dy = 0; dy < w->k; dy++, from += w->pitch, entry += w->k * w->next)
                    sum += *entry * NAME(load_some)(mask, from);
            }
            STORE_MASKED(to, all, sum);
        }
}

/* The gradient of `high` times `wide` entries of a kernel, all nine or one; `first` is the place of the first entry in its
 * row. */
INLINE TARGET void NAME(taps)(const struct NAME(window) *w, const float *x, int first, const float *t, float *gd,
                              const int high, const int wide)
{
    int row = w->k * w->next;
    vec sums[3][3];
    UNROLLED for (int dy = 0; dy < high; dy++)
        UNROLLED for (int dx = 0; dx < wide; dx++) sums[dy][dx] = NAME(load)(gd + floats(dy * row + dx * w->next, V));
    for (int q = 0; q < w->columns; q += V) {
        const float *from = x + q, *with = t + q;
        unsigned masks[3], all = NAME(inside)(q, w->columns);
        UNROLLED for (int dx = 0; dx < wide; dx++) masks[dx] = NAME(inside)(q + first + dx - w->padding, w->width);
        vec values[3] = {{0}}; /* of a row, and of the rows above that the same row of the map meets */
        for (int i = 0; i < w->rows + high - 1; i++, from += w->pitch, with += w->pitch) {
            if (high == 3) values[2] = values[1], values[1] = values[0];
            values[0] = i < w->rows ? NAME(load_some)(all, with) : (vec){0};
            UNROLLED for (int dx = 0; dx < wide; dx++) {
                vec read = NAME(load_some)(masks[dx], from + dx);
                UNROLLED for (int dy = 0; dy < high; dy++) sums[dy][dx] += values[dy] * read;
            }
        }
    }
    UNROLLED for (int dy = 0; dy < high; dy++)
        UNROLLED for (int dx = 0; dx < wide; dx++) NAME(store)(gd + floats(dy * row + dx * w->next, V), sums[dy][dx]);
}

/* The gradient of a kernel: gd[dy][dx] += sum over i, q of t[i][q] x[i + dy][q + dx]; the sums of the lanes are kept apart. */
TARGET static void NAME(filter_gradient)(const struct NAME(window) *w, const float *x, const float *t, float *gd)
{
    if (w->k == 3) {
        NAME(taps)(w, x, 0, t, gd, 3, 3);
        return;
    }
    for (int dy = 0; dy < w->k; dy++)
        for (int dx = 0; dx < w->k; dx++)
            NAME(taps)(w, x + floats(dy, w->pitch) + dx, dx, t, gd + floats((dy * w->k + dx) * w->next, V), 1, 1);
}

INLINE TARGET struct NAME(planes) NAME(take_planes)(struct scratch *scratch, const struct layer *l, int channels, int plane,
                                                    int top)
{
    return (struct NAME(planes)){take_zeros(scratch, floats(channels, plane)) + margin_of(l), top};
}

/* Writes zeros below the map, where a band before may have written values: in planes that have the rows up to `to` - 1,
 * of a map of `height` rows, and that are read up to row `end` - 1. */
INLINE TARGET void NAME(clear_below)(const struct NAME(planes) *p, int channels, int plane, int pitch, int to, int height,
                                     int end)
{
    if (end <= height) return;
    for (int i = 0; i < channels; i++)
        memset(p->at + floats(i, plane) + floats(to - p->top, pitch), 0, sizeof(float) * floats(end - to, pitch));
}

/* Where the values of a plane begin that a filter reads for row `first` of its output. */
INLINE const float *NAME(reach)(const struct NAME(planes) *p, int channel, int plane, const struct NAME(window) *w,
                                int first)
{
    return p->at + floats(channel, plane) + (ptrdiff_t)(first - w->padding - p->top) * w->pitch - w->padding;
}

/* Rows `first` to `last` - 1 of the output, at most p->rows. */
TARGET static void NAME(forward_band)(const struct layer *l, const struct parts *p, const float *x, const float *residual,
                                      int relu, float *y, int first, int last, struct scratch scratch)
{
    int k = l->k, ci = l->order * l->in_channels, co = l->order * l->out_channels, rank = l->rank;
    int c = l->spatial_first ? ci : co, plane = plane_floats(l, p->rows + k - 1), pitch = pitch_of(l);
    int from = larger(first - l->padding, 0), below = last - l->padding + k - 1, to = smaller(below, l->height);
    int rows = last - first;
    int values = (l->spatial_first ? rows : to - from) * pitch;
    struct NAME(window) w = {k, l->padding, pitch, c, l->width, l->out_width, rows};
    struct NAME(planes) in = NAME(take_planes)(&scratch, l, ci, plane, from);
    struct NAME(planes) made = NAME(take_planes)(&scratch, l, c * rank, plane, from);
    struct NAME(planes) out = NAME(take_planes)(&scratch, l, rounded(co, V), plane, first);
    size_t at = floats(first * l->out_width, co);
    struct ending end = {p->bias, residual ? residual + at : NULL, relu, y + at};
    NAME(enter)(x + floats(from * l->width, ci), ci, l->width, to - from, in.at, plane, pitch);
    if (l->spatial_first) {
        NAME(clear_below)(&in, ci, plane, pitch, to, l->height, below);
        for (int i = 0; i < ci; i++)
            for (int r = 0; r < rank; r++)
                NAME(filter)(&w, NAME(reach)(&in, i, plane, &w, first), p->spatial + r * k * k * c + i,
                             made.at + floats(r * ci + i, plane), 0);
        NAME(change)(l, p->basis_back, made.at, plane, l->in_channels, rank, values);
        NAME(mix)(l, p, 0, made.at, out.at, plane, values);
        NAME(change)(l, p->basis, out.at, plane, l->out_channels, 1, values);
        for (int j = 0; j < co; j += V)
            NAME(leave)(out.at + floats(j, plane), plane, pitch, j, co, l->out_width, rows, &end);
        return;
    }
    NAME(change)(l, p->basis_back, in.at, plane, l->in_channels, 1, values);
    NAME(mix)(l, p, 0, in.at, made.at, plane, values);
    NAME(change)(l, p->basis, made.at, plane, l->out_channels, rank, values);
    NAME(clear_below)(&made, c * rank, plane, pitch, to, l->height, below);
    for (int j = 0; j < co; j += V) {
        for (int i = j; i < co && i < j + V; i++)
            for (int r = 0; r < rank; r++)
                NAME(filter)(&w, NAME(reach)(&made, r * co + i, plane, &w, first), p->spatial + r * k * k * c + i,
                             out.at + floats(i - j, plane), r > 0);
        NAME(leave)(out.at, plane, pitch, j, co, l->out_width, rows, &end);
    }
}

TARGET static void NAME(forward)(const struct layer *l, const struct parts *p, const float *x, const float *residual,
                                 int relu, float *y, int first, int last, struct scratch scratch)
{
    int all = last - first, bands = (all + p->rows - 1) / p->rows;
    for (int i = 0; i < bands; i++)
        NAME(forward_band)(l, p, x, residual, relu, y, first + all * i / bands, first + all * (i + 1) / bands, scratch);
}

/* A band of a backward pass: the rows `first` to `last` - 1 of the map, and the rows `from` to `to` - 1 of the output that
 * they meet, which with the zeros below the output would end at `below`; the window by which the gradients of the output
 * come back to the map; where the gradients of the map go; and planes of the gradients of the output. */
struct NAME(band) {
    int first, last, from, to, below, plane, pitch;
    struct NAME(window) back;
    struct ending end;
    struct NAME(planes) g;
    struct scratch scratch;
};

/* A band of `gc`: mix, then filters. The gradient of the filters is found flipped. */
TARGET static void NAME(backward_gc)(const struct layer *l, const struct parts *p, const float *x, struct NAME(band) *b,
                                     float *gw, float *gd)
{
    int kk = l->k * l->k, ci = l->order * l->in_channels, co = l->order * l->out_channels, rank = l->rank;
    int rows = b->last - b->first, plane = b->plane, values = rows * b->pitch, longer = ci > co * rank ? ci : co * rank;
    struct NAME(window) back = b->back;
    struct NAME(planes) in = NAME(take_planes)(&b->scratch, l, ci, plane, b->first);
    struct NAME(planes) made = NAME(take_planes)(&b->scratch, l, longer, plane, b->first);
    struct NAME(planes) gradient = NAME(take_planes)(&b->scratch, l, co * rank, plane, b->first);
    NAME(clear_below)(&b->g, co, plane, b->pitch, b->to, l->out_height, b->below);
    NAME(enter)(x + floats(b->first * l->width, ci), ci, l->width, rows, in.at, plane, b->pitch);
    NAME(change)(l, p->basis_back, in.at, plane, l->in_channels, 1, values);
    NAME(mix)(l, p, 0, in.at, made.at, plane, values);
    NAME(change)(l, p->basis, made.at, plane, l->out_channels, rank, values);
    for (int i = 0; i < co; i++) {
        const float *read = NAME(reach)(&b->g, i, plane, &back, b->first);
        for (int r = 0; r < rank; r++) {
            size_t at = floats(r * co + i, plane), kernel = (size_t)r * kk * co + i;
            NAME(filter)(&back, read, p->spatial_back + kernel, gradient.at + at, 0);
            if (gd) NAME(filter_gradient)(&back, read, made.at + at, gd + kernel * V);
        }
    }
    NAME(change)(l, p->basis_back, gradient.at, plane, l->out_channels, rank, values);
    NAME(mix_gradient)(l, in.at, gradient.at, plane, gw, values);
    NAME(mix)(l, p, 1, gradient.at, made.at, plane, values);
    NAME(change)(l, p->basis, made.at, plane, l->in_channels, 1, values);
    for (int j = 0; j < ci; j += V)
        NAME(leave)(made.at + floats(j, plane), plane, b->pitch, j, ci, l->width, rows, &b->end);
}

/* A band of `gc_in`: filters, then mix. The rows of the output from `done` on are added to the gradients of the parameters;
 * those before have been added with another band. */
TARGET static void NAME(backward_gc_in)(const struct layer *l, const struct parts *p, const float *x,
                                        struct NAME(band) *b, int done, float *gw, float *gd)
{
    int k = l->k, kk = k * k, ci = l->order * l->in_channels, rank = l->rank, rows = b->to - done;
    int plane = b->plane, pitch = b->pitch, values = (b->to - b->from) * pitch;
    int above = larger(done - l->padding, 0), end = b->to - l->padding + k - 1, below = smaller(end, l->height);
    struct NAME(window) back = b->back, w = {k, l->padding, pitch, ci, l->width, l->out_width, rows};
    struct NAME(planes) in = NAME(take_planes)(&b->scratch, l, ci, plane, above);
    struct NAME(planes) made = NAME(take_planes)(&b->scratch, l, rounded(ci * rank, V), plane, done);
    struct NAME(planes) gradient = NAME(take_planes)(&b->scratch, l, ci * rank, plane, b->from);
    NAME(change)(l, p->basis_back, b->g.at, plane, l->out_channels, 1, values);
    NAME(mix)(l, p, 1, b->g.at, gradient.at, plane, values);
    NAME(change)(l, p->basis, gradient.at, plane, l->in_channels, rank, values);
    if (rows > 0) {
        size_t later = floats(done - b->from, pitch);
        NAME(enter)(x + floats(above * l->width, ci), ci, l->width, below - above, in.at, plane, pitch);
        NAME(clear_below)(&in, ci, plane, pitch, below, l->height, end);
        for (int i = 0; i < ci; i++) {
            const float *read = NAME(reach)(&in, i, plane, &w, done);
            for (int r = 0; r < rank; r++) {
                size_t at = floats(r * ci + i, plane), kernel = (size_t)r * kk * ci + i;
                NAME(filter)(&w, read, p->spatial + kernel, made.at + at, 0);
                if (gd) NAME(filter_gradient)(&w, read, gradient.at + at + later, gd + kernel * V);
            }
        }
        NAME(change)(l, p->basis_back, made.at, plane, l->in_channels, rank, rows * pitch);
        NAME(mix_gradient)(l, made.at, b->g.at + later, plane, gw, rows * pitch);
    }
    NAME(clear_below)(&gradient, ci * rank, plane, pitch, b->to, l->out_height, b->below);
    for (int j = 0; j < ci; j += V) {
        for (int i = j; i < ci && i < j + V; i++)
            for (int r = 0; r < rank; r++)
                NAME(filter)(&back, NAME(reach)(&gradient, r * ci + i, plane, &back, b->first),
                             p->spatial_back + (size_t)r * kk * ci + i, made.at + floats(i - j, plane), r > 0);
        NAME(leave)(made.at, plane, pitch, j, ci, l->width, b->last - b->first, &b->end);
    }
}

/* The adjoint of the spatial kernels is a convolution of the gradients with the flipped kernels, with k - 1 - padding
 * zeros around. Of each value of gw and gd there are eight sums. */
TARGET static void NAME(backward)(const struct layer *l, const struct parts *p, const float *x, const float *gy,
                                  float *gx, float *gw, float *gd, float *gb, int first, int last, struct scratch scratch)
{
    int k = l->k, ci = l->order * l->in_channels, co = l->order * l->out_channels;
    int border = k - 1 - l->padding, pitch = pitch_of(l), plane = plane_floats(l, p->rows + k - 1);
    int bands = (last - first + p->rows - 1) / p->rows, done = own_rows(l, first), all = last - first;
    if (gb) NAME(add_up)(gy + floats(done * l->out_width, co), co, (own_rows(l, last) - done) * l->out_width, gb);
    for (int i = 0; i < bands; i++) {
        struct NAME(band) b = {.first = first + all * i / bands, .last = first + all * (i + 1) / bands};
        b.from = larger(b.first - border, 0), b.below = b.last - border + k - 1, b.to = smaller(b.below, l->out_height);
        b.plane = plane, b.pitch = pitch, b.scratch = scratch;
        b.back = (struct NAME(window)){k, border, pitch, l->spatial_first ? ci : co, l->out_width, l->width,
                                       b.last - b.first};
        b.end = (struct ending){.y = gx + floats(b.first * l->width, ci)};
        b.g = NAME(take_planes)(&b.scratch, l, co, plane, b.from);
        NAME(enter)(gy + floats(b.from * l->out_width, co), co, l->out_width, b.to - b.from, b.g.at, plane, pitch);
        if (l->spatial_first) NAME(backward_gc_in)(l, p, x, &b, done, gw, gd);
        else NAME(backward_gc)(l, p, x, &b, gw, gd);
        done = larger(b.to, done);
    }
}

#include "undefine.h"

/* The kernels of separable_conv.c with a plane for each channel, for layers of few channels and stride one. Vectors hold
 * eight neighbouring positions, so none is part empty because a block of a matrix has few channels: products in the
 * irreducible representations cost what they should. Channels-last maps are transposed as they are read and as they are
 * written. An image is done in bands of rows, whose planes stay in the second cache.
 *
 * Where the kernel reads beyond the sides of a map, vectors are masked. Above and below there are rows of zeros; they,
 * and what a row has more than the map, are zeros at first and stay so. */

#include "vectors.h"

/* The planes of a band, one every plane_of() values: `at` is where row `top` of the first begins. */
struct NAME(planes) { float *at; int top; };

/* What filters read and give: `rows` rows of `columns` values from rows of `width`, with `padding` at the side; in both
 * a row is `pitch` values from the one before, as an entry of the kernel is `next` values from the one before. */
struct NAME(window) { int k, padding, pitch, next, width, columns, rows; };

/* Which of eight values from the one with the number `at` on there are in a row of `width`, as bits. */
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

/* Rows x [rows][width][c] of a channels-last map into planes. Behind them are zeros then, as far as a vector goes. */
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

/* Planes of the channels from `column` on, at most eight, of c, as such rows of the output. */
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

/* x[s][i][:values] = sum over t of change[s][t] x[t][i][:values] for all channels i, and of what a vector has more. */
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

/* `rank` times `channels` planes of each element of the group, into the basis or out of it, where they are. */
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

/* The matrix products of a mix; `back` as gradients are. */
TARGET static void NAME(mix)(const struct layer *l, const struct parts *p, int back, const float *x, float *y,
                             int plane, int values)
{
    for (int i = 0; i < l->products; i++) {
        const int *t = l->table + ENTRIES * i;
        int depth = back ? t[COLUMNS] : t[DEPTH], columns = back ? t[DEPTH] : t[COLUMNS];
        NAME(product)(back ? p->weights_back + t[PACKED_BACK] : p->weights + t[PACKED], depth, 1,
                      x + floats(t[back ? WRITTEN : READ], plane), plane, V, depth,
                      y + floats(t[back ? READ : WRITTEN], plane), plane, values, t[back ? ADDED_BACK : ADDED], NULL,
                      columns);
    }
}

/* gw[i][j] += x[i] g[j], products of n values each, apart in the lanes. */
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

/* filter() of size three: what a row of the map adds to three rows is added as it is read. */
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

/* The gradient of `high` times `wide` entries of a kernel, the first of them with the number `first` in its row: of all
 * nine, or of one. */
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
        vec values[3] = {{0}}; /* of a row and those above, which the row of the map meets too */
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

/* The gradient of a kernel: gd[dy][dx] += sum over i, q of t[i][q] x[i + dy][q + dx], apart in the lanes. */
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

INLINE TARGET struct NAME(planes) NAME(take_planes)(float **scratch, const struct layer *l, int channels, int plane,
                                                    int top)
{
    return (struct NAME(planes)){NAME(take)(scratch, floats(channels, plane)) + margin_of(l), top};
}

/* Zeros in place of rows below the map, which the band before may have had: those after the first `rows` of `most`. */
INLINE TARGET void NAME(clear_below)(const struct NAME(planes) *p, int channels, int plane, int pitch, int rows,
                                     int most)
{
    for (int i = 0; i < channels; i++)
        memset(p->at + floats(i, plane) + floats(rows, pitch), 0, sizeof(float) * floats(most - rows, pitch));
}

/* Where, for row `first` of what a filter gives, that begins which it reads of a plane. */
INLINE const float *NAME(reach)(const struct NAME(planes) *p, int channel, int plane, const struct NAME(window) *w,
                                int first)
{
    return p->at + floats(channel, plane) + (ptrdiff_t)(first - w->padding - p->top) * w->pitch - w->padding;
}

/* Output rows `first` to `last` - 1 of one image. The scratch is zeros at first. */
TARGET static void NAME(forward)(const struct layer *l, const struct parts *p, const float *x, const float *residual,
                                 int relu, float *y, int first, int last, float *scratch)
{
    int k = l->k, ci = l->order * l->in_channels, co = l->order * l->out_channels, rank = l->rank;
    int c = l->spatial_first ? ci : co, most = p->rows + k - 1, plane = plane_of(l, most), pitch = pitch_of(l);
    int from = first - l->padding, to = last - l->padding + k - 1, rows = last - first;
    from = from < 0 ? 0 : from, to = to > l->height ? l->height : to;
    int values = (l->spatial_first ? rows : to - from) * pitch;
    struct NAME(window) w = {k, l->padding, pitch, c, l->width, l->out_width, rows};
    struct NAME(planes) in = NAME(take_planes)(&scratch, l, ci, plane, from);
    struct NAME(planes) made = NAME(take_planes)(&scratch, l, c * rank, plane, from);
    struct NAME(planes) out = NAME(take_planes)(&scratch, l, rounded(co, V), plane, first);
    size_t at = floats(first * l->out_width, co);
    struct ending end = {p->bias, residual ? residual + at : NULL, relu, y + at};
    NAME(enter)(x + floats(from * l->width, ci), ci, l->width, to - from, in.at, plane, pitch);
    if (l->spatial_first) {
        if (first > 0) NAME(clear_below)(&in, ci, plane, pitch, to - from, most);
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
    if (first > 0) NAME(clear_below)(&made, c * rank, plane, pitch, to - from, most);
    for (int j = 0; j < co; j += V) {
        for (int i = j; i < co && i < j + V; i++)
            for (int r = 0; r < rank; r++)
                NAME(filter)(&w, NAME(reach)(&made, r * co + i, plane, &w, first), p->spatial + r * k * k * c + i,
                             out.at + floats(i - j, plane), r > 0);
        NAME(leave)(out.at, plane, pitch, j, co, l->out_width, rows, &end);
    }
}

/* Of a backward pass the rows `first` to `last` - 1 of the map, and those of the output that they meet, `from` to
 * `to` - 1; the window that gives what of the gradients of the output comes back to them; where their gradients go; and
 * planes of the gradients of the output. */
struct NAME(band) {
    int first, last, from, to, plane, pitch, most;
    struct NAME(window) back;
    struct ending end;
    struct NAME(planes) g;
    float *scratch;
};

/* Of `gc`: mix, then filters. The gradient of these is found flipped. */
TARGET static void NAME(backward_gc)(const struct layer *l, const struct parts *p, const float *x, struct NAME(band) *b,
                                     float *gw, float *gd)
{
    int kk = l->k * l->k, ci = l->order * l->in_channels, co = l->order * l->out_channels, rank = l->rank;
    int rows = b->last - b->first, plane = b->plane, values = rows * b->pitch, longer = ci > co * rank ? ci : co * rank;
    struct NAME(window) back = b->back;
    struct NAME(planes) in = NAME(take_planes)(&b->scratch, l, ci, plane, b->first);
    struct NAME(planes) made = NAME(take_planes)(&b->scratch, l, longer, plane, b->first);
    struct NAME(planes) gradient = NAME(take_planes)(&b->scratch, l, co * rank, plane, b->first);
    if (b->first > 0) NAME(clear_below)(&b->g, co, plane, b->pitch, b->to - b->from, b->most);
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

/* Of `gc_in`: filters, then mix. To the gradients of the parameters add the rows of the output from `done` on, as those
 * before have been in another band. */
TARGET static void NAME(backward_gc_in)(const struct layer *l, const struct parts *p, const float *x,
                                        struct NAME(band) *b, int done, float *gw, float *gd)
{
    int k = l->k, kk = k * k, ci = l->order * l->in_channels, rank = l->rank, rows = b->to - done;
    int plane = b->plane, pitch = b->pitch, values = (b->to - b->from) * pitch;
    int above = done - l->padding, below = b->to - l->padding + k - 1;
    above = above < 0 ? 0 : above, below = below > l->height ? l->height : below;
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
        if (b->first > 0) NAME(clear_below)(&in, ci, plane, pitch, below - above, b->most);
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
    if (b->first > 0) NAME(clear_below)(&gradient, ci * rank, plane, pitch, b->to - b->from, b->most);
    for (int j = 0; j < ci; j += V) {
        for (int i = j; i < ci && i < j + V; i++)
            for (int r = 0; r < rank; r++)
                NAME(filter)(&back, NAME(reach)(&gradient, r * ci + i, plane, &back, b->first),
                             p->spatial_back + (size_t)r * kk * ci + i, made.at + floats(i - j, plane), r > 0);
        NAME(leave)(made.at, plane, pitch, j, ci, l->width, b->last - b->first, &b->end);
    }
}

/* One image: gx, and added to gw and, if they are not NULL, gd and gb. The adjoint of the spatial kernels is a convolution of the
 * gradients, with the kernels flipped and k - 1 - padding around. Of gw and gd there are eight sums each. */
TARGET static void NAME(backward)(const struct layer *l, const struct parts *p, const float *x, const float *gy,
                                  float *gx, float *gw, float *gd, float *gb, float *scratch)
{
    int k = l->k, ci = l->order * l->in_channels, co = l->order * l->out_channels;
    int border = k - 1 - l->padding, pitch = pitch_of(l), most = p->rows + k - 1, plane = plane_of(l, most), done = 0;
    if (gb) NAME(add_up)(gy, co, l->out_height * l->out_width, gb);
    for (int first = 0, last; first < l->height; first = last) {
        last = first + p->rows < l->height ? first + p->rows : l->height;
        int from = first - border, to = last - border + k - 1;
        from = from < 0 ? 0 : from, to = to > l->out_height ? l->out_height : to;
        struct NAME(band) b = {.first = first, .last = last, .from = from, .to = to, .plane = plane, .pitch = pitch};
        b.most = most, b.scratch = scratch;
        b.back = (struct NAME(window)){k, border, pitch, l->spatial_first ? ci : co, l->out_width, l->width, last - first};
        b.end = (struct ending){.y = gx + floats(first * l->width, ci)};
        b.g = NAME(take_planes)(&b.scratch, l, co, plane, from);
        NAME(enter)(gy + floats(from * l->out_width, co), co, l->out_width, to - from, b.g.at, plane, pitch);
        if (l->spatial_first) NAME(backward_gc_in)(l, p, x, &b, done, gw, gd);
        else NAME(backward_gc)(l, p, x, &b, gw, gd);
        done = to > done ? to : done;
    }
}

#include "undefine.h"

/* The kernels of separable_conv.c row by row, with vectors of neighbouring channels, for layers of any size. Between the
 * mix and the spatial kernels only a few rows are kept. */

/* The blocks of a position are written in ascending order, so the last vector of a block, which may be partly empty, can
 * be written as a whole: what it overwrites is written later, or is the room behind a row (`padded`). Only the output
 * has no such room. */
#include "vectors.h"

/* y[p][s][:c] = sum over t of change[s][t] x[t][p][:c], where the positions of x[t] lie step[t] values apart. With `tight`
 * there is no room behind the last value of the last x[t], and the others lie before it. */
INLINE TARGET void NAME(change_of)(const float *change, const int s, const float *const *x, const size_t *step,
                                   const int tight, float *y, int ldy, int c, int positions)
{
    for (int p = 0; p < positions; p++)
        for (int j = (c - 1) / V * V; j >= 0; j -= V) {
            vec in[MOST_ORDER] = {{0}};
            UNROLLED for (int t = 0; t < s; t++) {
                const float *from = x[t] + p * step[t] + j;
                in[t] = tight ? NAME(load_part)(from, (s - t) * c - j) : NAME(load)(from);
            }
            UNROLLED for (int r = 0; r < s; r++) {
                vec sum = change[r * s] * in[0];
                UNROLLED for (int t = 1; t < s; t++) sum += change[r * s + t] * in[t];
                NAME(store)(y + floats(p, ldy) + r * c + j, sum);
            }
        }
}

TARGET static void NAME(change_any)(const float *change, int s, const float *const *x, const size_t *step, int tight,
                                    float *y, int ldy, int c, int positions)
{
    if (s == 8 && tight) NAME(change_of)(change, 8, x, step, 1, y, ldy, c, positions);
    else if (s == 8) NAME(change_of)(change, 8, x, step, 0, y, ldy, c, positions);
    else if (s == 4 && tight) NAME(change_of)(change, 4, x, step, 1, y, ldy, c, positions);
    else if (s == 4) NAME(change_of)(change, 4, x, step, 0, y, ldy, c, positions);
    else NAME(change_of)(change, s, x, step, tight, y, ldy, c, positions);
}

/* The same for `rank` times the S blocks of a map, whose positions lie ldx values apart. */
TARGET static void NAME(change)(const float *change, int s, const float *x, int ldx, int tight, float *y, int ldy, int c,
                                int rank, int positions)
{
    for (int r = 0; r < rank; r++, x += s * c, y += s * c) {
        const float *from[MOST_ORDER];
        size_t step[MOST_ORDER];
        for (int t = 0; t < s; t++) from[t] = x + t * c, step[t] = ldx;
        NAME(change_any)(change, s, from, step, tight, y, ldy, c, positions);
    }
}

/* Where a full filter reads the map of element t for term r, when it stands at output x = 0: `rows` are those of the map
 * that it meets, NULL beyond its ends, with positions `ld` apart. */
struct NAME(reader) { int place[MOST_ORDER][MOST_K * MOST_K]; };

INLINE void NAME(prepare)(const struct layer *l, struct NAME(reader) *reader)
{
    int kk = l->k * l->k;
    for (int t = 0; t < l->order; t++)
        for (int y = 0; y < kk; y++) reader->place[t][l->pixels[t * kk + y]] = y;
}

/* The values that a full filter reads for one row of outputs, in the basis: y[p][r][s][:c] */
TARGET static void NAME(enter_pixels)(const struct layer *l, const float *change, const struct NAME(reader) *reader,
                                      const float *const *rows, int ld, const float *zeros, float *y, int ldy)
{
    int s = l->order, c = l->in_channels;
    for (int r = 0; r < l->rank; r++) {
        const float *from[MOST_ORDER];
        size_t step[MOST_ORDER];
        for (int t = 0; t < s; t++) {
            int at = reader->place[t][r];
            const float *row = rows[at / l->k];
            from[t] = row ? row + floats(at % l->k, ld) + t * c : zeros;
            step[t] = row ? (size_t)l->stride * ld : 0;
        }
        NAME(change_any)(change, s, from, step, 0, y + r * s * c, ldy, c, l->out_width);
    }
}

/* The adjoint: one row of the gradient of the map, each value the sum of those of the gradients that it met. `rows` are
 * those of the gradients [r][s][c], with zeros between them for strides. */
TARGET static void NAME(leave_pixels)(const struct layer *l, const struct NAME(reader) *reader, const float *const *rows,
                                      int ld, const struct ending *end)
{
    int s = l->order, c = l->in_channels, kk = l->k * l->k;
    for (int t = 0; t < s; t++) {
        const float *from[MOST_K * MOST_K];
        int some = 0;
        for (int r = 0; r < kk; r++) {
            int at = kk - 1 - reader->place[t][r];
            const float *row = rows[at / l->k];
            if (row) from[some++] = row + floats(at % l->k, ld) + (r * s + t) * c;
        }
        for (int p = 0; p < l->width; p++)
            for (int j = 0; j < c; j += V) {
                vec sum = {0};
                for (int i = 0; i < some; i++) sum += NAME(load)(from[i] + floats(p, ld) + j);
                NAME(finished)(end->y + floats(p, s * c) + t * c + j, sum, t * c + j, c - j, end);
            }
    }
}

/* The rows of a map that a kernel meets, without those beyond the map, and for each its row of the kernel. */
struct NAME(meeting) { int some; const float *rows[MOST_K], *entries[MOST_K]; };

INLINE struct NAME(meeting) NAME(meet)(const float *const *rows, const float *d, int k, int c)
{
    struct NAME(meeting) met = {0};
    for (int dy = 0; dy < k; dy++)
        if (rows[dy]) {
            met.rows[met.some] = rows[dy];
            met.entries[met.some++] = d + floats(dy * k, ROUNDED(c));
        }
    return met;
}

/* Stores one output of `depthwise`, as described there. */
INLINE TARGET void NAME(place)(vec value, float *y, int ldy, int x, int j, int c, int add, const struct ending *end)
{
    float *to = y + floats(x, ldy) + j;
    if (add) value += NAME(load)(to);
    if (end) NAME(finished)(end->y + floats(x, c) + j, value, j, c - j, end);
    else NAME(store)(to, value);
}

/* `depthwise` for a kernel of any size. */
TARGET static void NAME(depthwise_any)(const struct NAME(meeting) *met, int ld, int stride, int k, int c, float *y,
                                    int ldy, int width, int add, const struct ending *end)
{
    for (int j = 0; j < c; j += V)
        for (int x = 0; x < width; x++) {
            vec sum = {0};
            for (int dy = 0; dy < met->some; dy++)
                for (int dx = 0; dx < k; dx++)
                    sum += NAME(load)(met->entries[dy] + dx * ROUNDED(c) + j)
                           * NAME(load)(met->rows[dy] + floats(x * stride + dx, ld) + j);
            NAME(place)(sum, y, ldy, x, j, c, add, end);
        }
}

/* `depthwise` for a kernel of size three, `some` rows of which meet the map, and stride one: neighbours share reads. */
INLINE TARGET void NAME(depthwise_three)(const struct NAME(meeting) *met, int ld, const int some, int c, float *y, int ldy,
                                      int width, int add, const struct ending *end)
{
    for (int j = 0; j < c; j += V) {
        vec w[3][3];
        for (int dy = 0; dy < some; dy++)
            for (int dx = 0; dx < 3; dx++) w[dy][dx] = NAME(load)(met->entries[dy] + dx * ROUNDED(c) + j);
        int x = 0;
#define NEIGHBOURS(N)                                                                                                  \
    for (; x + N <= width; x += N) {                                                                                   \
        vec sums[N] = {0};                                                                                             \
        for (int dy = 0; dy < some; dy++) {                                                                            \
            vec read[N + 2];                                                                                           \
            for (int i = 0; i < N + 2; i++) read[i] = NAME(load)(met->rows[dy] + floats(x + i, ld) + j);               \
            for (int dx = 0; dx < 3; dx++)                                                                             \
                for (int i = 0; i < N; i++) sums[i] += w[dy][dx] * read[i + dx];                                       \
        }                                                                                                              \
        for (int i = 0; i < N; i++) NAME(place)(sums[i], y, ldy, x + i, j, c, add, end);                               \
    }
        NEIGHBOURS(4)
        NEIGHBOURS(1)
#undef NEIGHBOURS
    }
}

/* One row of a depthwise convolution of c channels: y[x][:c] = or += sum over dy, dx of d[dy][dx] rows[dy][x + dx].
 * rows[dy] includes its borders, or is NULL if it is all zero. Writes whole vectors, up to ROUNDED(c); or, if `end` is
 * given, the finished output there. */
TARGET static void NAME(depthwise)(const float *const *rows, int ld, int stride, const float *d, int k, int c, float *y,
                                int ldy, int width, int add, const struct ending *end)
{
    struct NAME(meeting) met = NAME(meet)(rows, d, k, c);
    if (k == 3 && stride == 1 && met.some == 3) NAME(depthwise_three)(&met, ld, 3, c, y, ldy, width, add, end);
    else if (k == 3 && stride == 1 && met.some == 2) NAME(depthwise_three)(&met, ld, 2, c, y, ldy, width, add, end);
    else NAME(depthwise_any)(&met, ld, stride, k, c, y, ldy, width, add, end);
}

/* Part of the gradient of a kernel: `some` of its rows, for which the rows of the map and of the gradient are given, and
 * `taps` entries of each. Four neighbours at a time share reads. */
INLINE TARGET void NAME(taps)(const float *const *rows, float *const *gd, int ld, int stride, const float *t, int ldt,
                              int next, int width, const int some, const int taps)
{
    vec sums[3][3];
    for (int dy = 0; dy < some; dy++)
        for (int dx = 0; dx < taps; dx++) sums[dy][dx] = NAME(load)(gd[dy] + dx * next);
    int x = 0;
    for (; x + 4 <= width && stride == 1; x += 4) {
        vec values[4];
        for (int i = 0; i < 4; i++) values[i] = NAME(load)(t + floats(x + i, ldt));
        for (int dy = 0; dy < some; dy++) {
            vec read[6];
            for (int i = 0; i < taps + 3; i++) read[i] = NAME(load)(rows[dy] + floats(x + i, ld));
            for (int i = 0; i < 4; i++)
                for (int dx = 0; dx < taps; dx++) sums[dy][dx] += values[i] * read[i + dx];
        }
    }
    for (; x < width; x++) {
        vec value = NAME(load)(t + floats(x, ldt));
        for (int dy = 0; dy < some; dy++)
            for (int dx = 0; dx < taps; dx++)
                sums[dy][dx] += value * NAME(load)(rows[dy] + floats(x * stride + dx, ld));
    }
    for (int dy = 0; dy < some; dy++)
        for (int dx = 0; dx < taps; dx++) NAME(store)(gd[dy] + dx * next, sums[dy][dx]);
}

/* The gradient of the kernel: gd[dy][dx][:c] += sum over x of t[x][:c] rows[dy][x + dx][:c] */
TARGET static void NAME(depthwise_gradient)(const float *const *rows, int ld, int stride, const float *t, int ldt, int k,
                                         int c, float *gd, int width)
{
    struct NAME(meeting) met = NAME(meet)(rows, gd, k, c);
    int next = ROUNDED(c), some;
    for (int dy = 0; dy < met.some; dy += some) {
        some = met.some - dy < 3 ? met.some - dy : 3;
        for (int j = 0; j < c; j += V) {
            const float *from[3];
            float *to[3];
            for (int i = 0; i < some; i++) from[i] = met.rows[dy + i] + j, to[i] = (float *)met.entries[dy + i] + j;
            int dx = 0;
#define TAPS(SOME, N)                                                                                                  \
    if (some == SOME)                                                                                                  \
        for (; dx + N <= k; dx += N) {                                                                                 \
            NAME(taps)(from, to, ld, stride, t + j, ldt, next, width, SOME, N);                                        \
            for (int i = 0; i < SOME; i++) from[i] += (size_t)N * ld, to[i] += N * next;                               \
        }
            TAPS(3, 3)
            TAPS(2, 3)
            TAPS(1, 3)
            TAPS(3, 1)
            TAPS(2, 1)
            TAPS(1, 1)
#undef TAPS
        }
    }
}

/* The values in the basis, written to `room`; if there is no basis, the values themselves. */
TARGET static const float *NAME(enter)(const struct layer *l, const struct parts *p, const float *x, int *ld, int rank,
                                       int channels, float *room, int positions)
{
    if (!l->in_basis) return x;
    int ldr = padded(rank * l->order * channels);
    NAME(change)(p->basis_back, l->order, x, *ld, 1, room, ldr, channels, rank, positions);
    *ld = ldr;
    return room;
}

/* What enter returned, mixed and changed back from the basis: `rank` times `channels` values. With `back`, by the
 * transposed products, as gradients are. If `end` is given, which is for direct mixing only, y is the output. */
TARGET static void NAME(mix)(const struct layer *l, const struct parts *p, int back, const float *x, int ld, int rank,
                             int channels, float *room, float *y, int ldy, int positions, const struct ending *end)
{
    int ldr = l->in_basis ? padded(rank * l->order * channels) : ldy;
    float *mixed = l->in_basis ? room : y;
    for (int i = 0; i < l->products; i++) {
        const int *t = l->table + ENTRIES * i;
        int depth = back ? t[COLUMNS] : t[DEPTH], columns = back ? t[DEPTH] : t[COLUMNS];
        const float *w = back ? p->weights_back + t[PACKED_BACK] : p->weights + t[PACKED];
        NAME(product)(x + t[back ? WRITTEN : READ], ld, 1, w, V, (size_t)depth * V, depth,
                      mixed + t[back ? READ : WRITTEN], ldr, columns, t[back ? ADDED_BACK : ADDED], end != NULL,
                      i == l->products - 1 ? end : NULL, positions);
    }
    if (l->in_basis) NAME(change)(p->basis, l->order, mixed, ldr, 0, y, ldy, channels, rank, positions);
}

/* The gradient of the mix: for each product gw[read][written] += sum over positions of x[read] g[written]. */
TARGET static void NAME(mix_gradient)(const struct layer *l, const float *x, int ldx, const float *g, int ldg,
                                      float *gw, int positions)
{
    for (int i = 0; i < l->products; i++) {
        const int *t = l->table + ENTRIES * i;
        NAME(product)(x + t[READ], 1, ldx, g + t[WRITTEN], ldg, V, positions, gw + t[PACKED], ROUNDED(t[COLUMNS]),
                      t[COLUMNS], 1, 0, NULL, t[DEPTH]);
    }
}

/* Copies positions of `values` values so that they lie `step` apart. */
INLINE void NAME(spread)(const float *from, int ldf, float *to, size_t step, int values, int positions)
{
    for (int p = 0; p < positions; p++) memcpy(to + p * step, from + floats(p, ldf), sizeof(float) * values);
}

/* The output from positions that lie `ld` apart. */
TARGET static void NAME(finish)(const float *x, int ld, int c, int positions, const struct ending *end)
{
    for (int p = 0; p < positions; p++)
        for (int j = 0; j < c; j += V)
            NAME(finished)(end->y + floats(p, c) + j, NAME(load)(x + floats(p, ld) + j), j, c - j, end);
}

/* Output rows `first` to `last` - 1 of one image. */
TARGET static void NAME(forward)(const struct layer *l, const struct parts *p, const float *x, const float *residual,
                                 int relu, float *y, int first, int last, struct scratch scratch)
{
    int k = l->k, ci = l->order * l->in_channels, co = l->order * l->out_channels, wide = l->width + 2 * l->padding;
    int c = l->spatial_first ? ci : co, kept = l->spatial_first ? ci : co * l->rank, ld = padded(kept);
    int ldf = padded(l->spatial_first ? ci * l->rank : co), positions = wide > l->out_width ? wide : l->out_width;
    float *ring = take_zeros(&scratch, floats(k * wide, ld)); /* its borders stay zero */
    const float *zeros = take_zeros(&scratch, padded(l->in_channels));
    struct NAME(reader) reader;
    if (l->whole) NAME(prepare)(l, &reader);
    float *filtered = take(&scratch, floats(positions, ldf));
    float *in = take(&scratch, floats(positions, padded(ci * l->rank)));
    float *room = take(&scratch, floats(positions, padded(co * l->rank)));
    float *mixed = take(&scratch, floats(positions, padded(co)));
    int ready = first * l->stride - l->padding;
    for (int o = first; o < last; o++) {
        const float *rows[MOST_K], *shifted[MOST_K];
        prefetch(y + floats((o + 1) * l->out_width, co), floats(l->out_width, co));
        for (int dy = 0; dy < k; dy++) {
            int i = o * l->stride - l->padding + dy;
            float *slot = ring + floats((i + k) % k * wide, ld), *to = slot + floats(l->padding, ld);
            rows[dy] = i < 0 || i >= l->height ? NULL : slot;
            if (!rows[dy] || i < ready) continue;
            const float *from = x + floats(i * l->width, ci);
            prefetch(from + floats(l->width, ci), floats(l->width, ci));
            if (l->spatial_first)
                NAME(spread)(from, ci, to, ld, ci, l->width);
            else {
                int ldi = ci;
                const float *entered = NAME(enter)(l, p, from, &ldi, 1, l->in_channels, in, l->width);
                NAME(mix)(l, p, 0, entered, ldi, l->rank, l->out_channels, room, to, ld, l->width, NULL);
            }
            ready = i + 1;
        }
        size_t at = floats(o * l->out_width, co);
        struct ending end = {p->bias, residual ? residual + at : NULL, relu, y + at};
        if (l->whole) NAME(enter_pixels)(l, p->basis_back, &reader, rows, ld, zeros, in, ldf);
        for (int r = 0; r < l->rank && !l->whole; r++) {
            const float *d = p->spatial + (size_t)r * k * k * ROUNDED(c);
            for (int dy = 0; dy < k; dy++) shifted[dy] = rows[dy] && !l->spatial_first ? rows[dy] + r * co : rows[dy];
            float *to = l->spatial_first ? filtered + r * ci : filtered;
            NAME(depthwise)(shifted, ld, l->stride, d, k, c, to, ldf, l->out_width, !l->spatial_first && r,
                         l->spatial_first || r < l->rank - 1 ? NULL : &end);
        }
        if (l->spatial_first) {
            int ldi = ldf;
            const float *entered = in;
            if (!l->whole) entered = NAME(enter)(l, p, filtered, &ldi, l->rank, l->in_channels, in, l->out_width);
            if (l->in_basis) {
                NAME(mix)(l, p, 0, entered, ldi, 1, l->out_channels, room, mixed, padded(co), l->out_width, NULL);
                NAME(finish)(mixed, padded(co), co, l->out_width, &end);
            } else
                NAME(mix)(l, p, 0, entered, ldi, 1, l->out_channels, room, y + at, co, l->out_width, &end);
        }
    }
}

/* The adjoint of the spatial kernels is a convolution with the flipped kernels, of the gradients with stride - 1 zeros
 * between them and k - 1 - padding around. In `gc`, gd is found flipped. */
TARGET static void NAME(backward)(const struct layer *l, const struct parts *p, const float *x, const float *gy,
                                  float *gx, float *gw, float *gd, float *gb, int first, int last,
                                  struct scratch scratch)
{
    int k = l->k, stride = l->stride, border = k - 1 - l->padding, wide = l->width + k - 1, rank = l->rank;
    int ci = l->order * l->in_channels, co = l->order * l->out_channels, c = l->spatial_first ? ci : co;
    int kept = l->spatial_first ? ci * rank : co, ld = padded(kept);
    int ldi = padded(l->spatial_first ? ci * rank : ci), ldo = padded(l->spatial_first ? co : co * rank);
    int positions = wide > l->out_width ? wide : l->out_width, around = l->width + 2 * l->padding;
    size_t planes = (size_t)k * k * ROUNDED(c);
    int done = own_rows(l, first), end_row = own_rows(l, last);
    /* Both are zeros at first: what lies around and between the values stays zero. */
    float *ring = take_zeros(&scratch, floats(k * wide, ld));
    const float *zeros = take_zeros(&scratch, padded(l->in_channels));
    struct NAME(reader) reader;
    if (l->whole) NAME(prepare)(l, &reader);
    float *image = l->spatial_first ? take_zeros(&scratch, floats(l->height * around, padded(ci))) : NULL;
    int batch = batch_of(l), most = positions * batch, longer = ldi > ldo ? ldi : ldo;
    float *ins = take(&scratch, floats(most, ldi)), *outs = take(&scratch, floats(most, ldo));
    float *room = take(&scratch, floats(positions, longer));
    float *mades = take(&scratch, floats(most, longer)), *backs = take(&scratch, floats(most, longer));
    int above_first = larger(done * stride - l->padding, 0), below_last = (end_row - 1) * stride - l->padding + k;
    for (int i = above_first; i < smaller(below_last, l->height) && image; i++)
        NAME(spread)(x + floats(i * l->width, ci), ci, image + floats(i * around + l->padding, padded(ci)), padded(ci),
                     ci, l->width);
    int ready = 0;
    for (int i = first; i < last; i++) {
        const float *rows[MOST_K], *shifted[MOST_K];
        prefetch(gx + floats((i + 1) * l->width, ci), floats(l->width, ci));
        for (int dy = 0; dy < k; dy++) {
            int q = i + dy - border, o = q / stride;
            rows[dy] = q < 0 || q % stride || o >= l->out_height ? NULL : ring + floats(o % k * wide, ld);
            if (!rows[dy] || o < ready) continue;
            ready = o + 1;
            const float *from = gy + floats(o * l->out_width, co);
            prefetch(from + floats(l->out_width, co), floats(l->out_width, co));
            float *to = ring + floats(o % k * wide + border, ld);
            int own = o >= done; /* or else a pass over the rows before has counted it */
            if (gb && own) NAME(add_up)(from, co, l->out_width, gb);
            if (!l->spatial_first) {
                NAME(spread)(from, co, to, (size_t)stride * ld, co, l->out_width);
                continue;
            }
            const float *above[MOST_K];
            for (int t = 0; t < k; t++) {
                int at = o * stride - l->padding + t;
                above[t] = at < 0 || at >= l->height ? NULL : image + floats(at * around, padded(ci));
            }
            int lde = co, ldf = ldi, slot = own ? (o - done) % batch * l->out_width : 0;
            float *in = ins + floats(slot, ldi), *out = outs + floats(slot, ldo), *made = mades + floats(slot, ldi);
            float *back = backs;
            const float *entered = NAME(enter)(l, p, from, &lde, 1, l->out_channels, out, l->out_width);
            if (entered == from) { /* there is no room for a whole vector behind the last position */
                NAME(spread)(from, co, out, ldo, co, l->out_width);
                entered = out, lde = ldo;
            }
            NAME(mix)(l, p, 1, entered, lde, rank, l->in_channels, room, back, ldi, l->out_width, NULL);
            NAME(spread)(back, ldi, to, (size_t)stride * ld, kept, l->out_width);
            if (!own) continue;
            if (l->whole) NAME(enter_pixels)(l, p->basis_back, &reader, above, padded(ci), zeros, in, ldi);
            for (int r = 0; r < rank && !l->whole; r++) {
                NAME(depthwise)(above, padded(ci), stride, p->spatial + r * planes, k, ci, made + r * ci, ldi,
                             l->out_width, 0, NULL);
                if (gd)
                    NAME(depthwise_gradient)(above, padded(ci), stride, back + r * ci, ldi, k, ci, gd + r * planes,
                                          l->out_width);
            }
            const float *filtered = in;
            if (!l->whole) filtered = NAME(enter)(l, p, made, &ldf, rank, l->in_channels, in, l->out_width);
            if (slot == (batch - 1) * l->out_width || o == end_row - 1)
                NAME(mix_gradient)(l, filtered - floats(slot, ldf), ldf, outs, ldo, gw, slot + l->out_width);
        }
        int slot = (i - first) % batch * l->width;
        float *in = ins + floats(slot, ldi), *out = outs + floats(slot, ldo), *made = mades;
        float *back = backs + (l->spatial_first ? 0 : floats(slot, ldo));
        struct ending end = {.y = gx + floats(i * l->width, ci)};
        if (l->whole) NAME(leave_pixels)(l, &reader, rows, ld, &end);
        for (int r = 0; r < rank && !l->whole; r++) {
            for (int dy = 0; dy < k; dy++) shifted[dy] = rows[dy] && l->spatial_first ? rows[dy] + r * ci : rows[dy];
            float *to = l->spatial_first ? back : back + r * co;
            NAME(depthwise)(shifted, ld, 1, p->spatial_back + r * planes, k, c, to, l->spatial_first ? ldi : ldo, l->width,
                         l->spatial_first && r, l->spatial_first && r == rank - 1 ? &end : NULL);
        }
        if (!l->spatial_first) {
            int lde = ci, ldg = ldo;
            const float *from = x + floats(i * l->width, ci);
            prefetch(from + floats(l->width, ci), floats(l->width, ci));
            const float *entered = NAME(enter)(l, p, from, &lde, 1, l->in_channels, in, l->width);
            NAME(mix)(l, p, 0, entered, lde, rank, l->out_channels, room, made, ldo, l->width, NULL);
            for (int r = 0; r < rank && gd; r++)
                NAME(depthwise_gradient)(rows, ld, 1, made + r * co, ldo, k, co, gd + r * planes, l->width);
            const float *gradient = NAME(enter)(l, p, back, &ldg, rank, l->out_channels, out, l->width);
            if (slot == (batch - 1) * l->width || i == last - 1)
                NAME(mix_gradient)(l, entered - floats(slot, lde), lde, gradient - floats(slot, ldg), ldg, gw,
                                   slot + l->width);
            if (l->in_basis) {
                NAME(mix)(l, p, 1, gradient, ldg, 1, l->in_channels, room, made, ldi, l->width, NULL);
                NAME(finish)(made, ldi, ci, l->width, &end);
            } else
                NAME(mix)(l, p, 1, gradient, ldg, 1, l->in_channels, room, end.y, ci, l->width, &end);
        }
    }
}

#include "undefine.h"

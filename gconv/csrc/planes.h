/* The kernels of separable.c with a plane for each channel, for layers of few channels and stride one: vectors hold eight
 * neighbours of a row, so that no lane is empty however few channels there are, and products in the irreducible
 * representations cost what they should. Channels-last maps are turned as they are read and as they are written.
 *
 * A row of a plane is followed by `padding` zeros, which are also those before the next one. */

/* Planes of a band of rows: at is the first value of the first, those of an image's row `top`. */
struct NAME(planes) { float *at; int plane, pitch, top; };

/* Eight vectors of eight values, turned. */
INLINE TARGET void NAME(turn)(vec *v)
{
    typedef NAME(ints) ints;
    const ints low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
    const ints first = {0, 1, 8, 9, 4, 5, 12, 13}, second = {2, 3, 10, 11, 6, 7, 14, 15};
    const ints front = {0, 1, 2, 3, 8, 9, 10, 11}, back = {4, 5, 6, 7, 12, 13, 14, 15};
    vec a[8], b[8];
    UNROLLED for (int i = 0; i < 8; i += 2) {
        a[i] = __builtin_shuffle(v[i], v[i + 1], low);
        a[i + 1] = __builtin_shuffle(v[i], v[i + 1], high);
    }
    UNROLLED for (int i = 0; i < 8; i += 4)
        UNROLLED for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = __builtin_shuffle(a[i + j], a[i + 2 + j], first);
            b[i + 2 * j + 1] = __builtin_shuffle(a[i + j], a[i + 2 + j], second);
        }
    UNROLLED for (int i = 0; i < 4; i++) {
        v[i] = __builtin_shuffle(b[i], b[i + 4], front);
        v[i + 4] = __builtin_shuffle(b[i], b[i + 4], back);
    }
}

/* Rows x [rows][width][c] of a channels-last map into planes. What comes behind a row is zeros,
 * as far as a vector reaches. */
TARGET static void NAME(enter_planes)(const float *x, int c, int width, int rows, float *planes, int plane, int pitch)
{
    for (int j = 0; j < c; j += V)
        for (int i = 0; i < rows; i++)
            for (int q = 0; q < width; q += V) {
                const float *from = x + floats(i * width + q, c) + j;
                float *to = planes + floats(j, plane) + floats(i, pitch) + q;
                vec v[V];
                if (q + V <= width && j + V <= c) {
                    UNROLLED for (int n = 0; n < V; n++) v[n] = NAME(load)(from + n * c);
                    NAME(turn)(v);
                    UNROLLED for (int n = 0; n < V; n++) NAME(store)(to + floats(n, plane), v[n]);
                } else {
                    for (int n = 0; n < V; n++)
                        v[n] = q + n < width ? NAME(load_part)(from + n * c, c - j) : (vec){0};
                    NAME(turn)(v);
                    for (int n = 0; n < V && n < c - j; n++) NAME(store)(to + floats(n, plane), v[n]);
                }
            }
}

/* Back from planes at `from`, those of the channels from `column` on, of c: at most eight. */
INLINE TARGET void NAME(leave_planes)(const float *from, int plane, int pitch, int column, int c, int width, int rows,
                                      const struct ending *end)
{
    int some = c - column < V ? c - column : V;
    for (int i = 0; i < rows; i++)
        for (int q = 0; q < width; q += V) {
            float *to = end->y + floats(i * width + q, c) + column;
            const float *read = from + floats(i, pitch) + q;
            vec v[V];
            if (some == V && q + V <= width) {
                UNROLLED for (int n = 0; n < V; n++) v[n] = NAME(load)(read + floats(n, plane));
                NAME(turn)(v);
                if (end->bias) {
                    vec bias = NAME(load)(end->bias + column);
                    UNROLLED for (int n = 0; n < V; n++) v[n] += bias;
                }
                if (end->more)
                    UNROLLED for (int n = 0; n < V; n++) v[n] += NAME(load)(end->more + (to - end->y) + floats(n, c));
                if (end->relu)
                    UNROLLED for (int n = 0; n < V; n++) v[n] = (vec)(~(v[n] < 0) & (NAME(ints))v[n]);
                UNROLLED for (int n = 0; n < V; n++) NAME(store)(to + floats(n, c), v[n]);
                continue;
            }
            for (int n = 0; n < V; n++) v[n] = n < some ? NAME(load)(read + floats(n, plane)) : (vec){0};
            NAME(turn)(v);
            for (int n = 0; n < V && q + n < width; n++)
                NAME(finished)(to + floats(n, c), v[n], column, some, end);
        }
}

/* x[s][i][:values] = sum over t of change[s][t] x[t][i][:values], for all channels i, and what a vector has more. */
INLINE TARGET void NAME(change_all)(const float *change, const int s, float *x, int plane, int channels, int values)
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

/* `rank` times `channels` planes of each element of the group, from the basis or into it, where they are. */
TARGET static void NAME(change_planes)(const struct layer *l, const float *change, float *x, int plane, int channels,
                                       int rank, int values)
{
    if (!l->in_basis) return;
    for (int r = 0; r < rank; r++, x += floats(l->order * channels, plane))
        if (l->order == 8) NAME(change_all)(change, 8, x, plane, channels, values);
        else if (l->order == 4) NAME(change_all)(change, 4, x, plane, channels, values);
        else NAME(change_all)(change, l->order, x, plane, channels, values);
}

/* The matrix products of a mix; `back` as gradients are. */
TARGET static void NAME(mix_planes)(const struct layer *l, const struct parts *p, int back, const float *x, float *y,
                                    int plane, int values)
{
    for (int i = 0; i < l->products; i++) {
        const int *t = l->table + ENTRIES * i;
        int depth = back ? t[COLUMNS] : t[DEPTH], columns = back ? t[DEPTH] : t[COLUMNS];
        const float *w = back ? p->weights_back + t[PACKED_BACK] : p->weights + t[PACKED];
        NAME(product)(w, depth, 1, x + floats(t[back ? WRITTEN : READ], plane), plane, V, depth,
                      y + floats(t[back ? READ : WRITTEN], plane), plane, values, t[back ? ADDED_BACK : ADDED], NULL,
                      columns);
    }
}

/* gw[i][j] += the product of x[i] and g[j], n values each, apart in the lanes of a vector. */
INLINE TARGET void NAME(products_tile)(const float *x, const float *g, int plane, int n, float *gw, int ldw,
                                       const int rows, const int cols)
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

/* The gradient of a mix. */
TARGET static void NAME(mix_planes_gradient)(const struct layer *l, const float *x, const float *g, int plane,
                                             float *gw, int values)
{
    for (int i = 0; i < l->products; i++) {
        const int *t = l->table + ENTRIES * i;
        int depth = t[DEPTH], columns = t[COLUMNS];
        for (int e = 0; e < depth; e += 5)
            for (int j = 0; j < columns; j += 5) {
                const float *from = x + floats(t[READ] + e, plane), *with = g + floats(t[WRITTEN] + j, plane);
                float *to = gw + floats(t[PACKED] + e * columns + j, V);
                int rows = depth - e < 5 ? depth - e : 5, cols = columns - j < 5 ? columns - j : 5;
#define COLS(R, C) case C: NAME(products_tile)(from, with, plane, values, to, columns, R, C); break;
#define ROWS(R) case R: switch (cols) { COLS(R, 1) COLS(R, 2) COLS(R, 3) COLS(R, 4) COLS(R, 5) } break;
                switch (rows) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) }
#undef ROWS
#undef COLS
            }
    }
}

/* Which of eight values from the one with the number `at` on are in a row of `width`, as bits. */
INLINE unsigned NAME(inside)(int at, int width)
{
    int before = at < 0 ? -at : 0, beyond = at + V > width ? at + V - width : 0;
    return before < V && beyond < V ? 255u << before & 255u >> beyond : 0;
}

/* Rows of planes convolved with a kernel: y[i][:columns] = or += sum over dy, dx of w[dy][dx] x[i + dy][dx:], of rows of
 * `width` values of which x is that with the number -padding. */
TARGET static void NAME(filter_three)(const float *x, int width, int padding, int pitch, const float *d, int next,
                                      float *y, int columns, int rows, int add)
{
    vec w[9];
    UNROLLED for (int n = 0; n < 9; n++, d += next) w[n] = *d - (vec){0};
    for (int q = 0; q < columns; q += V) {
        const float *from = x + q;
        float *to = y + q;
        unsigned masks[3], all = columns - q < V ? (1u << (columns - q)) - 1 : 255;
        UNROLLED for (int dx = 0; dx < 3; dx++) masks[dx] = NAME(inside)(q + dx - padding, width);
#define READ                                                                                                           \
    vec read[3];                                                                                                       \
    UNROLLED for (int dx = 0; dx < 3; dx++) read[dx] = (vec)LOAD_MASKED(masks[dx], from + dx);                         \
    from += pitch
        vec sums[3] = {{0}};
        for (int i = 0; i < 2; i++) {
            READ;
            sums[0] = sums[1];
            sums[1] = (vec){0};
            UNROLLED for (int dx = 0; dx < 3; dx++) {
                if (i) sums[0] += w[3 + dx] * read[dx];
                sums[1] += w[dx] * read[dx];
            }
        }
        for (int i = 0; i < rows; i++, to += pitch) {
            READ;
            vec sum = sums[0];
            sums[0] = sums[1];
            sums[1] = (vec){0};
            UNROLLED for (int dx = 0; dx < 3; dx++) {
                sum += w[6 + dx] * read[dx];
                sums[0] += w[3 + dx] * read[dx];
                sums[1] += w[dx] * read[dx];
            }
            if (add) sum += (vec)LOAD_MASKED(all, to);
            STORE_MASKED(to, all, sum);
        }
#undef READ
    }
}

TARGET static void NAME(filter)(const float *x, int width, int padding, int pitch, const float *d, int next, int k,
                                float *y, int columns, int rows, int add)
{
    if (k == 3) {
        NAME(filter_three)(x, width, padding, pitch, d, next, y, columns, rows, add);
        return;
    }
    for (int i = 0; i < rows; i++)
        for (int q = 0; q < columns; q += V) {
            float *to = y + floats(i, pitch) + q;
            vec sum = add ? NAME(load_part)(to, columns - q) : (vec){0};
            for (int dy = 0; dy < k; dy++)
                for (int dx = 0; dx < k; dx++)
                    sum += d[(dy * k + dx) * next]
                           * (vec)LOAD_MASKED(NAME(inside)(q + dx - padding, width), x + floats(i + dy, pitch) + q + dx);
            NAME(store_part)(to, sum, columns - q);
        }
}

/* The gradient of a kernel: gd[dy][dx] += sum over i, q of t[i][:columns] x[i + dy][dx:], apart in the lanes; an entry of
 * gd is `next` vectors from the one before. */
TARGET static void NAME(filter_gradient_three)(const float *x, int width, int padding, int pitch, const float *t,
                                               int columns, int rows, float *gd, int next)
{
    vec sums[9];
    UNROLLED for (int y = 0; y < 9; y++) sums[y] = NAME(load)(gd + floats(y * next, V));
    for (int q = 0; q < columns; q += V) {
        const float *from = x + q, *with = t + q;
        unsigned masks[3], all = columns - q < V ? (1u << (columns - q)) - 1 : 255;
        UNROLLED for (int dx = 0; dx < 3; dx++) masks[dx] = NAME(inside)(q + dx - padding, width);
        vec values[3] = {{0}};
        for (int i = 0; i < rows + 2; i++, from += pitch, with += pitch) {
            values[2] = values[1];
            values[1] = values[0];
            values[0] = i < rows ? (vec)LOAD_MASKED(all, with) : (vec){0};
            UNROLLED for (int dx = 0; dx < 3; dx++) {
                vec read = (vec)LOAD_MASKED(masks[dx], from + dx);
                UNROLLED for (int dy = 0; dy < 3; dy++) sums[3 * dy + dx] += values[dy] * read;
            }
        }
    }
    UNROLLED for (int y = 0; y < 9; y++) NAME(store)(gd + floats(y * next, V), sums[y]);
}

TARGET static void NAME(filter_gradient)(const float *x, int width, int padding, int pitch, int k, const float *t,
                                         int columns, int rows, float *gd, int next)
{
    if (k == 3) {
        NAME(filter_gradient_three)(x, width, padding, pitch, t, columns, rows, gd, next);
        return;
    }
    for (int dy = 0; dy < k; dy++)
        for (int dx = 0; dx < k; dx++, gd += floats(next, V)) {
            vec sum = NAME(load)(gd);
            for (int i = 0; i < rows; i++)
                for (int q = 0; q < columns; q += V)
                    sum += NAME(load_part)(t + floats(i, pitch) + q, columns - q)
                           * (vec)LOAD_MASKED(NAME(inside)(q + dx - padding, width), x + floats(i + dy, pitch) + q + dx);
            NAME(store)(gd, sum);
        }
}

/* Of `channels` planes, for rows of the output from `first` on. */
INLINE TARGET struct NAME(planes) NAME(take_planes)(float **scratch, const struct layer *l, int channels, int rows,
                                                    int top)
{
    struct NAME(planes) p = {.plane = plane_of(l, rows), .pitch = pitch_of(l), .top = top};
    p.at = NAME(take)(scratch, floats(channels, p.plane)) + margin_of(l);
    return p;
}

/* Zeros in place of the rows below the image, which the band before may have had. */
INLINE TARGET void NAME(clear_below)(const struct NAME(planes) *p, int channels, int rows, int most)
{
    for (int i = 0; i < channels; i++)
        memset(p->at + floats(i, p->plane) + floats(rows, p->pitch), 0, sizeof(float) * floats(most - rows, p->pitch));
}

/* Where, for the first of the rows from `first` on of what a kernel gives, the values that it reads begin. */
INLINE const float *NAME(reach)(const struct NAME(planes) *p, int channel, int first, int padding)
{
    return p->at + (ptrdiff_t)channel * p->plane + (ptrdiff_t)(first - padding - p->top) * p->pitch - padding;
}

/* Output rows `first` to `last` - 1 of one image. The scratch is zeros at first. */
TARGET static void NAME(forward_planes)(const struct layer *l, const struct parts *p, const float *x, const float *more,
                                        int relu, float *y, int first, int last, float *scratch)
{
    int k = l->k, ci = l->order * l->in_channels, co = l->order * l->out_channels, rank = l->rank;
    int c = l->planar_first ? ci : co, most = p->rows + k - 1;
    int from = first - l->padding, to = last - l->padding + k - 1;
    from = from < 0 ? 0 : from, to = to > l->height ? l->height : to;
    struct NAME(planes) in = NAME(take_planes)(&scratch, l, ci, most, from);
    struct NAME(planes) made = NAME(take_planes)(&scratch, l, c * rank, most, from);
    struct NAME(planes) out = NAME(take_planes)(&scratch, l, l->planar_first ? rounded(co, V) : V, most, first);
    size_t at = floats(first * l->out_width, co);
    struct ending end = {p->bias, more ? more + at : NULL, relu, y + at};
    int plane = in.plane, pitch = in.pitch, rows = last - first, values = rows * pitch;
    if (first > 0) NAME(clear_below)(&in, ci, to - from, most);
    NAME(enter_planes)(x + floats(from * l->width, ci), ci, l->width, to - from, in.at, plane, pitch);
    prefetch(end.y, floats(rows * l->out_width, co));
    prefetch(x + floats(to * l->width, ci), floats((to - from) * l->width, ci));
    if (l->planar_first) {
        for (int r = 0; r < rank; r++)
            for (int i = 0; i < ci; i++)
                NAME(filter)(NAME(reach)(&in, i, first, l->padding), l->width, l->padding, pitch, p->planar + r * k * k * c + i, c,
                                     k, made.at + floats(r * ci + i, plane), l->out_width, rows, 0);
        NAME(change_planes)(l, p->basis_back, made.at, plane, l->in_channels, rank, values);
        NAME(mix_planes)(l, p, 0, made.at, out.at, plane, values);
        NAME(change_planes)(l, p->basis, out.at, plane, l->out_channels, 1, values);
        for (int j = 0; j < co; j += V)
            NAME(leave_planes)(out.at + floats(j, plane), plane, pitch, j, co, l->out_width, rows, &end);
        return;
    }
    NAME(change_planes)(l, p->basis_back, in.at, plane, l->in_channels, 1, (to - from) * pitch);
    NAME(mix_planes)(l, p, 0, in.at, made.at, plane, (to - from) * pitch);
    NAME(change_planes)(l, p->basis, made.at, plane, l->out_channels, rank, (to - from) * pitch);
    if (first > 0) NAME(clear_below)(&made, c * rank, to - from, most);
    for (int j = 0; j < co; j += V) {
        for (int i = j; i < co && i < j + V; i++)
            for (int r = 0; r < rank; r++)
                NAME(filter)(NAME(reach)(&made, r * co + i, first, l->padding), l->width, l->padding, pitch,
                                     p->planar + r * k * k * c + i, c, k, out.at + floats(i - j, plane), l->out_width,
                                     rows, r > 0);
        NAME(leave_planes)(out.at, plane, pitch, j, co, l->out_width, rows, &end);
    }
}

/* One image: gx, and added to gw and, if they are not NULL, gd and gb, as rows.h does it; but gw and gd are eight sums
 * each. */
TARGET static void NAME(backward_planes)(const struct layer *l, const struct parts *p, const float *x, const float *gy,
                                         float *gx, float *gw, float *gd, float *gb, float *scratch)
{
    int k = l->k, kk = k * k, ci = l->order * l->in_channels, co = l->order * l->out_channels, rank = l->rank;
    int c = l->planar_first ? ci : co, border = k - 1 - l->padding, most = p->rows + k - 1, ready = 0;
    float *begin = scratch;
    if (gb) NAME(add_up)(gy, co, l->out_height * l->out_width, gb);
    for (int first = 0, last; first < l->height; first = last) {
        last = first + p->rows < l->height ? first + p->rows : l->height;
        /* Rows of the output that these rows of the map meet. */
        int from = first - border, to = last - border + k - 1;
        from = from < 0 ? 0 : from, to = to > l->out_height ? l->out_height : to;
        scratch = begin;
        struct ending end = {.y = gx + floats(first * l->width, ci)};
        struct NAME(planes) g = NAME(take_planes)(&scratch, l, co, most, from);
        int plane = g.plane, pitch = g.pitch, values = (last - first) * pitch;
        NAME(enter_planes)(gy + floats(from * l->out_width, co), co, l->out_width, to - from, g.at, plane, pitch);
        if (!l->planar_first) {
            struct NAME(planes) in = NAME(take_planes)(&scratch, l, ci, most, first);
            struct NAME(planes) made = NAME(take_planes)(&scratch, l, ci > co * rank ? ci : co * rank, most, first);
            struct NAME(planes) back = NAME(take_planes)(&scratch, l, co * rank, most, first);
            if (first > 0) NAME(clear_below)(&g, co, to - from, most);
            NAME(enter_planes)(x + floats(first * l->width, ci), ci, l->width, last - first, in.at, plane, pitch);
            NAME(change_planes)(l, p->basis_back, in.at, plane, l->in_channels, 1, values);
            NAME(mix_planes)(l, p, 0, in.at, made.at, plane, values);
            NAME(change_planes)(l, p->basis, made.at, plane, l->out_channels, rank, values);
            for (int i = 0; i < co; i++) {
                const float *read = NAME(reach)(&g, i, first, border);
                for (int r = 0; r < rank; r++) {
                    size_t own = floats(r * co + i, plane), kernel = (size_t)r * kk * c + i;
                    NAME(filter)(read, l->out_width, border, pitch, p->planar_back + kernel, c, k, back.at + own, l->width,
                                         last - first, 0);
                    if (gd) NAME(filter_gradient)(read, l->out_width, border, pitch, k, made.at + own, l->width, last - first, gd + kernel * V, c);
                }
            }
            NAME(change_planes)(l, p->basis_back, back.at, plane, l->out_channels, rank, values);
            NAME(mix_planes_gradient)(l, in.at, back.at, plane, gw, values);
            NAME(mix_planes)(l, p, 1, back.at, made.at, plane, values);
            NAME(change_planes)(l, p->basis, made.at, plane, l->in_channels, 1, values);
            for (int j = 0; j < ci; j += V)
                NAME(leave_planes)(made.at + floats(j, plane), plane, pitch, j, ci, l->width, last - first, &end);
            continue;
        }
        /* Of the rows of the output, those that no band before had add to the parameters' gradients. */
        int above = ready - l->padding, below = to - l->padding + k - 1, rows = to - ready;
        above = above < 0 ? 0 : above, below = below > l->height ? l->height : below;
        struct NAME(planes) in = NAME(take_planes)(&scratch, l, ci, most, above);
        struct NAME(planes) made = NAME(take_planes)(&scratch, l, rounded(ci * rank, V), most, ready);
        struct NAME(planes) back = NAME(take_planes)(&scratch, l, ci * rank, most, from);
        NAME(change_planes)(l, p->basis_back, g.at, plane, l->out_channels, 1, (to - from) * pitch);
        NAME(mix_planes)(l, p, 1, g.at, back.at, plane, (to - from) * pitch);
        NAME(change_planes)(l, p->basis, back.at, plane, l->in_channels, rank, (to - from) * pitch);
        if (first > 0) {
            NAME(clear_below)(&back, ci * rank, to - from, most);
            NAME(clear_below)(&in, ci, below - above, most);
        }
        if (rows > 0) {
            NAME(enter_planes)(x + floats(above * l->width, ci), ci, l->width, below - above, in.at, plane, pitch);
            for (int i = 0; i < ci; i++) {
                const float *read = NAME(reach)(&in, i, ready, l->padding);
                for (int r = 0; r < rank; r++) {
                    size_t own = floats(r * ci + i, plane), kernel = (size_t)r * kk * c + i;
                    NAME(filter)(read, l->width, l->padding, pitch, p->planar + kernel, c, k, made.at + own, l->out_width, rows, 0);
                    if (gd)
                        NAME(filter_gradient)(read, l->width, l->padding, pitch, k, back.at + own + floats(ready - from, pitch), l->out_width,
                                             rows, gd + kernel * V, c);
                }
            }
            NAME(change_planes)(l, p->basis_back, made.at, plane, l->in_channels, rank, rows * pitch);
            NAME(mix_planes_gradient)(l, made.at, g.at + floats(ready - from, pitch), plane, gw, rows * pitch);
            ready = to;
        }
        for (int j = 0; j < ci; j += V) {
            for (int i = j; i < ci && i < j + V; i++)
                for (int r = 0; r < rank; r++)
                    NAME(filter)(NAME(reach)(&back, r * ci + i, first, border), l->out_width, border, pitch,
                                         p->planar_back + (size_t)r * kk * c + i, c, k, made.at + floats(i - j, plane),
                                         l->width, last - first, r > 0);
            NAME(leave_planes)(made.at, plane, pitch, j, ci, l->width, last - first, &end);
        }
    }
}

/* The kernels of separable.c for one instruction set: NAME(x) is the name of x there, TARGET the attribute of its
 * functions, V the floats a vector, TALL the most rows of a tile of a matrix product, MASKED whether parts of vectors
 * are loaded and stored by masks. */

typedef float NAME(vec) __attribute__((vector_size(4 * V), aligned(4)));
typedef int NAME(ints) __attribute__((vector_size(4 * V)));
#define vec NAME(vec)
#define ROUNDED(n) rounded(n, V)

INLINE TARGET vec NAME(load)(const float *from) { return *(const vec *)from; }

INLINE TARGET void NAME(store)(float *to, vec value) { *(vec *)to = value; }

/* The first n values, and zeros. */
INLINE TARGET vec NAME(load_part)(const float *from, int n)
{
    if (n >= V) return NAME(load)(from);
#if MASKED
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), from);
#else
    vec value = {0};
    for (int i = 0; i < n; i++) value[i] = from[i];
    return value;
#endif
}

INLINE TARGET void NAME(store_part)(float *to, vec value, int n)
{
    if (n >= V) {
        NAME(store)(to, value);
        return;
    }
#if MASKED
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1), (__m512)value);
#else
    for (int i = 0; i < n; i++) to[i] = value[i];
#endif
}

/* c[i][:n] = or += sum over t < depth of a[i across + t along] b[t][:n], for i < rows and n up to cols vectors.
 * A vector of b is `next` values from the one before, a row `below` values from the one above. */
INLINE TARGET void NAME(tile)(const float *a, int across, int along, const float *b, size_t below, size_t next,
                              int depth, float *c, int ldc, int n, int add, const int rows, const int cols)
{
    vec sums[TALL][3];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) sums[i][j] = (vec){0};
    for (int t = 0; t < depth; t++) {
        vec w[3];
        for (int j = 0; j < cols; j++) w[j] = NAME(load)(b + t * below + j * next);
        for (int i = 0; i < rows; i++) {
            float value = a[(size_t)i * across + (size_t)t * along];
            for (int j = 0; j < cols; j++) sums[i][j] += value * w[j];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) {
            float *to = c + (size_t)i * ldc + j * V;
            NAME(store_part)(to, add ? sums[i][j] + NAME(load_part)(to, n - j * V) : sums[i][j], n - j * V);
        }
}

/* The same for any number of rows and n. A vector of b is `next` values from the one before. */
TARGET static void NAME(product)(const float *a, int across, int along, const float *b, size_t below, size_t next,
                                 int depth, float *c, int ldc, int n, int add, int rows)
{
    for (int j = 0; j < n;) {
        int cols = (n - j + V - 1) / V;
        cols = cols == 4 ? 2 : cols > 3 ? 3 : cols;
        const float *w = b + j / V * next;
        for (int i = 0; i < rows;) {
            const float *from = a + (size_t)i * across;
            float *to = c + (size_t)i * ldc + j;
#define TILES(R)                                                                                                       \
    if (rows - i >= R) {                                                                                               \
        if (cols == 3) NAME(tile)(from, across, along, w, below, next, depth, to, ldc, n - j, add, R, 3);              \
        else if (cols == 2) NAME(tile)(from, across, along, w, below, next, depth, to, ldc, n - j, add, R, 2);         \
        else NAME(tile)(from, across, along, w, below, next, depth, to, ldc, n - j, add, R, 1);                        \
        i += R;                                                                                                        \
        continue;                                                                                                      \
    }
#if TALL == 8
            TILES(8)
#endif
            TILES(4)
            TILES(2)
            TILES(1)
#undef TILES
        }
        j += cols * V;
    }
}

/* y[p][s][:c] = sum over t of change[s][t] x[p][t][:c] */
INLINE TARGET void NAME(change_of)(const float *change, const int s, const float *x, int ldx, float *y, int ldy, int c,
                                   int positions)
{
    for (int p = 0; p < positions; p++)
        for (int j = 0; j < c; j += V) {
            const float *from = x + floats(p, ldx) + j;
            float *to = y + floats(p, ldy) + j;
            vec in[MOST_ORDER];
            for (int t = 0; t < s; t++) in[t] = NAME(load_part)(from + t * c, c - j);
            for (int r = 0; r < s; r++) {
                vec sum = change[r * s] * in[0];
                for (int t = 1; t < s; t++) sum += change[r * s + t] * in[t];
                NAME(store_part)(to + r * c, sum, c - j);
            }
        }
}

TARGET static void NAME(change)(const float *change, int s, const float *x, int ldx, float *y, int ldy, int c, int rank,
                                int positions)
{
    for (int r = 0; r < rank; r++, x += s * c, y += s * c)
        if (s == 8) NAME(change_of)(change, 8, x, ldx, y, ldy, c, positions);
        else if (s == 4) NAME(change_of)(change, 4, x, ldx, y, ldy, c, positions);
        else NAME(change_of)(change, s, x, ldx, y, ldy, c, positions);
}

/* One row of a depthwise convolution of c channels: y[x][:c] = or += sum over dy, dx of d[dy][dx] rows[dy][x + dx].
 * rows[dy] has its borders, or is NULL if it is all zero. Writes whole vectors, up to ROUNDED(c). */
INLINE TARGET void NAME(planar_of)(const float *const *rows, int ld, int stride, const float *d, const int k, int c,
                                   float *y, int ldy, int width, int add)
{
    for (int j = 0; j < c; j += V) {
        vec w[9];
        if (k == 3)
            for (int t = 0; t < 9; t++) w[t] = NAME(load)(d + t * ROUNDED(c) + j);
        for (int x = 0; x < width; x++) {
            float *to = y + floats(x, ldy) + j;
            vec sum = {0};
            for (int dy = 0; dy < k; dy++) {
                if (!rows[dy]) continue;
                const float *from = rows[dy] + floats(x * stride, ld) + j;
                for (int dx = 0; dx < k; dx++) {
                    vec here = k == 3 ? w[dy * 3 + dx] : NAME(load)(d + (dy * k + dx) * ROUNDED(c) + j);
                    sum += here * NAME(load)(from + floats(dx, ld));
                }
            }
            NAME(store)(to, add ? sum + NAME(load)(to) : sum);
        }
    }
}

TARGET static void NAME(planar)(const float *const *rows, int ld, int stride, const float *d, int k, int c, float *y,
                                int ldy, int width, int add)
{
    if (k == 3) NAME(planar_of)(rows, ld, stride, d, 3, c, y, ldy, width, add);
    else NAME(planar_of)(rows, ld, stride, d, k, c, y, ldy, width, add);
}

/* Its gradient: gd[dy][dx][:c] += sum over x of t[x][:c] rows[dy][x + dx][:c] */
TARGET static void NAME(planar_gradient)(const float *const *rows, int ld, int stride, const float *t, int ldt, int k,
                                         int c, float *gd, int width)
{
    for (int dy = 0; dy < k; dy++) {
        if (!rows[dy]) continue;
        for (int j = 0; j < c; j += V)
            for (int dx = 0; dx < k; dx += 3) {
                vec sums[3] = {{0}, {0}, {0}};
                int taps = k - dx < 3 ? k - dx : 3;
                const float *from = rows[dy] + floats(dx, ld) + j;
                if (taps == 3)
                    for (int x = 0; x < width; x++) {
                        vec value = NAME(load)(t + floats(x, ldt) + j);
                        for (int i = 0; i < 3; i++) sums[i] += value * NAME(load)(from + floats(x * stride + i, ld));
                    }
                else
                    for (int x = 0; x < width; x++) {
                        vec value = NAME(load)(t + floats(x, ldt) + j);
                        for (int i = 0; i < taps; i++) sums[i] += value * NAME(load)(from + floats(x * stride + i, ld));
                    }
                for (int i = 0; i < taps; i++) {
                    float *to = gd + (dy * k + dx + i) * ROUNDED(c) + j;
                    NAME(store)(to, NAME(load)(to) + sums[i]);
                }
            }
    }
}

/* The values in the basis, in `room`; if there is no basis, where they are. */
TARGET static const float *NAME(enter)(const struct layer *l, const float *basis_back, const float *x, int *ld, int rank,
                                       int channels, float *room, int positions)
{
    if (!basis_back) return x;
    int ldr = padded(rank * l->order * channels);
    NAME(change)(basis_back, l->order, x, *ld, room, ldr, channels, rank, positions);
    *ld = ldr;
    return room;
}

/* What enter gave, mixed and out of the basis again, `rank` times `channels`; `back` as gradients are. */
TARGET static void NAME(mix)(const struct layer *l, const struct parts *p, int back, const float *x, int ld, int rank,
                             int channels, float *room, float *y, int ldy, int positions)
{
    int ldr = p->basis ? padded(rank * l->order * channels) : ldy;
    float *mixed = p->basis ? room : y;
    for (int i = 0; i < l->products; i++) {
        const int *t = l->table + ENTRIES * i;
        int depth = back ? t[COLUMNS] : t[DEPTH], columns = back ? t[DEPTH] : t[COLUMNS];
        const float *w = back ? p->weights_back + t[PACKED_BACK] : p->weights + t[PACKED];
        NAME(product)(x + t[back ? WRITTEN : READ], ld, 1, w, V, (size_t)depth * V, depth,
                      mixed + t[back ? READ : WRITTEN], ldr, columns, t[back ? ADDED_BACK : ADDED], positions);
    }
    if (p->basis) NAME(change)(p->basis, l->order, mixed, ldr, y, ldy, channels, rank, positions);
}

/* Its gradient: for each product gw[read][written] += sum over positions of x[read] g[written]. */
TARGET static void NAME(mix_gradient)(const struct layer *l, const float *x, int ldx, const float *g, int ldg, float *gw,
                                      int positions)
{
    for (int i = 0; i < l->products; i++) {
        const int *t = l->table + ENTRIES * i;
        NAME(product)(x + t[READ], 1, ldx, g + t[WRITTEN], ldg, V, positions, gw + t[PACKED], ROUNDED(t[COLUMNS]),
                      t[COLUMNS], 1, t[DEPTH]);
    }
}

/* Positions with some between them. */
INLINE void NAME(spread)(const float *from, int ldf, float *to, size_t step, int values, int positions)
{
    for (int p = 0; p < positions; p++) memcpy(to + p * step, from + floats(p, ldf), sizeof(float) * values);
}

/* y = x + bias + more, or ReLU of that, without the padding of the rows of x. */
TARGET static void NAME(finish)(const float *x, int ld, const float *bias, const float *more, int relu, float *y, int c,
                                int positions)
{
    for (int p = 0; p < positions; p++)
        for (int j = 0; j < c; j += V) {
            vec value = NAME(load)(x + floats(p, ld) + j);
            if (bias) value += NAME(load)(bias + j);
            if (more) value += NAME(load_part)(more + floats(p, c) + j, c - j);
            if (relu) value = (vec)(~(value < 0) & (NAME(ints))value); /* what is not a number stays so */
            NAME(store_part)(y + floats(p, c) + j, value, c - j);
        }
}

INLINE float *NAME(take)(float **scratch, size_t size)
{
    float *taken = *scratch;
    *scratch += (size + SPARE - 1) / SPARE * SPARE;
    return taken;
}

/* Output rows `first` to `last` - 1 of one image. */
TARGET static void NAME(forward)(const struct layer *l, const float *x, const float *more, int relu, float *y, int first,
                                 int last, float *scratch)
{
    const struct parts p = parts_of(l, V);
    int k = l->k, ci = l->order * l->in_channels, co = l->order * l->out_channels, wide = l->width + 2 * l->padding;
    int c = l->planar_first ? ci : co, kept = l->planar_first ? ci : co * l->rank, ld = padded(kept);
    int ldf = padded(l->planar_first ? ci * l->rank : co), positions = wide > l->out_width ? wide : l->out_width;
    float *ring = NAME(take)(&scratch, floats(k * wide, ld));
    float *filtered = NAME(take)(&scratch, floats(positions, ldf));
    float *in = NAME(take)(&scratch, floats(positions, padded(ci * l->rank)));
    float *room = NAME(take)(&scratch, floats(positions, padded(co * l->rank)));
    float *mixed = NAME(take)(&scratch, floats(positions, padded(co)));
    memset(ring, 0, sizeof(float) * floats(k * wide, ld)); /* the borders stay so */
    int ready = first * l->stride - l->padding;
    for (int o = first; o < last; o++) {
        const float *rows[MOST_K], *shifted[MOST_K];
        for (int dy = 0; dy < k; dy++) {
            int i = o * l->stride - l->padding + dy;
            float *slot = ring + floats((i + k) % k * wide, ld), *to = slot + floats(l->padding, ld);
            rows[dy] = i < 0 || i >= l->height ? NULL : slot;
            if (!rows[dy] || i < ready) continue;
            const float *from = x + floats(i * l->width, ci);
            if (l->planar_first)
                NAME(spread)(from, ci, to, ld, ci, l->width);
            else {
                int ldi = ci;
                const float *entered = NAME(enter)(l, p.basis_back, from, &ldi, 1, l->in_channels, in, l->width);
                NAME(mix)(l, &p, 0, entered, ldi, l->rank, l->out_channels, room, to, ld, l->width);
            }
            ready = i + 1;
        }
        for (int r = 0; r < l->rank; r++) {
            const float *d = p.planar + (size_t)r * k * k * ROUNDED(c);
            for (int dy = 0; dy < k; dy++) shifted[dy] = rows[dy] && !l->planar_first ? rows[dy] + r * co : rows[dy];
            float *to = l->planar_first ? filtered + r * ci : filtered;
            NAME(planar)(shifted, ld, l->stride, d, k, c, to, ldf, l->out_width, !l->planar_first && r);
        }
        const float *result = filtered;
        if (l->planar_first) {
            int ldi = ldf;
            const float *entered = NAME(enter)(l, p.basis_back, filtered, &ldi, l->rank, l->in_channels, in, l->out_width);
            NAME(mix)(l, &p, 0, entered, ldi, 1, l->out_channels, room, mixed, padded(co), l->out_width);
            result = mixed;
        }
        size_t at = floats(o * l->out_width, co);
        NAME(finish)(result, padded(co), p.bias, more ? more + at : NULL, relu, y + at, co, l->out_width);
    }
}

/* One image: gx, and added to gw and gd, if that is not NULL. The planar adjoint is a convolution, with the kernels turned by a half, of the
 * gradients with stride - 1 zeros between them and k - 1 - padding around. gd is turned by a half in `gc`. */
TARGET static void NAME(backward)(const struct layer *l, const float *x, const float *gy, float *gx, float *gw, float *gd,
                                  float *scratch)
{
    const struct parts p = parts_of(l, V);
    int k = l->k, stride = l->stride, border = k - 1 - l->padding, wide = l->width + k - 1, ci = l->order * l->in_channels,
        co = l->order * l->out_channels, c = l->planar_first ? ci : co, rank = l->rank;
    int kept = l->planar_first ? ci * rank : co, ld = padded(kept);
    int ldi = padded(l->planar_first ? ci * rank : ci), ldo = padded(l->planar_first ? co : co * rank);
    int positions = wide > l->out_width ? wide : l->out_width, around = l->width + 2 * l->padding;
    size_t planes = (size_t)k * k * ROUNDED(c);
    float *ring = NAME(take)(&scratch, floats(k * wide, ld));
    int batch = batch_of(l), most = positions * batch, longer = ldi > ldo ? ldi : ldo;
    float *ins = NAME(take)(&scratch, floats(most, ldi)), *outs = NAME(take)(&scratch, floats(most, ldo));
    float *room = NAME(take)(&scratch, floats(positions, longer));
    float *mades = NAME(take)(&scratch, floats(most, longer)), *backs = NAME(take)(&scratch, floats(most, longer));
    float *image = NULL; /* with its borders left and right */
    if (l->planar_first) {
        size_t size = floats(l->height * around, padded(ci));
        image = NAME(take)(&scratch, size);
        memset(image, 0, sizeof(float) * size);
        for (int i = 0; i < l->height; i++)
            NAME(spread)(x + floats(i * l->width, ci), ci, image + floats(i * around + l->padding, padded(ci)),
                         padded(ci), ci, l->width);
    }
    memset(ring, 0, sizeof(float) * floats(k * wide, ld)); /* what lies between and around stays so */
    int ready = 0;
    for (int i = 0; i < l->height; i++) {
        const float *rows[MOST_K], *shifted[MOST_K];
        for (int dy = 0; dy < k; dy++) {
            int q = i + dy - border, o = q / stride;
            rows[dy] = q < 0 || q % stride || o >= l->out_height ? NULL : ring + floats(o % k * wide, ld);
            if (!rows[dy] || o < ready) continue;
            ready = o + 1;
            const float *from = gy + floats(o * l->out_width, co);
            float *to = ring + floats(o % k * wide + border, ld);
            if (!l->planar_first) {
                NAME(spread)(from, co, to, (size_t)stride * ld, co, l->out_width);
                continue;
            }
            const float *above[MOST_K];
            for (int t = 0; t < k; t++) {
                int at = o * stride - l->padding + t;
                above[t] = at < 0 || at >= l->height ? NULL : image + floats(at * around, padded(ci));
            }
            int lde = co, ldf = ldi, slot = o % batch * l->out_width;
            float *in = ins + floats(slot, ldi), *out = outs + floats(slot, ldo), *made = mades + floats(slot, ldi);
            float *back = backs;
            const float *entered = NAME(enter)(l, p.basis_back, from, &lde, 1, l->out_channels, out, l->out_width);
            if (entered == from) { /* whose last row has no room for vectors behind it */
                NAME(spread)(from, co, out, ldo, co, l->out_width);
                entered = out, lde = ldo;
            }
            NAME(mix)(l, &p, 1, entered, lde, rank, l->in_channels, room, back, ldi, l->out_width);
            NAME(spread)(back, ldi, to, (size_t)stride * ld, kept, l->out_width);
            for (int r = 0; r < rank; r++) {
                NAME(planar)(above, padded(ci), stride, p.planar + r * planes, k, ci, made + r * ci, ldi, l->out_width, 0);
                if (gd)
                    NAME(planar_gradient)(above, padded(ci), stride, back + r * ci, ldi, k, ci, gd + r * planes, l->out_width);
            }
            const float *filtered = NAME(enter)(l, p.basis_back, made, &ldf, rank, l->in_channels, in, l->out_width);
            if (slot == (batch - 1) * l->out_width || o == l->out_height - 1)
                NAME(mix_gradient)(l, filtered - floats(slot, ldf), ldf, outs, ldo, gw, slot + l->out_width);
        }
        int slot = i % batch * l->width;
        float *in = ins + floats(slot, ldi), *out = outs + floats(slot, ldo), *made = mades;
        float *back = backs + (l->planar_first ? 0 : floats(slot, ldo));
        for (int r = 0; r < rank; r++) {
            for (int dy = 0; dy < k; dy++) shifted[dy] = rows[dy] && l->planar_first ? rows[dy] + r * ci : rows[dy];
            float *to = l->planar_first ? back : back + r * co;
            NAME(planar)(shifted, ld, 1, p.planar_back + r * planes, k, c, to, l->planar_first ? ldi : ldo, l->width,
                         l->planar_first && r);
        }
        const float *result = back;
        if (!l->planar_first) {
            int lde = ci, ldg = ldo;
            const float *from = x + floats(i * l->width, ci);
            const float *entered = NAME(enter)(l, p.basis_back, from, &lde, 1, l->in_channels, in, l->width);
            NAME(mix)(l, &p, 0, entered, lde, rank, l->out_channels, room, made, ldo, l->width);
            for (int r = 0; r < rank && gd; r++)
                NAME(planar_gradient)(rows, ld, 1, made + r * co, ldo, k, co, gd + r * planes, l->width);
            const float *gradient = NAME(enter)(l, p.basis_back, back, &ldg, rank, l->out_channels, out, l->width);
            if (slot == (batch - 1) * l->width || i == l->height - 1)
                NAME(mix_gradient)(l, entered - floats(slot, lde), lde, gradient - floats(slot, ldg), ldg, gw,
                                   slot + l->width);
            NAME(mix)(l, &p, 1, gradient, ldg, 1, l->in_channels, room, made, ldi, l->width);
            result = made;
        }
        NAME(finish)(result, ldi, NULL, NULL, 0, gx + floats(i * l->width, ci), ci, l->width);
    }
}

#undef vec
#undef ROUNDED
#undef NAME
#undef TARGET
#undef V
#undef TALL
#undef MASKED

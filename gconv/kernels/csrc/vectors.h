/* What over_channels.h and over_pixels.h have in common, for one instruction set. Before it is included, these are defined:
 * NAME(x), the name of x for this instruction set; TARGET, the attribute of its functions; V, the number of floats of a
 * vector; REGISTERS, the number of vectors that fit its registers; WIDE, the most vectors in a row of a tile of a matrix
 * product; and, where it has them, LOAD_MASKED and STORE_MASKED, which load and store part of a vector. */

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
#ifdef LOAD_MASKED
    return (vec)LOAD_MASKED((1u << n) - 1, from);
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
#ifdef STORE_MASKED
    STORE_MASKED(to, (1u << n) - 1, value);
#else
    for (int i = 0; i < n; i++) to[i] = value[i];
#endif
}

/* Stores values of the output, which begins at end->y, from column `column` on: with bias, residual map and ReLU, as asked. */
INLINE TARGET void NAME(finished)(float *to, vec value, int column, int n, const struct ending *end)
{
    if (end->bias) value += NAME(load_part)(end->bias + column, n);
    if (end->residual) value += NAME(load_part)(end->residual + (to - end->y), n);
    if (end->relu) value = (vec)(~(value < 0) & (NAME(ints))value); /* NaN stays NaN */
    NAME(store_part)(to, value, n);
}

/* c[i][:n] = or += sum over t < depth of a[i across + t along] b[t][:n], for i < rows and n up to cols vectors.
 * A vector of b is `next` values from the one before, a row `below` values from the one above. If `end` is given, c is
 * the output from its column `column` on. Unless `tight`, the last vector of a row is written as a whole, over up to
 * V - 1 values behind c[i][n - 1]. */
INLINE TARGET void NAME(tile)(const float *a, int across, int along, const float *b, size_t below, size_t next,
                              int depth, float *c, int ldc, int n, int add, int tight, int column,
                              const struct ending *end, const int rows, const int cols)
{
    vec sums[8][WIDE];
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < cols; j++) sums[i][j] = (vec){0};
    for (int t = 0; t < depth; t++) {
        vec w[WIDE];
        UNROLLED for (int j = 0; j < cols; j++) w[j] = NAME(load)(b + t * below + j * next);
        UNROLLED for (int i = 0; i < rows; i++) {
            float value = a[(size_t)i * across + (size_t)t * along];
            UNROLLED for (int j = 0; j < cols; j++) sums[i][j] += value * w[j];
        }
    }
    if (!end && (!tight || n >= cols * V)) {
        UNROLLED for (int i = 0; i < rows; i++)
            UNROLLED for (int j = 0; j < cols; j++) {
                float *to = c + (size_t)i * ldc + j * V;
                NAME(store)(to, add ? sums[i][j] + NAME(load)(to) : sums[i][j]);
            }
        return;
    }
    vec kept[8][WIDE]; /* a copy in memory, so that the sums themselves can stay in registers */
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < cols; j++) kept[i][j] = sums[i][j];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) {
            float *to = c + (size_t)i * ldc + j * V;
            vec value = add ? kept[i][j] + NAME(load_part)(to, n - j * V) : kept[i][j];
            if (end) NAME(finished)(to, value, column + j * V, n - j * V, end);
            else NAME(store_part)(to, value, n - j * V);
        }
}

/* The same for any number of rows: tiles as tall as the registers allow, and one for the rows that are left. */
INLINE TARGET void NAME(strip)(const float *a, int across, int along, const float *b, size_t below, size_t next,
                               int depth, float *c, int ldc, int n, int add, int tight, int column,
                               const struct ending *end, int rows, const int cols)
{
    const int most = (REGISTERS - 1 - cols) / cols, tall = most < 8 ? most : 8;
    while (rows) {
#define TILE(R)                                                                                                        \
    case R:                                                                                                            \
        if (R <= tall)                                                                                                 \
            NAME(tile)(a, across, along, b, below, next, depth, c, ldc, n, add, tight, column, end, R, cols);          \
        break
        int some = rows < tall ? rows : tall;
        switch (some) {
            TILE(1);
            TILE(2);
            TILE(3);
            TILE(4);
            TILE(5);
            TILE(6);
            TILE(7);
            TILE(8);
        }
#undef TILE
        a += (size_t)some * across, c += (size_t)some * ldc, rows -= some;
    }
}

/* The same for any number of rows and any n. */
TARGET static void NAME(product)(const float *a, int across, int along, const float *b, size_t below, size_t next,
                                 int depth, float *c, int ldc, int n, int add, int tight, const struct ending *end,
                                 int rows)
{
    int column = 0;
    while (n > 0) {
        int left = (n + V - 1) / V, cols = left <= WIDE ? left : left < 2 * WIDE ? (left + 1) / 2 : WIDE;
#define STRIP(C)                                                                                                       \
    case C:                                                                                                            \
        if (C <= WIDE)                                                                                                 \
            NAME(strip)(a, across, along, b, below, next, depth, c, ldc, n, add, tight, column, end, rows, C);         \
        break
        switch (cols) {
            STRIP(1);
            STRIP(2);
            STRIP(3);
            STRIP(4);
            STRIP(5);
        }
#undef STRIP
        b += cols * next, c += cols * V, n -= cols * V, column += cols * V;
    }
}

/* The gradient of the bias: gb[:c] += sum over positions of x. */
INLINE TARGET void NAME(add_up)(const float *x, int c, int positions, float *gb)
{
    for (int j = 0; j < c; j += V) {
        vec sums[4] = {NAME(load)(gb + j)}; /* four, so that they do not wait for each other */
        int p = 0;
        for (; p + 4 <= positions; p += 4)
            UNROLLED for (int n = 0; n < 4; n++) sums[n] += NAME(load_part)(x + floats(p + n, c) + j, c - j);
        for (; p < positions; p++) sums[0] += NAME(load_part)(x + floats(p, c) + j, c - j);
        NAME(store)(gb + j, sums[0] + sums[1] + (sums[2] + sums[3]));
    }
}

/* The loops of batch_norm.c over n positions of c values each, for one instruction set: NAME(x) is the name of x there, and
 * TARGET the attribute of its functions. The compiler makes vectors of the loops. */

TARGET static void NAME(apply)(size_t n, int c, const float *restrict x, const float *restrict factor,
                               const float *restrict offset, int relu, float *restrict y)
{
    for (size_t p = 0; p < n; p++, x += c, y += c)
        if (relu)
            for (int i = 0; i < c; i++) {
                float value = factor[i] * x[i] + offset[i];
                y[i] = value < 0 ? 0 : value; /* NaN stays NaN */
            }
        else
            for (int i = 0; i < c; i++) y[i] = factor[i] * x[i] + offset[i];
}

/* Sums of the gradient g and of g (x - mean); where y is given, only of the values that ReLU let pass. */
TARGET static void NAME(add_up)(size_t n, int c, const float *restrict g, const float *restrict x, const float *restrict y,
                                const float *restrict mean, float *restrict first, float *restrict second)
{
    for (size_t p = 0; p < n; p++, x += c, g += c) {
        if (y) {
            for (int i = 0; i < c; i++) {
                float value = y[i] <= 0 ? 0 : g[i];
                first[i] += value;
                second[i] += value * (x[i] - mean[i]);
            }
            y += c;
        } else
            for (int i = 0; i < c; i++) {
                first[i] += g[i];
                second[i] += g[i] * (x[i] - mean[i]);
            }
    }
}

/* dx = factor g + slope x + offset; where y is given, g is zero for the values that ReLU did not let pass. */
TARGET static void NAME(line)(size_t n, int c, const float *restrict g, const float *restrict x, const float *restrict y,
                              const float *restrict factor, const float *restrict slope, const float *restrict offset,
                              float *restrict dx)
{
    for (size_t p = 0; p < n; p++, x += c, g += c, dx += c) {
        if (y) {
            for (int i = 0; i < c; i++) dx[i] = (y[i] <= 0 ? 0 : g[i]) * factor[i] + x[i] * slope[i] + offset[i];
            y += c;
        } else
            for (int i = 0; i < c; i++) dx[i] = g[i] * factor[i] + x[i] * slope[i] + offset[i];
    }
}

/* Sums of x - shift and of its square. */
TARGET static void NAME(add_up_squares)(size_t n, int c, const float *restrict x, const float *restrict shift,
                                        float *restrict first, float *restrict second)
{
    for (size_t p = 0; p < n; p++, x += c)
        for (int i = 0; i < c; i++) {
            float value = x[i] - shift[i];
            first[i] += value;
            second[i] += value * value;
        }
}

#undef NAME
#undef TARGET

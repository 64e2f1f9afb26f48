/* The parameters of a layer in the layout that its kernels read, and their gradients back in the layer's own. */

#include <stdlib.h>
#include <string.h>

#include "layer.h"
#include "versions.h"
#include "workers.h"

struct parts parts_of(const struct layer *l, int lanes, const float *packed)
{
    size_t kernels = spatial_floats(l, lanes);
    struct parts p;
    p.weights = packed;
    p.weights_back = p.weights + l->weights;
    p.spatial = p.weights_back + l->weights_back;
    p.spatial_back = p.spatial + kernels;
    p.bias = l->biased ? p.spatial_back + kernels : NULL;
    p.rows = 0;
    for (int i = 0; i < l->order; i++)
        for (int j = 0; j < l->order; j++)
            p.basis[i * l->order + j] = p.basis_back[j * l->order + i] = l->basis[i * l->order + j];
    return p;
}

/* Where the S entries of a mix begin: `gc` has [O][R][I][S], `gc_in` [I][R][O][S]. */
static inline size_t mix_at(const struct layer *l, int term, int o, int i)
{
    size_t first = l->spatial_first ? i : o, second = l->spatial_first ? o : i;
    return ((first * l->rank + term) * (l->spatial_first ? l->out_channels : l->in_channels) + second) * l->order;
}

/* Splits one term of a mix into its S matrices [O][I] in `apart`, and makes from these the matrices of the products. */
static void pack_term(const struct layer *l, float *weights, float *weights_back, int lanes, int term, const float *mix,
                      float *apart, float *matrix)
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
        float *w = weights + t[PACKED], *back = weights_back + t[PACKED_BACK];
        for (int j = 0; j < columns; j += lanes)
            for (int e = 0; e < depth; e++)
                for (int n = j; n < j + lanes; n++) *w++ = n < columns ? matrix[(size_t)n * depth + e] : 0;
        for (int e = 0; e < depth; e += lanes)
            for (int j = 0; j < columns; j++)
                for (int n = e; n < e + lanes; n++) *back++ = n < depth ? matrix[(size_t)j * depth + n] : 0;
    }
}

/* The inverse for gradients: from those of the packed matrices, each [DEPTH][COLUMNS], the gradient of one term. */
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

/* The terms of a mix, shared among workers: packed if `weights` is given, else unpacked from `sums`. */
struct terms {
    const struct layer *l;
    int lanes, workers, failed;
    const float *mix, *sums;
    float *weights, *weights_back, *gradient;
};

static void work_on_terms(void *context, int number)
{
    struct terms *t = context;
    const struct layer *l = t->l;
    size_t pairs = (size_t)l->order * l->in_channels * l->out_channels;
    int first = share(l->rank, number, t->workers), last = share(l->rank, number + 1, t->workers);
    float *room = malloc(sizeof(float) * pairs * (t->weights ? 1 + l->order : 1));
    if (!room) {
        __atomic_store_n(&t->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int term = first; term < last; term++)
        if (t->weights) pack_term(l, t->weights, t->weights_back, t->lanes, term, t->mix, room, room + pairs);
        else unpack_term(l, t->lanes, term, t->sums, room, t->gradient);
    free(room);
}

static int run_terms(struct terms *t, int threads)
{
    t->workers = smaller(workers_for(threads, 4.0 * t->l->weights), t->l->rank);
    run_workers(t->workers, work_on_terms, t);
    return t->failed;
}

int unpack_mix(const struct layer *l, int lanes, int threads, const float *sums, float *mix)
{
    struct terms t = {.l = l, .lanes = lanes, .sums = sums, .gradient = mix};
    return run_terms(&t, threads);
}

/* The parameters in the layout that the kernels read: mix as above, spatial [C][R][k k] with C the channels of the
 * spatial kernels (not read for a full filter), and bias [O]. Returns 0, or 1 if there is no memory. */
EXPORT int gconv_pack(int version, const struct layer *l, int threads, const float *mix, const float *spatial,
                      const float *bias, float *packed)
{
    int lanes = versions[version].lanes, kk = l->k * l->k, s = l->order, outs = l->out_channels;
    int each = spatial_channels(l) / s, row = rounded(spatial_channels(l), lanes);
    float *weights_back = packed + l->weights, *kernels = weights_back + l->weights_back;
    float *flipped = kernels + spatial_floats(l, lanes), *biases = flipped + spatial_floats(l, lanes);
    struct terms t = {.l = l, .lanes = lanes, .mix = mix, .weights = packed, .weights_back = weights_back};
    if (run_terms(&t, threads)) return 1;
    for (int r = 0; r < l->rank && !l->whole; r++)
        for (int y = 0; y < kk; y++) {
            float *to = kernels + (size_t)(r * kk + y) * row;
            float *back = flipped + (size_t)(r * kk + kk - 1 - y) * row;
            for (int n = 0; n < s; n++)
                for (int c = 0; c < each; c++)
                    to[n * each + c] = back[n * each + c] = spatial[(c * l->rank + r) * kk + l->pixels[n * kk + y]];
            for (int c = s * each; c < row; c++) to[c] = back[c] = 0;
        }
    for (int n = 0; l->biased && n < rounded(s * outs, lanes); n++) biases[n] = n < s * outs ? bias[n % outs] : 0;
    return 0;
}

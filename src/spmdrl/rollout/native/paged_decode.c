/* Attention of single queries over a paged key-value cache of float32, for one shape of it.
 *
 * Defined by the compiler's command line: HEAD_DIM, GROUP (query heads per key-value head), BLOCK
 * (tokens of a cache block); HEAD_DIM and BLOCK are multiples of 4. Strides count floats.
 *
 * Keys are transposed: a vector has one dim of neighbouring tokens, so that scores need no sums
 * across lanes. Softmax is computed online (Milakov & Gimelshein 2018, arXiv 1805.02867): keys and
 * values are read once, block by block. A sequence's result depends only on that sequence.
 */
#if HEAD_DIM % 16 == 0 && BLOCK % 16 == 0
#define DIVISOR 16
#elif HEAD_DIM % 8 == 0 && BLOCK % 8 == 0
#define DIVISOR 8
#else
#define DIVISOR 4
#endif
#include "vectors.h"

/* Query heads, and vectors of each, whose sums are kept in registers together. */
#define TILE 3
#define SPAN_OF(width) ((width) % (4 * LANES) == 0 ? 4 : (width) % (2 * LANES) == 0 ? 2 : 1)
enum { KEY_SPAN = SPAN_OF(BLOCK), VALUE_SPAN = SPAN_OF(HEAD_DIM) };
#define INLINE static inline __attribute__((always_inline))

/* k, v [tokens, kv_heads, HEAD_DIM], heads side by side -> `cells` [tokens] of the cache, of which
 * each block has BLOCK: keys [blocks, kv_heads, HEAD_DIM, BLOCK], values [blocks, kv_heads, BLOCK, HEAD_DIM] */
void store_tokens(const float *k, int64_t k_stride, const float *v, int64_t v_stride,
                  const int64_t *cells, int64_t tokens, int64_t kv_heads, float *keys,
                  float *values) {
    for (int64_t i = 0; i < tokens; i++) {
        const int64_t block = cells[i] / BLOCK, place = cells[i] % BLOCK;
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t unit = (block * kv_heads + h) * HEAD_DIM * BLOCK;
            const float *from = k + i * k_stride + h * HEAD_DIM;
            float *to = keys + unit + place;
            for (int d = 0; d < HEAD_DIM; d++)
                to[d * BLOCK] = from[d];
            memcpy(values + unit + place * HEAD_DIM, v + i * v_stride + h * HEAD_DIM,
                   HEAD_DIM * sizeof(float));
        }
    }
}

INLINE void scores_of(int heads, const float *query, const float *keys, float scale,
                      float scores[][BLOCK]) {
    for (int start = 0; start < BLOCK; start += KEY_SPAN * LANES) {
        vec sums[TILE][KEY_SPAN] = {0};
        for (int d = 0; d < HEAD_DIM; d++)
            for (int p = 0; p < KEY_SPAN; p++) {
                const vec key = load(keys + d * BLOCK + start + p * LANES);
                for (int g = 0; g < heads; g++)
                    sums[g][p] += query[g * HEAD_DIM + d] * key;
            }
        for (int g = 0; g < heads; g++)
            for (int p = 0; p < KEY_SPAN; p++)
                store(scores[g] + start + p * LANES, sums[g][p] * scale);
    }
}

/* tanh: where e^2x would cancel the Taylor polynomial, whose error is 1e-8 there */
INLINE vec tanh_of(vec x) {
    const vec square = x * x, far = 1.0f - 2.0f / (exp_of(x + x) + 1.0f);
    vec p = square * (62.0f / 2835.0f) - 17.0f / 315.0f;
    p = p * square + 2.0f / 15.0f;
    p = p * square - 1.0f / 3.0f;
    const vec near = x + x * square * p;
    const ivec mask = square < 0.0625f;
    return (vec)((mask & (ivec)near) | (~mask & (ivec)far));
}

/* Scores s of a block -> softcap * tanh(s / softcap) */
INLINE void cap(float softcap, float *scores) {
    for (int j = 0; j < BLOCK; j += LANES)
        store(scores + j, tanh_of(load(scores + j) / softcap) * softcap);
}

INLINE void add_values(int heads, int hidden, int held, float weights[][BLOCK], const float *values,
                       float out[][HEAD_DIM]) {
    for (int start = 0; start < HEAD_DIM; start += VALUE_SPAN * LANES) {
        vec sums[TILE][VALUE_SPAN];
        for (int g = 0; g < heads; g++)
            for (int p = 0; p < VALUE_SPAN; p++)
                sums[g][p] = load(out[g] + start + p * LANES);
        for (int j = hidden; j < held; j++)
            for (int p = 0; p < VALUE_SPAN; p++) {
                const vec value = load(values + j * HEAD_DIM + start + p * LANES);
                for (int g = 0; g < heads; g++)
                    sums[g][p] += weights[g][j] * value;
            }
        for (int g = 0; g < heads; g++)
            for (int p = 0; p < VALUE_SPAN; p++)
                store(out[g] + start + p * LANES, sums[g][p]);
    }
}

/* Scores of a block -> weights e^(score - top), with `top`, `total` and `out` brought up to it;
 * places [hidden, held) are seen. */
INLINE void weigh(int hidden, int held, float *scores, float *top, float *total, float *out) {
    for (int j = 0; j < hidden; j++)
        scores[j] = -INFINITY;
    for (int j = held; j < BLOCK; j++)
        scores[j] = -INFINITY;
    vec most_yet = load(scores);
    for (int j = LANES; j < BLOCK; j += LANES)
        most_yet = most(most_yet, load(scores + j));
    const float block_top = max_of(most_yet);
    if (block_top > *top) {
        const float shrink = *top == -INFINITY ? 0.0f : exp_of(all(*top - block_top))[0];
        *total *= shrink;
        for (int d = 0; d < HEAD_DIM; d += LANES)
            store(out + d, load(out + d) * shrink);
        *top = block_top;
    }
    vec sum = {0};
    for (int j = 0; j < BLOCK; j += LANES) {
        const vec weight = exp_of(load(scores + j) - *top);
        store(scores + j, weight);
        sum += weight;
    }
    /* Each place that is not seen adds e^-87, which is lost in float32. */
    *total += sum_of(sum);
}

/* q [n, kv_heads * GROUP, HEAD_DIM], heads side by side -> out likewise; table [n, width] has the
 * blocks of each sequence, positions [n] the place of its last token.
 *
 * A query sees the last `window` tokens (0: all); scores are capped at `softcap` (0: not); `sinks`
 * [kv_heads * GROUP] (or NULL) are scores of a key whose value is zero. */
void paged_decode(const float *q, int64_t q_stride, const float *keys, const float *values,
                  const int32_t *table, int64_t width, const int64_t *positions, int64_t n,
                  int64_t kv_heads, float scale, int64_t window, float softcap, const float *sinks,
                  float *result, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < kv_heads; h++) {
            const float *query = q + i * q_stride + h * GROUP * HEAD_DIM;
            float out[GROUP][HEAD_DIM] = {0}, scores[GROUP][BLOCK], top[GROUP], total[GROUP];
            for (int g = 0; g < GROUP; g++) {
                top[g] = sinks ? sinks[h * GROUP + g] : -INFINITY;
                total[g] = sinks ? 1.0f : 0.0f;
            }
            const int64_t length = positions[i] + 1;
            const int64_t first = window && window < length ? length - window : 0;
            for (int64_t b = first / BLOCK; b * BLOCK < length; b++) {
                const int64_t left = length - b * BLOCK;
                const int held = left < BLOCK ? left : BLOCK;
                const int hidden = first > b * BLOCK ? first - b * BLOCK : 0;
                const int64_t unit = (table[i * width + b] * kv_heads + h) * HEAD_DIM * BLOCK;
                int g = 0;
                for (; g + TILE <= GROUP; g += TILE)
                    scores_of(TILE, query + g * HEAD_DIM, keys + unit, scale, scores + g);
                for (; g < GROUP; g++)
                    scores_of(1, query + g * HEAD_DIM, keys + unit, scale, scores + g);
                if (softcap > 0)
                    for (g = 0; g < GROUP; g++)
                        cap(softcap, scores[g]);
                for (g = 0; g < GROUP; g++)
                    weigh(hidden, held, scores[g], top + g, total + g, out[g]);
                for (g = 0; g + TILE <= GROUP; g += TILE)
                    add_values(TILE, hidden, held, scores + g, values + unit, out + g);
                for (; g < GROUP; g++)
                    add_values(1, hidden, held, scores + g, values + unit, out + g);
            }
            float *to = result + (i * kv_heads + h) * GROUP * HEAD_DIM;
            for (int g = 0; g < GROUP; g++)
                for (int d = 0; d < HEAD_DIM; d++)
                    to[g * HEAD_DIM + d] = out[g][d] / total[g];
        }
}

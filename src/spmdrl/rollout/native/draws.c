/* Drawing of tokens on a CPU: what is left of `Sampler` without softmax and logarithms, which are
 * torch's. Sums, products and quotients here are torch's to the bit.
 *
 * Defined by the compiler's command line: MULTIPLIER, the noise's last factor.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define CHUNK 256

/* hashes [width], keys [rows] -> -u [rows, width], of which exponential noise is -log1p */
void uniform_noise(const int32_t *hashes, const int64_t *keys, int64_t rows, int64_t width,
                   float *out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const uint32_t low = (uint32_t)keys[r];
        const uint32_t high = (uint32_t)((uint64_t)keys[r] >> 32) | 1;
        float *to = out + r * width;
        for (int64_t i = 0; i < width; i++) {
            uint32_t x = ((uint32_t)hashes[i] ^ low) * high;
            x = (x + (uint32_t)((int32_t)x >> 15)) * (uint32_t)MULTIPLIER;
            to[i] = fabsf((float)(int32_t)x) * -0x1p-31f;
        }
    }
}

/* Scores are not negative, so that their bits are ordered as they are; NaN is above all. */
static inline int32_t ordered(float score) {
    int32_t bits;
    memcpy(&bits, &score, sizeof bits);
    return bits & 0x7fffffff;
}

static inline float score_of(int32_t bits) {
    float score;
    memcpy(&score, &bits, sizeof score);
    return score;
}

/* probabilities, logs [rows, width] -> the first of the best scores, its probability, and the best
 * two scores (or NULL); a score is the probability over -log, which is kept within two bounds. */
void best_scores(const float *probabilities, const float *logs, int64_t rows, int64_t width,
                 float least, float most, int64_t *tokens, float *chosen, float *leads,
                 int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float *p = probabilities + r * width, *l = logs + r * width;
        int32_t best = -1, second = -1, scores[CHUNK];
        int64_t token = 0;
        for (int64_t start = 0; start < width; start += CHUNK) {
            const int count = width - start < CHUNK ? (int)(width - start) : CHUNK;
            int32_t highest = -1;
            for (int i = 0; i < count; i++) {
                float noise = -l[start + i];
                noise = noise < least ? least : noise;
                noise = noise > most ? most : noise;
                scores[i] = ordered(p[start + i] / noise);
                highest = scores[i] > highest ? scores[i] : highest;
            }
            if (highest <= best) {
                second = highest > second ? highest : second;
                continue;
            }
            int place = 0;
            while (scores[place] != highest)
                place++;
            second = best;
            if (leads)
                for (int i = 0; i < count; i++)
                    second = i != place && scores[i] > second ? scores[i] : second;
            best = highest;
            token = start + place;
        }
        tokens[r] = token;
        chosen[r] = p[token];
        if (leads) {
            leads[2 * r] = score_of(best);
            leads[2 * r + 1] = score_of(second < 0 ? 0 : second);
        }
    }
}

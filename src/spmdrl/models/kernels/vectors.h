/* Vectors of float32 by gcc's and clang's extension of C, as wide as the processor's registers.
 *
 * A source may define DIVISOR before it includes this: LANES then divides it.
 */
#ifndef SPMDRL_VECTORS_H
#define SPMDRL_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef DIVISOR
#define DIVISOR 16
#endif

#if defined(__AVX512F__) && DIVISOR % 16 == 0
#define LANES 16
#elif defined(__AVX__) && DIVISOR % 8 == 0
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef vec loose __attribute__((aligned(4)));

static inline vec load(const float *p) { return *(const loose *)p; }

static inline void store(float *p, vec v) { *(loose *)p = v; }

static inline vec all(float x) { return (vec){0} + x; }

/* Where either is NaN, `b`. */
static inline vec least(vec a, vec b) {
    const ivec mask = a < b;
    return (vec)((mask & (ivec)a) | (~mask & (ivec)b));
}

static inline vec most(vec a, vec b) {
    const ivec mask = a > b;
    return (vec)((mask & (ivec)a) | (~mask & (ivec)b));
}

static inline float sum_of(vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += v[i];
    return sum;
}

static inline float max_of(vec v) {
    float max = v[0];
    for (int i = 1; i < LANES; i++)
        max = v[i] > max ? v[i] : max;
    return max;
}

/* e^x to a unit in the last place between -87 and 88, and the ends' values beyond; NaN stays.
 *
 * x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts, so that r is exact), e^x = 2^n e^r, and
 * e^r = 1 + r + r^2 p(r) with the minimax polynomial of Cephes (Moshier 1992, expf).
 */
static inline vec exp_of(vec x) {
    x = least(all(88.0f), most(all(-87.0f), x));
    /* 1.5 * 2^23: a number added to it is rounded, and is in its lowest bits */
    const vec rounder = all(12582912.0f), shifted = x * 1.44269504f + rounder;
    const vec n = shifted - rounder;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (vec)(((uvec)shifted + 127) << 23);
}

#endif

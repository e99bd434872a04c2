/* Norm, SwiGLU and rotary embedding over the rows of float32 matrices, each in one pass.
 *
 * Strides count floats. A row's result depends only on that row.
 */
#include "vectors.h"

/* Values below which one thread is done before others have woken. */
#define FEW 65536

/* x [rows, width] -> x / sqrt(mean(x^2) + eps) * weight */
void rms_norm(const float *x, int64_t stride, const float *weight, float eps, int64_t rows,
              int64_t width, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > FEW)
    for (int64_t i = 0; i < rows; i++) {
        const float *in = x + i * stride;
        float *to = out + i * width;
        vec first = {0}, second = {0};
        int64_t j = 0;
        for (; j + 2 * LANES <= width; j += 2 * LANES) {
            const vec a = load(in + j), b = load(in + j + LANES);
            first += a * a;
            second += b * b;
        }
        float square = sum_of(first + second);
        for (; j < width; j++)
            square += in[j] * in[j];
        const float scale = 1.0f / sqrtf(square / width + eps);
        for (j = 0; j + LANES <= width; j += LANES)
            store(to + j, load(in + j) * scale * load(weight + j));
        for (; j < width; j++)
            to[j] = in[j] * scale * weight[j];
    }
}

/* x [rows, 2 width], gate and up side by side -> silu(gate) * up [rows, width] */
void swiglu(const float *x, int64_t rows, int64_t width, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > FEW / 2)
    for (int64_t i = 0; i < rows; i++) {
        const float *gate = x + i * 2 * width, *up = gate + width;
        float *to = out + i * width;
        int64_t j = 0;
        for (; j + LANES <= width; j += LANES) {
            const vec a = load(gate + j);
            store(to + j, a / (1.0f + exp_of(-a)) * load(up + j));
        }
        for (; j < width; j++)
            to[j] = gate[j] / (1.0f + expf(-gate[j])) * up[j];
    }
}

/* x [rows, heads, d], heads side by side -> x cos + swap(x) sin in the first `turned` dims of each
 * head, x in the rest; cos and sin [rows, turned]. If interleaved, the pairs are neighbours in x and
 * half of `turned` apart in the result. */
void rotate(const float *x, int64_t stride, const float *cos, const float *sin, int64_t rows,
            int64_t heads, int64_t d, int64_t turned, int interleaved, float *out, int threads) {
    const int64_t half = turned / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * heads * d > FEW)
    for (int64_t i = 0; i < rows; i++) {
        const float *c = cos + i * turned, *s = sin + i * turned;
        for (int64_t h = 0; h < heads; h++) {
            const float *low = x + i * stride + h * d, *high = low + half;
            float *to = out + (i * heads + h) * d;
            if (interleaved)
                for (int64_t j = 0; j < half; j++) {
                    const float a = low[2 * j], b = low[2 * j + 1];
                    to[j] = a * c[j] + b * s[j];
                    to[j + half] = b * c[j + half] + a * s[j + half];
                }
            else
                for (int64_t j = 0; j < half; j++) {
                    to[j] = low[j] * c[j] + high[j] * s[j];
                    to[j + half] = high[j] * c[j + half] + low[j] * s[j + half];
                }
            for (int64_t j = turned; j < d; j++)
                to[j] = low[j];
        }
    }
}

/* x W^T of float32 for few to many rows x, with W laid out in panels. A tile is 4 rows by 3 vectors:
 * it fills the 16 registers of AVX2, and keeps the multipliers of AVX-512 as busy as larger ones do.
 *
 * A panel is WIDTH rows of W, side by side for each column: [K, WIDTH]. A panel fits a core's
 * second-level cache up to some 4000 columns and is used for all rows; while it is, the next one is
 * fetched from memory. (The scheme of Goto & van de Geijn 2008, "Anatomy of high-performance matrix
 * multiplication", without a copy of x: its rows are few.)
 */
#include "vectors.h"

#define ROWS 4
#define PARTS 3
#define WIDTH (PARTS * LANES)
/* Floats of x in one core's second-level cache. */
#define CACHED 65536
/* Steps between two fetches of 64 bytes ahead. */
#define FETCH 4

#if defined(__x86_64__)
/* Otherwise gcc reads it from memory for each row, and loads become the limit, not sums. */
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define IN_REGISTER(v)
#endif

int64_t panel_width(void) { return WIDTH; }

/* w [n, k] -> panels [ceil(n / WIDTH), k, WIDTH], zeros beyond n */
void lay_out(const float *w, int64_t n, int64_t k, float *panels, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < (n + WIDTH - 1) / WIDTH; p++) {
        float *panel = panels + p * k * WIDTH;
        for (int64_t j = 0; j < WIDTH; j++)
            for (int64_t i = 0; i < k; i++)
                panel[i * WIDTH + j] = p * WIDTH + j < n ? w[(p * WIDTH + j) * k + i] : 0.0f;
    }
}

/* ROWS rows of x, by a panel, onto `out`. */
static inline void tile(const float *const x[ROWS], const float *panel, int64_t depth,
                        float *out, int64_t out_stride, const float *ahead) {
    vec sums[ROWS][PARTS];
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < PARTS; v++)
            sums[i][v] = load(out + i * out_stride + v * LANES);
    for (int64_t k = 0; k < depth; k++) {
        vec w[PARTS];
        for (int v = 0; v < PARTS; v++) {
            w[v] = load(panel + k * WIDTH + v * LANES);
            IN_REGISTER(w[v]);
        }
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < PARTS; v++)
                sums[i][v] += x[i][k] * w[v];
        if (k % FETCH == 0)
            __builtin_prefetch(ahead + k / FETCH * 16, 0, 2);
    }
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < PARTS; v++)
            store(out + i * out_stride + v * LANES, sums[i][v]);
}

/* x [m, k], panels of W [n, k], bias [n] or NULL -> out [m, n] */
void product(const float *x, int64_t x_stride, int64_t m, const float *panels, int64_t n, int64_t k,
             const float *bias, float *out, int threads) {
    if (m == 0)
        return;
    const int64_t most = CACHED / k < 32 ? 32 : CACHED / k, num_panels = (n + WIDTH - 1) / WIDTH;
    /* of equal size, since all threads take equally many */
    int64_t num_blocks = (m + most - 1) / most;
    const int64_t block = ((m + num_blocks - 1) / num_blocks + ROWS - 1) / ROWS * ROWS;
    num_blocks = (m + block - 1) / block;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < num_blocks; b++)
        for (int64_t p = 0; p < num_panels; p++) {
            const float *panel = panels + p * k * WIDTH;
            const int64_t column = p * WIDTH, width = n - column < WIDTH ? n - column : WIDTH;
            const int64_t stop = m < (b + 1) * block ? m : (b + 1) * block;
            for (int64_t i = b * block; i < stop; i += ROWS) {
                float sums[ROWS][WIDTH] = {0};
                const float *rows[ROWS];
                const int64_t count = stop - i < ROWS ? stop - i : ROWS;
                for (int r = 0; r < ROWS; r++) {
                    /* the first row replaces a row that does not exist */
                    rows[r] = x + (r < count ? i + r : i) * x_stride;
                    if (bias)
                        memcpy(sums[r], bias + column, width * sizeof(float));
                }
                const float *ahead = panel + k * WIDTH + (i - b * block) / ROWS * (k / FETCH) * 16;
                tile(rows, panel, k, sums[0], WIDTH, ahead);
                for (int64_t r = 0; r < count; r++)
                    memcpy(out + (i + r) * n + column, sums[r], width * sizeof(float));
            }
        }
}

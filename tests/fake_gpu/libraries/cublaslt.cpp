// cuBLASLt: products are counted and named, not computed; see cublas.cpp.
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "stand_in.h"

namespace {

struct Layout { uint64_t rows, columns; };

constexpr size_t HEURISTIC_BYTES = 8 * 8 + 8;  // the algorithm, then workspace size and status

int make(void **object) { return *object = new char, 0; }
int unmake(void *object) { return delete static_cast<char *>(object), 0; }

}  // namespace

extern "C" {

size_t cublasLtGetVersion() { return 130100; }
int cublasLtCreate(void **handle) { return make(handle); }
int cublasLtDestroy(void *handle) { return unmake(handle); }
int cublasLtMatmulDescCreate(void **made, int, int) { return make(made); }
int cublasLtMatmulDescDestroy(void *made) { return unmake(made); }
int cublasLtMatmulDescSetAttribute(void *, int, const void *, size_t) { return 0; }
int cublasLtMatmulPreferenceCreate(void **made) { return make(made); }
int cublasLtMatmulPreferenceDestroy(void *made) { return unmake(made); }
int cublasLtMatmulPreferenceSetAttribute(void *, int, const void *, size_t) { return 0; }

int cublasLtMatrixLayoutCreate(void **made, int, uint64_t rows, uint64_t columns, int64_t) {
  return *made = new Layout{rows, columns}, 0;
}
int cublasLtMatrixLayoutDestroy(void *made) { return delete static_cast<Layout *>(made), 0; }
int cublasLtMatrixLayoutSetAttribute(void *, int, const void *, size_t) { return 0; }

int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int,
                                   void *results, int *count) {
  memset(results, 0, HEURISTIC_BYTES);
  return *count = 1, 0;
}

int cublasLtMatmul(void *, void *, const void *, const void *, const void *a, const void *,
                   const void *b, const void *, const void *, const void *, void *, const void *d,
                   const void *, void *, size_t, void *stream) {
  auto *left = static_cast<const Layout *>(a), *right = static_cast<const Layout *>(b);
  auto *out = static_cast<const Layout *>(d);
  char text[160];
  snprintf(text, sizeof text, "LtMatmul A=%lux%lu B=%lux%lu D=%lux%lu", left->rows, left->columns,
           right->rows, right->columns, out->rows, out->columns);
  fake_launch(FAKE_PRODUCT, stream, text, 0);
  return 0;
}

}  // extern "C"

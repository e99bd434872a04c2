// cuBLAS: products are counted and named, not computed. No header of it is used: only the
// arguments that are counted are declared, and the calling convention ignores the rest.
#include <cstdio>

#include "stand_in.h"

namespace {

struct Handle {
  void *stream = nullptr;
  int math_mode = 0;
};

int product(void *handle, const char *name, int m, int n, int k, int batch = 1) {
  char text[160];
  snprintf(text, sizeof text, "%s m=%d n=%d k=%d batch=%d", name, m, n, k, batch);
  fake_launch(FAKE_PRODUCT, static_cast<Handle *>(handle)->stream, text, 0);
  return 0;
}

}  // namespace

extern "C" {

int cublasCreate_v2(void **handle) { return *handle = new Handle, 0; }
int cublasDestroy_v2(void *handle) { return delete static_cast<Handle *>(handle), 0; }
int cublasSetStream_v2(void *handle, void *stream) {
  static_cast<Handle *>(handle)->stream = stream;
  return 0;
}
int cublasGetStream_v2(void *handle, void **stream) {
  *stream = static_cast<Handle *>(handle)->stream;
  return 0;
}
int cublasSetWorkspace_v2(void *, void *, size_t) { return 0; }
int cublasSetMathMode(void *handle, int mode) {
  static_cast<Handle *>(handle)->math_mode = mode;
  return 0;
}
int cublasGetMathMode(void *handle, int *mode) {
  *mode = static_cast<Handle *>(handle)->math_mode;
  return 0;
}
int cublasSetPointerMode_v2(void *, int) { return 0; }
int cublasGetPointerMode_v2(void *, int *mode) { return *mode = 0, 0; }

int cublasGemmEx(void *handle, int, int, int m, int n, int k, ...) {
  return product(handle, "GemmEx", m, n, k);
}
int cublasSgemmEx(void *handle, int, int, int m, int n, int k, ...) {
  return product(handle, "SgemmEx", m, n, k);
}
int cublasSgemm_v2(void *handle, int, int, int m, int n, int k, ...) {
  return product(handle, "Sgemm", m, n, k);
}
int cublasDgemm_v2(void *handle, int, int, int m, int n, int k, ...) {
  return product(handle, "Dgemm", m, n, k);
}
int cublasGemmStridedBatchedEx(void *handle, int, int, int m, int n, int k, const void *,
                               const void *, int, int, long long, const void *, int, int,
                               long long, const void *, void *, int, int, long long, int batch,
                               int, int) {
  return product(handle, "GemmStridedBatchedEx", m, n, k, batch);
}
int cublasSgemmStridedBatched(void *handle, int, int, int m, int n, int k, const float *,
                              const float *, int, long long, const float *, int, long long,
                              const float *, float *, int, long long, int batch) {
  return product(handle, "SgemmStridedBatched", m, n, k, batch);
}
int cublasDgemmStridedBatched(void *handle, int, int, int m, int n, int k, const double *,
                              const double *, int, long long, const double *, int, long long,
                              const double *, double *, int, long long, int batch) {
  return product(handle, "DgemmStridedBatched", m, n, k, batch);
}
int cublasSgemv_v2(void *handle, int, int m, int n, ...) {
  return product(handle, "Sgemv", m, n, 1);
}
int cublasDgemv_v2(void *handle, int, int m, int n, ...) {
  return product(handle, "Dgemv", m, n, 1);
}
int cublasStrsm_v2(void *handle, int, int, int, int, int m, int n, ...) {
  return product(handle, "Strsm", m, n, m);
}
int cublasStrsmBatched(void *handle, int, int, int, int, int m, int n, const float *,
                       const float *const *, int, float *const *, int, int batch) {
  return product(handle, "StrsmBatched", m, n, m, batch);
}
int cublasSdot_v2(void *handle, int n, ...) { return product(handle, "Sdot", 1, 1, n); }
int cublasDdot_v2(void *handle, int n, ...) { return product(handle, "Ddot", 1, 1, n); }
int cublasDotEx(void *handle, int n, ...) { return product(handle, "DotEx", 1, 1, n); }

}  // extern "C"

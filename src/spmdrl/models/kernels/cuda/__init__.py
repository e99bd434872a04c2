"""Kernels for CUDA in Triton: attention of decode steps, sampling, norm, SwiGLU, rope, layout of
keys and values, log-probabilities.

Only this package imports Triton, and it is imported late, by whoever calls a kernel: spmdrl works
without. `docs/kernels.md` has what each reads and writes, and its proofs.
"""

"""Kernels for CUDA in Triton: attention of decode steps, sampling, norm, SwiGLU and rope.

Only this package imports Triton, and it is imported late, by whoever calls a kernel: spmdrl works
without. Nothing calls them yet; `docs/kernels.md` has what each reads and writes, and its proofs.
"""

"""Kernels for CUDA in Triton: attention of decode steps over pages.

Only this package imports Triton, and it is imported late, by whoever calls a kernel: spmdrl works
without. Nothing calls them yet.
"""

"""A train backend on megatron-core: its chunks, pipeline and optimizer, and what it cannot do.

The layout of weights and of optimizer states is in `models.megatron_layout`, which needs no
megatron-core; Megatron's own checkpoints are read by `models.files.torch_dist`.
"""

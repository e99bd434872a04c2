"""The bins of the histogram of per-token ratios of train to rollout probability."""

RATIO_EDGES = (0.5, 0.8, 0.9, 0.99, 1.01, 1.1, 1.25, 2.0)
"""Upper edges, each inclusive; one more bin is above the last."""

RATIO_BINS = (*(f"rollout_ratio/to_{edge:g}" for edge in RATIO_EDGES), "rollout_ratio/above")
"""Metric names: the share of tokens in each bin."""

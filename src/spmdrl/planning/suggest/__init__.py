"""The search for the fastest layout that fits: choices, their comparison, the best few."""

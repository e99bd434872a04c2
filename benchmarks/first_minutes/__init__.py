"""The first minutes on a GPU: stages in order of worth, each prediction next to its measurement.

`scripts/gpu_check.sh` runs it. The driver (`driver.py`) imports no torch: it names missing wheels,
starts a process for each stage (`measure.py`) and passes on what that prints, one JSON object per
line. Predictions are computed from shapes (`shapes.py`), from what the code really issues
(`operations.py`), and from ceilings that the first stage measures or a table of cards publishes
(`ceilings.py`, `cards.py`).
"""

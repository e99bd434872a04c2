"""Shared fixtures; puts `tests/` on the path so that tests import the harness."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

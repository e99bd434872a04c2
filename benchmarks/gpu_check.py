"""The first minutes on a GPU (`first_minutes`); `scripts/gpu_check.sh` runs it."""

from __future__ import annotations

from first_minutes.driver import main

if __name__ == "__main__":
    raise SystemExit(main())

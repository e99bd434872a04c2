"""Write a tiny random model of every variant of a family, for `spmdrl verify-model`.

    python scripts/dev/make_variants.py FAMILY OUT [VARIANT ...]

FAMILY is config.json's `model_type`. OUT gets a directory for each variant; a card tells the others
by what differs from `plain`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from family_variants import FAMILIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path)
    parser.add_argument("variants", nargs="*", help="only these")
    options = parser.parse_args()
    family = FAMILIES[options.family]
    for name in options.variants or family.variants:
        family.write(name, options.out / name)
        print(options.out / name)


if __name__ == "__main__":
    main()

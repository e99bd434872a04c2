"""`python -m spmdrl`."""

import sys

from spmdrl.cli import main

sys.exit(main())

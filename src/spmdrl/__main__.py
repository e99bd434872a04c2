"""`python -m spmdrl`."""

import signal
import sys


def run() -> int:
    # as `supervision.signals.hold`, before other imports; the code that answers them releases them
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    from spmdrl.commands.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())

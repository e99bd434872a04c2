"""The exception that ends a flow when the world agrees to stop."""

from __future__ import annotations


class StopAsked(BaseException):
    """All ranks have agreed to stop here; `train` then saves.

    Like KeyboardInterrupt it is not an `Exception`, so that a flow's error handling does not
    catch it.
    """

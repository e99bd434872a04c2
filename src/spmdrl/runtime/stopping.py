"""The world's agreement to stop, as it ends a flow."""

from __future__ import annotations


class StopAsked(BaseException):
    """All ranks have agreed to stop here; `train` saves then.

    Like KeyboardInterrupt it is no `Exception`: a flow's own error handling does not see it.
    """

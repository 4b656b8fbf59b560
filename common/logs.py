"""What fedmerge says while it runs as somebody else's process."""

from __future__ import annotations

import logging


def log_to_stderr() -> None:
    """Sends fedmerge's own messages, and nobody else's, to standard error; calling it twice is harmless."""
    logger = logging.getLogger("fedmerge")
    if logger.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False

"""Libraries that chat through absl's logger, kept off the user's terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_absl() -> Iterator[None]:
    """Hold back absl's notes and hints (of orbax, tensorflow-datasets); errors are raised anyway.

    Examples:
      >>> with quiet_absl():
      ...     logging.getLogger("absl").warning("not shown")
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

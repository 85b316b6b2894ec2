"""Lines for the user, on the logger ``trackopt``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

logger = logging.getLogger("trackopt")


def log_warnings(messages: Iterable[str]) -> None:
    """Log each message as a warning."""
    for message in messages:
        logger.warning("trackopt: %s", message)

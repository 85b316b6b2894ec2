"""Whether a call comes after another one in the order of the code, or begins the next round of a loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import CodeType, FrameType

_MAX_FRAMES = 12


class CallOrder:
    """Remembers where the latest of some calls was made.

    A call further down in a function follows it: after it in the body of a loop, or after the loop. One further up is
    made in the next round. Functions that both calls were made in are compared first.
    """

    def __init__(self) -> None:
        self._latest: dict[int, tuple[CodeType, int]] = {}

    def mark(self, frame: FrameType | None) -> None:
        """Remember a call that is being made by a frame."""
        latest: dict[int, tuple[CodeType, int]] = {}
        while frame is not None and len(latest) < _MAX_FRAMES:
            latest[id(frame)] = (frame.f_code, frame.f_lasti)
            frame = frame.f_back
        self._latest = latest

    def follows(self, frame: FrameType | None) -> bool:
        """Return whether a call that is being made by a frame comes after the latest one."""
        while frame is not None:
            code, position = self._latest.get(id(frame), (None, 0))
            if code is frame.f_code:
                return frame.f_lasti > position
            frame = frame.f_back
        return False

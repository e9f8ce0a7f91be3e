"""Which CUDA stream used an accumulator last, so that work on two streams loses nothing."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch

from .. import compat


class LastUse:
    """The streams that used some accumulators last. A stream that uses one waits for the one before.

    A capture is apart: its replays run on whatever stream, so `settle` waits for the whole device.
    """

    def __init__(self) -> None:
        self._streams: dict[Hashable, int] = {}
        self._captured: set[torch.device] = set()

    def use(self, places: Iterable[tuple[Hashable, torch.device]]) -> None:
        """Have the current stream wait for those that used these places last."""
        waited: set[tuple[torch.device, int]] = set()
        for place in places:
            device = place[1]
            if is_captured(device):
                self._captured.add(device)
                continue
            now = compat.current_stream(device)
            before = self._streams.get(place, now)
            if before != now and (device, before) not in waited:
                waited.add((device, before))
                wait_for(before, device)
            self._streams[place] = now

    def settle(self) -> None:
        """Wait for replays of captured work, if there may be any."""
        for device in self._captured:
            torch.cuda.synchronize(device)


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph captures what runs now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def wait_for(stream: int, device: torch.device) -> None:
    """Have the device's current stream wait for another one, by its number."""
    torch.cuda.current_stream(device).wait_stream(torch.cuda.ExternalStream(stream, device))

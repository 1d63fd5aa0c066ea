"""Numbers between host and device, either way without waiting for what else the device has been asked for."""

from __future__ import annotations

import torch


class Told:
    """Numbers of a device on their way to the host, behind all that it has been asked for so far."""

    def __init__(self, there: torch.Tensor) -> None:
        self.there, cuda = there, there.device.type == "cuda"
        self._here = torch.empty(there.shape, dtype=there.dtype, pin_memory=cuda)
        self._here.copy_(there, non_blocking=cuda)
        self._arrived: torch.cuda.Event | None = None
        if cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(there.device))

    def tolist(self) -> list[int]:
        """Waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[int] = self._here.tolist()
        return found


def sent(here: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The host's numbers on the device: on a GPU a copy, and they may change at once; on a CPU they themselves."""
    if device.type != "cuda":
        return here.to(device)
    return here.pin_memory().to(device, non_blocking=True)  # from other memory the copy waits for the device

"""Processes outside the ledger that hold memory of our device: what is said of them, once."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

# While one holds what is missing, every try is a driver call in vain, and one that maps a part clears it again.
RETRY_S = 0.05
LONGEST_RETRY_S = 0.5


class Strangers:
    """Tells when a shortage begins that only they explain, and when it is over: requests wait meanwhile."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._told = False

    def look(self, device_is_short: bool, *, enough: bool) -> None:
        """After a try to map. ``device_is_short``: the ledger had room, the device had none. ``enough``: it got it."""
        if device_is_short and not self._told:
            self._told = True
            log.warning(
                "%s has no memory where its budget has room: another process holds it; requests wait. "
                "End that process, or lower memory in [[devices]]",
                self._device,
            )
        if self._told and enough and not device_is_short:
            self._told = False
            log.info("%s has memory for waiting requests again", self._device)

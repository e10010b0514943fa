"""Processes outside the ledger that hold memory of our device: what is said of them, once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from prism_sgl.allocator.ledger import Ledger

log = logging.getLogger(__name__)

# While one holds what is missing, every try is a driver call in vain, and one that maps a part clears it again.
RETRY_S = 0.05
LONGEST_RETRY_S = 0.5


class Strangers:
    """Tells when a shortage begins that only they explain, and when it is over: requests wait meanwhile.

    It is over when the device has free what the ledger says is free. That somebody got what he wanted is not enough:
    beside a stranger a small wish comes true and the next one does not, and each would be news.
    """

    def __init__(self, device: str, ledger: Ledger, free_granules: Callable[[], int | None]) -> None:
        """``free_granules``: what the device shows as free (``Device.free_granules``)."""
        self._device = device
        self._ledger = ledger
        self._free_granules = free_granules
        self._told = False
        self._asked_at = 0.0  # when the driver was asked, or the last shortage
        self._seemed_gone = False

    def look(self, device_is_short: bool) -> None:
        """After a try to map and now and then. ``device_is_short``: the ledger had room, the device had none."""
        if device_is_short:
            self._asked_at, self._seemed_gone = time.monotonic(), False
            if not self._told:
                self._told = True
                log.warning(
                    "%s has no memory where its budget has room: another process holds it; requests wait. "
                    "End that process, or lower memory in [[devices]]",
                    self._device,
                )
        elif self._told and self._are_gone():
            self._told = False
            log.info("%s has memory for waiting requests again", self._device)

    def _are_gone(self) -> bool:
        """Asks the driver, now and then: an idle engine may turn without a pause.

        Twice: what a neighbour has leased and is about to map makes the ledger's free less for a moment.
        """
        now = time.monotonic()
        if now - self._asked_at < LONGEST_RETRY_S:
            return False
        granted, free = self._ledger.totals().free, self._free_granules()
        seemed_gone, self._seemed_gone = self._seemed_gone, free is None or free >= granted
        self._asked_at = now
        return seemed_gone and self._seemed_gone

"""Local level: what a request asks for, and in which order the waiting requests of one device run.

The order itself stands in ``prism_sgl/deadline_order.py``, because engines order their own queues by it too.
"""

from __future__ import annotations

from dataclasses import dataclass

from prism_sgl.deadline_order import AGED_EVERY, Waiting, aged_at, order

__all__ = ["AGED_EVERY", "TIERS", "Tier", "Waiting", "aged_at", "order"]


@dataclass(frozen=True, slots=True)
class Tier:
    """What OpenAI's ``service_tier`` means here."""

    priority: int  # added to the request's own
    ttft_factor: float  # of the model's TTFT SLO; one that the request names itself stands as it is


# "priority" is never made late by the usual ones. "flex" runs when those leave room, has ten times their time, and
# ages as all do. OpenAI sells "scale" as reserved capacity, which nobody reserves here.
TIERS = {
    "auto": Tier(0, 1.0),
    "default": Tier(0, 1.0),
    "scale": Tier(0, 1.0),
    "priority": Tier(1, 1.0),
    "flex": Tier(-1, 10.0),
}

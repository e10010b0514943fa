"""Policies whose placement never changes: ``static`` and ``muxserve``.

- ``static`` (S-Partition, Prism section 7.1): each model has a device and a part of its KV memory for itself. The
  prototype's formula (get_memory_pool_size.py): what weights leave, split by token rate x KV bytes a token.
- ``muxserve`` (MuxServe++ as the paper runs it): models share a device and its KV memory page by page; none ever
  sleeps or moves.

Both are told the whole trace in advance, and which placement is best is found by trying it (``search.py``).
A model that no device has room for is not served: its requests fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prism_sgl.schedulers.replay.cluster import Cluster, Instance, Ticket
from prism_sgl.schedulers.replay.spec import Fleet

Placement = Mapping[str, tuple[int, ...]]  # model -> numbers of its devices


class Fixed:
    """Every engine is awake from the begin to the end, and orders its own queue as it comes."""

    def __init__(self, name: str, placement: Placement, kv_bytes: Mapping[str, int] | None = None) -> None:
        self.name = name
        self._placement = placement
        self._kv_bytes = kv_bytes or {}
        self._instances: dict[str, Instance] = {}

    def begin(self, cluster: Cluster) -> None:
        for model, devices in self._placement.items():
            instance = cluster.add(model, devices, kv_cap_bytes=self._kv_bytes.get(model, 0))
            if instance is not None and cluster.open_at_once(instance):
                self._instances[model] = instance

    def arrived(self, cluster: Cluster, ticket: Ticket) -> None:
        instance = self._instances.get(ticket.spec.name)
        if instance is None:
            cluster.fail(ticket, "no device has room for its model")
        else:
            cluster.run_on(ticket, instance)

    def progressed(self, cluster: Cluster, instance: Instance) -> None:
        pass


def split_kv(fleet: Fleet, placement: Placement, token_rates: Mapping[str, float]) -> dict[str, int]:
    """S-Partition's formula on each device, but never less than one request of full length for a model."""
    specs = fleet.by_name()
    kv_bytes: dict[str, int] = {}
    for device in range(fleet.num_devices):
        here = [specs[model] for model, devices in placement.items() if device in devices]
        if not here:
            continue
        floors = {s.name: s.costs.floor_bytes for s in here}
        left = fleet.device_bytes - sum(s.costs.weights_bytes + s.costs.overhead_bytes for s in here)
        spare = max(0, left - sum(floors.values()))
        asks = {s.name: token_rates.get(s.name, 0.0) * s.costs.kv_bytes_per_token for s in here}
        total = sum(asks.values()) or 1.0
        for spec in here:
            page = spec.costs.page_bytes
            pages = (floors[spec.name] + int(spare * asks[spec.name] / total)) // page
            share = max(pages * page, floors[spec.name])
            # A model on several devices has equal parts there: the smallest share holds.
            kv_bytes[spec.name] = min(share, kv_bytes.get(spec.name, share))
    return kv_bytes


def fits(fleet: Fleet, placement: Placement) -> bool:
    return not unplaced(fleet, placement)


def unplaced(fleet: Fleet, placement: Placement) -> Sequence[int]:
    """Devices that are promised more than they have."""
    specs = fleet.by_name()
    used = [0] * fleet.num_devices
    for model, devices in placement.items():
        for device in devices:
            used[device] += specs[model].costs.awake_bytes
    return [i for i, size_bytes in enumerate(used) if size_bytes > fleet.device_bytes]

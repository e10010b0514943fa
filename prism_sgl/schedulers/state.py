"""Names that balancer.py takes from here until it takes them from fleet.py and records.py."""

from __future__ import annotations

from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.records import AWAKE, Device, Model, Role, Runtime

__all__ = ["AWAKE", "Device", "Fleet", "Model", "Role", "Runtime"]

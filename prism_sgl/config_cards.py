"""Which card an index of [[devices]] names, in the words of CUDA: the same to the launcher and to a card's workers."""

from __future__ import annotations

from collections.abc import Mapping

from prism_sgl.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
BUS_ORDER = "PCI_BUS_ID"  # nvidia-smi's; CUDA's own default counts the fastest card first


def card_id(
    index: int, environment: Mapping[str, str], *, key: str = "devices.index", file: str = "models.toml"
) -> str:
    """Number or UUID: the index itself, or what stands at it in what the user has made visible.

    Raises:
        ConfigError: fewer cards than that are visible.
    """
    if not (visible := environment.get(VISIBLE)):
        return str(index)
    cards = visible.split(",")
    if index >= len(cards):
        problem = f"is {index}, but {VISIBLE} is {visible}"
        raise ConfigError(key, problem, "count within those, from 0", file=file)
    return cards[index].strip()

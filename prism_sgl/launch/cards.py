"""Do the devices of models.toml have the cards that they name, and these the memory of their budgets?

Asked before anything starts: a budget that a card does not have would end as torch's out of memory, in some loader.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from prism_sgl.config import Config, DeviceConfig
from prism_sgl.config_cards import BUS_ORDER, ORDER, VISIBLE, card_id
from prism_sgl.errors import ConfigError
from prism_sgl.launch.nvml import Card, Holder, NoDriverError, ReadCards, read_cards

_GIB = 1 << 30


def check_cards(
    config: Config, environment: Mapping[str, str], read: ReadCards = read_cards, *, is_here: bool
) -> list[str]:
    """What one should know though nothing is wrong, a line each.

    ``is_here``: the devices shall be those of this machine. Else it may have none, as when a file is checked on one
    machine for another.

    Raises:
        ConfigError: there is no driver, no such card, or too little memory on it.
    """
    devices = [device for device in config.devices if device.kind == "cuda"]
    if not devices:
        return []
    try:
        cards, silence = read(), ""
    except NoDriverError as error:
        cards, silence = [], f"the NVIDIA driver's library (NVML) does not answer: {error}"
    if not cards and not is_here:
        return [f"budgets are not compared with cards: {silence or 'this machine has none'}"]
    if silence:
        remedy = 'install the driver, start the container with its GPUs, or give kind = "host"'
        _fail(config, f"devices.{devices[0].name}.kind", f'is "cuda", but {silence}', remedy)
    notes = []
    of_card: dict[int, list[DeviceConfig]] = {}
    for device in devices:
        key = f"devices.{device.name}.index"
        wanted = card_id(device.index, environment, key=key, file=config.file)
        if unsure := _unsure(wanted, environment, cards):
            notes.append(f"devices.{device.name}.memory is not compared with its card: {unsure}")
            continue
        card = _find(wanted, cards)
        if card is None:
            there = f"the cards are {', '.join(map(_show, cards))}" if cards else "there is no card"
            if environment.get(VISIBLE):
                problem, remedy = f'is {device.index}, that is "{wanted}" in {VISIBLE}', f"correct {VISIBLE}"
            else:
                problem, remedy = f"is {device.index}", "give the index of a card"
            _fail(config, key, f"{problem}, but {there}", remedy)
        _check_one(config, device, card)
        of_card.setdefault(card.index, []).append(device)
    for card in cards:
        beside = of_card.get(card.index, [])
        _check_together(config, beside, card)
        if beside and card.free_bytes < sum(device.memory_bytes for device in beside):
            notes.append(_shortage(beside, card))
    return notes


def _unsure(wanted: str, environment: Mapping[str, str], cards: Sequence[Card]) -> str:
    """Why it cannot be told which card CUDA will take; "": it can."""
    if wanted.startswith("MIG-"):
        return f"{wanted} is a part of one"
    is_counted_by_cuda = bool(environment.get(VISIBLE)) and environment.get(ORDER) != BUS_ORDER
    if (
        wanted.isdecimal()
        and is_counted_by_cuda
        and len({(card.name, card.total_bytes) for card in cards}) > 1
    ):
        return f"CUDA counts cards that differ from the fastest on; set {ORDER}={BUS_ORDER}, or give UUIDs"
    return ""


def _find(wanted: str, cards: Sequence[Card]) -> Card | None:
    if wanted.isdecimal():
        return next((card for card in cards if card.index == int(wanted)), None)
    # The beginning of a UUID is enough to CUDA, if no other begins so.
    found = [card for card in cards if wanted and card.uuid.lower().startswith(wanted.lower())]
    return found[0] if len(found) == 1 else None


def _check_one(config: Config, device: DeviceConfig, card: Card) -> None:
    if device.memory_bytes > card.total_bytes:
        problem = f"is {_gib(device.memory_bytes)}, more than there is on card {_show(card)}"
        _fail(
            config, f"devices.{device.name}.memory", problem, f'give at most "{card.total_bytes // _GIB}GiB"'
        )


def _check_together(config: Config, devices: Sequence[DeviceConfig], card: Card) -> None:
    """Two indices may name one card: ``CUDA_VISIBLE_DEVICES=0,0``, or its number and its UUID."""
    if sum(device.memory_bytes for device in devices) > card.total_bytes:
        each = " + ".join(_gib(device.memory_bytes) for device in devices)
        problem = f"are {each}, together more than there is on card {_show(card)}, which all of them name"
        _fail(config, _keys(devices), problem, "give each device a card of its own, or less memory")


def _shortage(devices: Sequence[DeviceConfig], card: Card) -> str:
    wanted = _gib(sum(device.memory_bytes for device in devices))
    held = ", ".join(map(_show_holder, card.holders)) or "processes that the driver does not name"
    return (
        f"{_keys(devices)}: of the {wanted} only {_gib(card.free_bytes)} are free now on card {_show(card)}; "
        f"held by {held}; engines wait for the rest"
    )


def _keys(devices: Iterable[DeviceConfig]) -> str:
    return " and ".join(f"devices.{device.name}.memory" for device in devices)


def _show(card: Card) -> str:
    return f"{card.index} ({card.name}, {_gib(card.total_bytes)})"


def _show_holder(holder: Holder) -> str:
    used = f", {_gib(holder.used_bytes)}" if holder.used_bytes else ""
    return f"{holder.name or 'a process'} (pid {holder.pid}{used})"


def _gib(size_bytes: int) -> str:
    """Cards are sold by GiB: 4000GiB beside 139.8GiB says more than 3.91TiB."""
    return f"{size_bytes / _GIB:.2f}".rstrip("0").rstrip(".") + "GiB"


def _fail(config: Config, key: str, problem: str, remedy: str) -> NoReturn:
    raise ConfigError(key, problem, remedy, file=config.file)

from __future__ import annotations

from dataclasses import replace

from prism_sgl.schedulers.placement import Demand, Place, choose, kvpr, plan, pressure

DEMAND = Demand("chat", weights_bytes=40, needed_bytes=50, pressure=10.0, devices=("a", "b"))
A = Place("a", budget_bytes=100, free_bytes=100, possible_bytes=100)
B = Place("b", budget_bytes=100, free_bytes=100, possible_bytes=100)


def test_pressure_is_bytes_of_kv_a_second_over_the_time_a_token_may_take() -> None:
    assert pressure(100.0, 1000, 0.1) == 1_000_000
    assert kvpr(10.0, 5) == 2.0
    assert kvpr(10.0, 0) == float("inf")
    assert kvpr(0.0, 0) == 0.0


def test_resulting_pressure_decides_not_the_present_one() -> None:
    # a is the less pressed one now (0.02 against 0.025), but its weights leave little room for more.
    a = replace(A, awake_weights_bytes=50, free_bytes=50, pressure=1.0)
    b = replace(B, awake_weights_bytes=20, free_bytes=80, pressure=2.0)
    assert choose(DEMAND, [a, b]).device == "b"


def test_idle_memory_counts_as_room_before_that_of_busy_models() -> None:
    busy = replace(A, free_bytes=10)
    idle = replace(B, free_bytes=10, reclaimable_bytes=60, pressure=100.0)
    assert choose(DEMAND, [busy, idle]).device == "b"
    assert choose(DEMAND, [busy]).device == "a"


def test_only_allowed_devices_are_taken_and_refusals_say_why() -> None:
    assert choose(replace(DEMAND, devices=("b",)), [A, B]).device == "b"
    assert choose(replace(DEMAND, devices=()), [A, B]).reason == "chat may be placed on no device"
    choice = choose(DEMAND, [replace(A, free_bytes=0, possible_bytes=30)])
    assert choice.device is None
    assert "needs 50B" in choice.reason
    assert "30B at most" in choice.reason


def test_device_on_which_not_all_have_room_at_once_is_named_without_a_pressure() -> None:
    full = replace(A, awake_weights_bytes=80, free_bytes=10, reclaimable_bytes=60, pressure=1.0)
    choice = choose(DEMAND, [full])
    assert (choice.device, choice.reason) == ("a", "a has room, its models take turns")


def test_models_without_traffic_spread_by_their_weights() -> None:
    demands = [replace(DEMAND, model=f"m{i}", pressure=0.0) for i in range(4)]
    chosen = plan(demands, [A, B])
    assert [chosen[f"m{i}"].device for i in range(4)] == ["a", "b", "a", "b"]


def test_models_nobody_has_asked_yet_spread_by_what_they_would_cost_if_asked_alike() -> None:
    """By weights alone the two large ones share a device, as heavy as the rest together."""
    sizes = {"l1": 20, "l2": 20, "m": 9, "s1": 8, "s2": 8, "s3": 8}
    demands = [
        replace(DEMAND, model=name, pressure=0.0, weights_bytes=size, needed_bytes=size, reads=size + 10.0)
        for name, size in sizes.items()
    ]
    chosen = plan(demands, [A, B])
    assert chosen["l1"].device != chosen["l2"].device
    reads = {d: sum(s + 10 for name, s in sizes.items() if chosen[name].device == d) for d in "ab"}
    assert max(reads.values()) <= 69
    # What lives there already counts, and what is known counts more.
    taken = [replace(A, home_reads=200.0), B]
    assert {choice.device for choice in plan(demands[:2], taken).values()} == {"b"}
    known = [replace(A, compute=0.1), replace(B, home_reads=200.0)]
    assert {choice.device for choice in plan(demands[:2], known).values()} == {"b"}


def test_most_demanding_model_is_placed_first() -> None:
    small = replace(DEMAND, model="small", needed_bytes=60, pressure=1.0)
    chosen = plan([small, replace(DEMAND, pressure=50.0)], [A])
    assert (chosen["chat"].device, chosen["small"].device) == ("a", None)

from __future__ import annotations

from prism_sgl.schedulers.simulator import Costs, World
from tests.schedulers.by_hand import config, facts, model


def world(budget_mib: int = 600) -> World:
    names = ("chat", "code", "third")
    return World(
        config(*(model(name) for name in names), budget_mib=budget_mib),
        {name: facts() for name in names},
        Costs(start_s=10.0, wake_s=0.3),
        on_step=lambda w: w.controller.check(),
    )


def test_sleeping_model_answers_after_one_wake() -> None:
    w = world()
    w.run(60.0)
    sleeper = next(m.name for m in w.controller.status(w.now).models if m.state == "asleep")
    client = w.apis["api0"].request("r1", sleeper, prompt_tokens=100, new_tokens=10)
    w.run(70.0)
    assert client.ends == ["ok"]
    assert client.first_at is not None
    assert 0.3 < client.first_at - client.arrived_at < 0.5
    assert client.grants[0].activation_s > 0.29


def test_three_busy_models_share_the_room_of_two() -> None:
    w = world()
    w.run(60.0)
    clients = []
    for number in range(300):
        w.run(60.0 + number * 0.1)
        clients.append(w.apis["api0"].request(f"r{number}", ("chat", "code", "third")[number % 3]))
    w.run(150.0)
    assert all(client.ends == ["ok"] for client in clients)
    assert w.held_bytes("host0") <= 600 << 20


def test_answers_of_minutes_hold_nobody_up_for_longer_than_their_turn() -> None:
    """Two of three fit. All have an answer of five minutes; who waits gets a turn after 10 s, then 10 s for answers."""
    w = world()
    w.run(60.0)
    names = ("chat", "code", "third")
    clients = [w.apis["api0"].request(f"r{i}", name, new_tokens=30_000) for i, name in enumerate(names)]
    w.run(85.0)
    assert all(client.first_at is not None for client in clients)
    w.run(1500.0)
    assert all(client.ends == ["ok"] for client in clients)


def test_router_restart_loses_and_doubles_nothing() -> None:
    w = world()
    w.run(60.0)
    clients = []
    for number in range(60):
        w.run(60.0 + number * 0.05)
        if number == 30:
            w.restart_router()
        clients.append(w.apis["api0"].request(f"r{number}", "code", new_tokens=30))
    w.run(100.0)
    assert all(client.ends == ["ok"] for client in clients)
    assert sorted(w.completed) == sorted(client.id for client in clients)


def test_same_world_has_the_same_trace() -> None:
    def trace() -> str:
        w = world()
        for number in range(20):
            w.run(20.0 + number)
            w.apis["api0"].request(f"r{number}", ("chat", "code")[number % 2])
        w.run(100.0)
        return w.log.hexdigest()

    assert trace() == trace()

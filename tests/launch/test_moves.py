"""Models on the move between two devices: real router and api_server, engines that speak the real messages."""

from __future__ import annotations

import threading
import time
from collections import Counter

import httpx

from tests.launch.stack import Stack, running, wait_for
from tests.launch.test_router import Asked

MODELS = tuple(f"m{number}" for number in range(8))
# A pass each 0.25 s, a model that moved stays for 1.5 s: what takes minutes in use takes seconds here.
QUICK = '[scheduler]\nwindow = "3s"\nmin_residence = "100ms"\nstart_parallel = 8\n'


class Traffic:
    """Clients of some models, each with one request after the other, until told to stop."""

    def __init__(self, stack: Stack, models: list[str], number: int, clients: int = 4) -> None:
        self._stack = stack
        self._stopping = threading.Event()
        self.tags: list[str] = []
        self.bad: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(model, f"t{number}-{model}-{client}"), daemon=True)
            for model in models
            for client in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, model: str, name: str) -> None:
        number = 0
        while not self._stopping.is_set():
            tag = f"{name}-{number}"
            number += 1
            self.tags.append(tag)
            try:
                response = self._stack.chat(model, tag=tag, delay_ms=40)
            except httpx.HTTPError as error:
                self.bad.append(f"{tag}: {error!r}")
                continue
            if response.status_code != 200 or f"{model} heard hello" not in response.text:
                self.bad.append(f"{tag}: {response.status_code} {response.text}")
            time.sleep(0.08)

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)


def device_of(stack: Stack, model: str) -> str:
    return str(stack.client.get(f"/api/v1/models/{model}").json()["device"])


def num_moves(stack: Stack) -> int:
    return sum(m["moves"] for m in stack.client.get("/api/v1/models").json()["models"])


def wait_moved(stack: Stack, hot: list[str]) -> None:
    """Until these two are on two devices."""
    try:
        wait_for("moved", lambda: len({device_of(stack, model) for model in hot}) == 2)
    except AssertionError:
        texts = [stack.client.get(f"/api/v1/models/{model}/explain").json()["message"] for model in hot]
        events = stack.client.get("/api/v1/events").json()["events"]
        raise AssertionError("\n".join(["not moved", *texts, *events])) from None


def taken(stack: Stack) -> Counter[str]:
    lines = [line for program in stack.programs.values() for line in program.lines]
    return Counter(line.removeprefix("took ") for line in lines if line.startswith("took "))


def test_load_that_shifts_moves_models_and_loses_no_request() -> None:
    with running(MODELS, num_devices=2, extra=QUICK) as stack:
        wait_for("all up", lambda: all(stack.state(m) == "awake" for m in MODELS))
        by_device: dict[str, list[str]] = {}
        for model in MODELS:
            by_device.setdefault(device_of(stack, model), []).append(model)
        assert {device: len(models) for device, models in by_device.items()} == {"host0": 4, "host1": 4}

        tags: list[str] = []
        for number, device in enumerate(("host0", "host1", "host0")):
            hot = [m for m in MODELS if device_of(stack, m) == device][:2]
            before = num_moves(stack)
            streams = [Asked(stack, m, tag=f"s{number}-{m}", stream=True, hold_after=1) for m in hot]
            sources = [stack.engine(m) for m in hot]
            for model, source in zip(hot, sources, strict=True):
                source.line(f"holding s{number}-{model}")
            traffic = Traffic(stack, hot, number)
            wait_moved(stack, hot)
            # Half an answer is still with the source that has been left.
            for model, source in zip(hot, sources, strict=True):
                assert source.process.poll() is None
                source.tell(f"release after s{number}-{model}")
            assert all(s.answer().text.endswith("data: [DONE]\n\n") for s in streams)
            traffic.stop()
            assert traffic.bad == []
            tags += [*traffic.tags, *(f"s{number}-{m}" for m in hot)]
            assert 1 <= num_moves(stack) - before <= 2, "one move is enough, and there is no thrash"

        assert taken(stack) == Counter(tags), "each request was taken up once"
        # Each source has answered what it had, and is gone.
        wait_for("sources gone", lambda: sum(p.process.poll() is None for p in stack.programs.values()) == 8)
        moved = next(m["name"] for m in stack.client.get("/api/v1/models").json()["models"] if m["moves"])
        text = stack.client.get(f"/api/v1/models/{moved}/explain").json()["message"]
        assert text.startswith(f"{moved}: awake on ")
        assert "host0: pressure" in text
        assert any("moves to" in line for line in stack.client.get("/api/v1/events").json()["events"])


def test_router_that_dies_in_a_move_leaves_one_runtime_and_loses_nothing() -> None:
    with running(("chat",), num_devices=2, extra=QUICK) as stack:
        source, old = stack.engine("chat"), device_of(stack, "chat")
        new = "host1" if old == "host0" else "host0"
        stream = Asked(stack, "chat", tag="s", stream=True, hold_after=1)
        source.line("holding s")
        traffic = Traffic(stack, ["chat"], 0, clients=1)
        move = threading.Thread(target=stack.client.post, args=(f"/api/v1/models/chat/move?device={new}",))
        move.start()
        wait_for("target started", lambda: len(stack.programs) == 2)
        stack.router.kill()
        stack.start_router().line("ready")
        move.join(30)
        wait_for("moved", lambda: device_of(stack, "chat") == new)
        source.tell("release after s")
        assert stream.answer().text.endswith("data: [DONE]\n\n")
        traffic.stop()
        assert traffic.bad == []
        wait_for("source gone", lambda: source.process.poll() is not None)
        assert taken(stack) == Counter([*traffic.tags, "s"])
        assert stack.client.post(f"/api/v1/models/chat/move?device={new}").status_code == 200
        assert stack.client.post("/api/v1/models/chat/move").status_code == 400
        assert stack.client.post("/api/v1/models/chat/move?device=nowhere").status_code == 409


def test_model_with_a_spare_moves_there_and_back_without_a_start() -> None:
    with running(("chat",), num_devices=2, extra=QUICK + "spares = true\n") as stack:

        def others() -> list[tuple[str, str]]:
            status = stack.client.get("/api/v1/models/chat").json()
            return [(other["role"], other["state"]) for other in status["others"]]

        wait_for("spare", lambda: others() == [("spare", "asleep")])
        traffic = Traffic(stack, ["chat"], 0, clients=2)
        device = device_of(stack, "chat")
        for target in ("host1" if device == "host0" else "host0", device):
            assert stack.client.post(f"/api/v1/models/chat/move?device={target}").status_code == 200
            assert device_of(stack, "chat") == target
            wait_for("source sleeps", lambda: others() == [("spare", "asleep")])
        traffic.stop()
        assert traffic.bad == []
        assert taken(stack) == Counter(traffic.tags)
        assert len(stack.programs) == 2


def test_burst_of_an_idle_model_is_served_beside_nobody_and_none_is_lost() -> None:
    with running(("chat", "other"), num_devices=2, extra=QUICK + "spares = true\n") as stack:

        def has_spare(model: str) -> bool:
            others = stack.client.get(f"/api/v1/models/{model}").json()["others"]
            return [(other["role"], other["state"]) for other in others] == [("spare", "asleep")]

        wait_for("spares", lambda: has_spare("chat") and has_spare("other"))
        shared = device_of(stack, "other")
        if device_of(stack, "chat") != shared:
            assert stack.client.post(f"/api/v1/models/chat/move?device={shared}").status_code == 200
            wait_for("source sleeps", lambda: has_spare("chat"))
        stream = Asked(stack, "other", tag="s", stream=True, hold_after=1)
        neighbour = stack.programs[stack.client.get("/api/v1/models/other").json()["runtime"]]
        neighbour.line("holding s")

        def leaves() -> bool:
            """As soon as it no longer rests after its move; asked once in a while, so that it is idle between."""
            assert stack.chat("chat", tag=f"c{time.monotonic()}").status_code == 200
            return device_of(stack, "chat") != shared

        wait_for("served elsewhere", leaves)
        traffic = Traffic(stack, ["chat"], 0, clients=2)
        wait_for("some bursts", lambda: len(traffic.tags) >= 12)
        assert device_of(stack, "chat") != shared, "there is nobody beside it"
        traffic.stop()
        assert traffic.bad == []
        neighbour.tell("release after s")
        assert stream.answer().text.endswith("data: [DONE]\n\n")
        assert len(stack.programs) == 4, "nothing was started for it"
        events = stack.client.get("/api/v1/events").json()["events"]
        assert any("its next burst finds 0 models computing" in line for line in events), "\n".join(events)

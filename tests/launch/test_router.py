"""What survives when a process is killed: the router, a runtime, an api_server."""

from __future__ import annotations

import asyncio
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from prism_sgl.launch.router import call_later, next_epoch
from tests.launch.stack import WAIT_S, Stack, running, wait_for


class Asked:
    """A request that is on its way in a thread."""

    def __init__(self, stack: Stack, model: str, **fields: Any) -> None:
        self.response: httpx.Response | None = None
        self.error: httpx.HTTPError | None = None
        self._thread = threading.Thread(target=self._run, args=(stack, model, fields), daemon=True)
        self._thread.start()

    def _run(self, stack: Stack, model: str, fields: dict[str, Any]) -> None:
        try:
            self.response = stack.chat(model, **fields)
        except httpx.HTTPError as error:
            self.error = error

    def answer(self) -> httpx.Response:
        self._thread.join(30)
        assert self.response is not None, f"no answer: {self.error}"
        return self.response

    def failure(self) -> httpx.HTTPError:
        self._thread.join(30)
        assert self.error is not None
        return self.error


def test_epoch_grows_with_each_router(tmp_path: Path) -> None:
    assert [next_epoch(str(tmp_path)) for _ in range(3)] == [1, 2, 3]
    (tmp_path / "epoch").write_text("nonsense")
    assert next_epoch(str(tmp_path)) > 1_000_000_000


def test_timer_that_is_due_at_once_is_a_timer() -> None:
    """uvloop's call_later gives a plain handle for less than half a millisecond; that ended the router."""

    async def set_timer() -> None:
        loop = asyncio.get_running_loop()
        for wait_s in (-1.0, 0.0, 0.0001):
            timer = call_later(loop, wait_s, lambda: None)
            assert timer.when() > loop.time() - 1.0
            timer.cancel()

    uvloop.run(set_timer())


def test_killed_router_loses_and_doubles_nothing() -> None:
    with running(("chat", "code"), hold_wakes=True) as stack:
        chat, code = stack.engine("chat"), stack.engine("code")
        assert stack.client.post("/api/v1/models/code/sleep").status_code == 200
        runs = [Asked(stack, "chat", tag=f"run{n}", hold="runs") for n in range(2)]
        chat.line("took run")
        chat.line("took run")
        streamed = Asked(stack, "chat", tag="s", stream=True, hold_after=2)
        chat.line("holding s")
        held = [Asked(stack, "code", tag=f"held{n}") for n in range(3)]
        code.line("waking 1")
        wait_for("queued", lambda: stack.metric('prism_queue_depth{model="code"}') == 3.0)

        stack.router.kill()
        late = Asked(stack, "chat", tag="late")  # nobody is there to take it
        chat.tell("release after s")
        assert streamed.answer().text.endswith("data: [DONE]\n\n")
        wait_for("not ready", lambda: stack.client.get("/ready").status_code == 503)
        router = stack.start_router()
        router.line("ready")
        assert late.answer().status_code == 200
        code.tell("release wake 1")
        assert [asked.answer().status_code for asked in held] == [200, 200, 200]
        chat.tell("release runs")
        assert [asked.answer().status_code for asked in runs] == [200, 200]

        taken = [line for program in (chat, code) for line in program.lines if line.startswith("took")]
        assert sorted(taken) == sorted(
            f"took {tag}" for tag in ("run0", "run1", "s", "held0", "held1", "held2", "late")
        )
        wait_for("nothing in flight", lambda: stack.metric('prism_inflight{model="chat"}') == 0.0)
        assert stack.chat("chat").status_code == 200


def test_router_that_is_new_does_not_take_a_runtime_for_gone() -> None:
    """What needs no grant is not known to the router, so the api_server ends it by what the router knows."""
    with running(("chat", "code")) as stack, ThreadPoolExecutor(2) as pool:
        asked = {
            model: pool.submit(
                stack.client.get, f"/m/{model}/model_info", params={"tag": model, "hold": "it"}
            )
            for model in ("chat", "code")
        }
        for model in asked:
            stack.engine(model).line(f"took {model}")
        stack.supervisor_speaks.clear()
        stack.router.kill()
        stack.engines["code"].kill()
        stack.start_router().line("ready")
        wait_for("told by the new router", lambda: stack.state("chat") == "cold")
        stack.report_exit("code")
        stack.supervisor_speaks.set()
        wait_for("told by the supervisor", lambda: stack.state("chat") == "awake")
        stack.engine("chat").tell("release it")
        assert asked["chat"].result(WAIT_S).json()["model_path"] == "/models/chat"
        # One that is gone is not waited for longer than a new router needs.
        lost = asked["code"].result(WAIT_S)
        assert (lost.status_code, lost.json()["error"]["code"]) == (502, "model_lost")
        assert stack.chat("chat").status_code == 200


def test_router_and_api_server_start_again_when_a_models_files_are_gone() -> None:
    with running(("chat",)) as stack:
        (stack.folder / "model" / "config.json").unlink()
        stack.config.unlink()
        stack.router.kill()
        stack.start_router().line("ready")
        stack.api.kill()
        stack.start_api().line("ready")
        assert stack.chat("chat").status_code == 200


def test_killed_runtime_is_retried_once_before_the_first_byte() -> None:
    with running(("chat", "code")) as stack:
        first = stack.engine("chat")
        silent = Asked(stack, "chat", tag="silent", hold="never")
        sse = Asked(stack, "chat", tag="sse", stream=True, hold_after=1)
        first.line("took silent")
        first.line("holding sse")
        other = Asked(stack, "code", tag="other", hold="other")
        stack.engine("code").line("took other")

        stack.kill_engine("chat")
        # A byte was sent: an error event, then the end.
        events = [line for line in sse.answer().text.split("\n\n") if line]
        assert '"0 "' in events[0]
        assert '"code":"model_lost"' in events[-1]
        # None was sent: tried again on the next runtime, and no third time.
        second = stack.engine("chat")
        assert second is not first
        second.line("took silent")
        stack.kill_engine("chat")
        lost = silent.answer()
        assert (lost.status_code, lost.json()["error"]["code"]) == (502, "model_lost")
        # Others are unharmed, and the model comes back by itself.
        stack.engine("code").tell("release other")
        assert other.answer().status_code == 200
        assert stack.chat("chat").status_code == 200


def test_killed_runtime_ends_an_answer_that_is_no_event_stream_visibly() -> None:
    with running(("chat",)) as stack:
        body = {"tag": "b", "binary": True}
        with stack.client.stream("POST", "/generate", json=body) as response:
            parts = response.iter_raw()
            assert next(parts) == b"first"
            stack.kill_engine("chat")
            with pytest.raises(httpx.RemoteProtocolError):
                next(parts)


def test_killed_api_server_leaves_nothing_behind() -> None:
    with running(("chat",)) as stack:
        engine = stack.engine("chat")
        dead = Asked(stack, "chat", tag="orphan", stream=True, chunks=10**6, hold_after=1)
        engine.line("holding orphan")
        stack.api.process.send_signal(signal.SIGKILL)
        assert isinstance(dead.failure(), httpx.RemoteProtocolError | httpx.ReadError)
        stack.start_api().line("ready")
        engine.tell("release after orphan")
        engine.line("gone orphan")
        wait_for("router knows it", lambda: stack.client.get("/ready").status_code == 200)
        assert stack.chat("chat", tag="next").status_code == 200
        engine.line("took next")

"""What one random user of tests/soak.py does: asks, compares, streams, leaves, loses patience."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

if TYPE_CHECKING:
    from tests.soak import Soak

MODELS = {"chat": 5, "code": 3, "poet": 2}  # how often each is asked
CONTEXT_TOKENS, ANSWER_TOKENS = 1024, 24
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
HANGS_S = 150.0  # a request that takes longer

Outcome = int | str  # a status, or what happened instead
T = TypeVar("T")


class Client:
    """One user; does one thing after the other."""

    def __init__(self, soak: Soak, number: int) -> None:
        self._soak = soak
        self._rng = random.Random(soak.args.seed * 1000 + number)
        self._http = httpx.Client(base_url=soak.system.url, timeout=HANGS_S)

    def work(self) -> None:
        habits: dict[Callable[[str], Outcome], int] = {
            self.greedy: 40,
            self.stream: 15,
            self.leave: 15,
            self.long: 10,
            self.schema: 6,
            self.lose_patience: 5,
            self.two_answers: 5,
            self.too_long: 4,
        }
        with self._http:
            while self._soak.goes_on:
                habit, model = one_of(self._rng, habits), one_of(self._rng, MODELS)
                began = time.monotonic()
                try:
                    outcome = habit(model)
                except httpx.HTTPError as error:
                    outcome = self._soak.broken(f"{habit.__name__} {model}", error)
                self._soak.saw(f"client: {habit.__name__} {outcome}", time.monotonic() - began)
                time.sleep(self._rng.expovariate(5.0))

    def greedy(self, model: str) -> Outcome:
        which, tokens = self._rng.randrange(len(self._soak.prompts)), self._rng.choice((1, 4, ANSWER_TOKENS))
        reply = self._generate(model, self._soak.prompts[which], tokens)
        if reply.status_code == 200 and reply.json()["output_ids"] != self._soak.answers[which][:tokens]:
            self._soak.problem(
                f"{model}, prompt {which}: {reply.text}, not {self._soak.answers[which][:tokens]}"
            )
        return self._seen(reply)

    def long(self, model: str) -> Outcome:
        tokens = self._rng.randrange(CONTEXT_TOKENS // 2, CONTEXT_TOKENS - 10)
        return self._seen(self._generate(model, self._ids(tokens), 2))

    def too_long(self, model: str) -> Outcome:
        return self._seen(self._generate(model, self._ids(CONTEXT_TOKENS + 100), 2), expected=400)

    def lose_patience(self, model: str) -> Outcome:
        try:
            return self._seen(
                self._generate(model, self._soak.prompts[5], 100, timeout=self._rng.uniform(0.05, 1.0))
            )
        except httpx.TimeoutException:
            return "left"

    def schema(self, model: str) -> Outcome:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        return self._complete(model, prompt="JSON:", max_tokens=24, response_format=form)

    def two_answers(self, model: str) -> Outcome:
        return self._complete(model, prompt="Once", max_tokens=8, n=2, stop=["."])

    def stream(self, model: str) -> Outcome:
        return self._stream(model, self._rng.choice((4, 16, 48)))

    def leave(self, model: str) -> Outcome:
        return self._stream(model, 200, leave_after=self._rng.randrange(1, 6))

    # ------------------------------------------------------------ asking

    def _ids(self, tokens: int) -> list[int]:
        return [self._rng.randrange(1000, 30000) for _ in range(tokens)]

    def _generate(self, model: str, ids: list[int], tokens: int, timeout: float = HANGS_S) -> httpx.Response:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling}
        return self._http.post(f"/m/{model}/generate", json=body, timeout=timeout)

    def _complete(self, model: str, **body: Any) -> Outcome:
        return self._seen(self._http.post("/v1/completions", json={"model": model, **body}))

    def _stream(self, model: str, tokens: int, leave_after: int | None = None) -> Outcome:
        messages = [{"role": "user", "content": "Tell me of the sea."}]
        body = {"model": model, "messages": messages, "max_tokens": tokens, "stream": True}
        lines = 0
        with self._http.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                reply.read()
                return self._seen(reply)
            for line in reply.iter_lines():
                if '"error"' in line:
                    return self._failed(f"stream of {model}: {line}", "an error in the stream")
                if line == "data: [DONE]":
                    return 200
                lines += bool(line)
                if lines == leave_after:
                    return "left"
        return self._failed(f"stream of {model}: ended after {lines} lines without [DONE]", "cut")

    def _seen(self, reply: httpx.Response, expected: int = 200) -> Outcome:
        status = reply.status_code
        lost = status in (502, 503, 504)  # its engine, its model, the router: what a fault may cost
        if status != expected and not (lost and self._soak.args.faults):
            self._soak.problem(f"{reply.request.url}: {status} {reply.text}")
        return status

    def _failed(self, text: str, outcome: str) -> Outcome:
        if not self._soak.args.faults:
            self._soak.problem(text)
        return outcome


def one_of(rng: random.Random, weights: dict[T, int]) -> T:
    return rng.choices([*weights], [*weights.values()])[0]

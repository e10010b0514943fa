"""One child of a benchmark: an engine (or a load on the card) in a process of its own, told what to do in JSON lines.

    python -m benchmarks.gpu.engine_process --fd N --handler module:Class

Clocks run here, around the engine's own calls, so that neither the pipe nor the parent's Python is measured.
Light to import on purpose: SGLang's scheduler is spawned from here and imports this module again.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import importlib
import json
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO, cast

_PR_SET_PDEATHSIG = 1
# Less than that of llama1b and llama8b (demo/random_model.py); smaller models need another.
_VOCABULARY = int(os.environ.get("PRISM_BENCH_VOCABULARY", "120000"))
# Methods of SGLang's Engine itself; all other names go to the scheduler by rpc.
_ENGINE_METHODS = frozenset({"release_memory_occupation", "resume_memory_occupation", "flush_cache"})


@dataclass(frozen=True)
class Ask:
    """One request: ``tokens`` random ids of ``seed`` after ``prefix_tokens`` of ``prefix_seed``, sent ``at_s``."""

    seed: int
    tokens: int
    new_tokens: int
    at_s: float = 0.0
    prefix_seed: int = 0
    prefix_tokens: int = 0

    def ids(self) -> list[int]:
        return random_ids(self.prefix_seed, self.prefix_tokens) + random_ids(self.seed, self.tokens)


def random_ids(seed: int, count: int) -> list[int]:
    """The same ids for the same seed."""
    return random.Random(seed).choices(range(10, _VOCABULARY), k=count)


class EngineLike(Protocol):
    """What we use of ``sglang.Engine``."""

    loop: asyncio.AbstractEventLoop

    # One dict, or with ``stream`` an iterator of them.
    async def async_generate(self, **kwargs: Any) -> Any: ...
    def collective_rpc(self, method: str, **kwargs: Any) -> None: ...
    def shutdown(self) -> None: ...


class Handler:
    """Verbs that every child answers: a public method ``do_<verb>`` each, keyword arguments in, JSON out."""

    def do_ping(self) -> str:
        return "pong"

    def close(self) -> None:
        """Called once, at the end."""


class EngineHandler(Handler):
    """An SGLang engine: ``prepare`` (imports), ``start``, then any number of the others."""

    def __init__(self) -> None:
        self._engine: EngineLike | None = None
        self._early: Any = None

    # -- starting

    def do_prepare(self, kind: str, device_kind: str = "cuda") -> float:
        """SGLang's imports, which take half of a start; may run while something else is measured. Seconds."""
        began = time.monotonic()
        if kind == "ours":
            from prism_sgl.engine.spec import announce_device_kind

            announce_device_kind(device_kind)
            if device_kind == "cuda" and os.environ.get("PRISM_BENCH_EARLY", "1") == "1":
                from benchmarks.gpu.scheduler_side import prepare
                from prism_sgl.engine.early_children import EarlyChildren

                self._early = self._early or EarlyChildren(
                    prepare
                )  # they import while we do, as in the product
        importlib.import_module("sglang.srt.entrypoints.engine")
        if self._early is not None:
            self._early.wait_ready()
        return time.monotonic() - began

    def do_start(self, kind: str, args: dict[str, Any], spec: dict[str, Any] | None = None) -> dict[str, Any]:
        began = time.monotonic()
        self._engine = self.build(kind, args, spec)
        gc.collect()
        gc.freeze()  # what is imported stays: to look through it before each burst would take half a second
        flags = getattr(self._engine, "server_args", None)
        return {
            "start_s": time.monotonic() - began,
            "pids": process_tree(),
            "flags": {name: repr(value) for name, value in vars(flags).items()} if flags else {},
        }

    def build(self, kind: str, args: dict[str, Any], spec: dict[str, Any] | None) -> EngineLike:
        if kind == "ours":
            return _build_ours(cast(dict[str, Any], spec), self._early)
        from sglang.srt.entrypoints.engine import Engine

        return cast(EngineLike, Engine(**args))

    # -- requests

    def do_generate(
        self, asks: list[dict[str, Any]], keep_ids: bool = False, one_by_one: bool = False, at: float = 0.0
    ) -> dict[str, Any]:
        """Send each request at its time after ``at`` (0: now); all are streamed. See ``_one`` for the answer."""
        requests = [Ask(**ask) for ask in asks]
        prompts = [request.ids() for request in requests]
        gc.collect()
        result: dict[str, Any] = self._run(self._all(requests, prompts, keep_ids, one_by_one, at))
        return result

    def do_gaps(self, asks: list[dict[str, Any]], answers: list[list[int]]) -> list[list[float]]:
        """How far behind the likeliest token each token of these answers is, in log probability, after all before it.

        0.0 where it is what this engine would say. One request after the other, each answer in one prefill.
        """
        return [
            self._run(self._gaps(Ask(**ask).ids(), answer)) for ask, answer in zip(asks, answers, strict=True)
        ]

    def do_act_then_generate(self, action: dict[str, Any], ask: dict[str, Any]) -> dict[str, Any]:
        """An action (a wake), and at once a request: seconds of both from the action's begin."""
        request = Ask(**ask)
        prompt = request.ids()
        began = time.monotonic()
        self._act(action)
        acted = time.monotonic()
        answer = self._run(self._one(request, prompt, began, keep_ids=True))
        first = answer["sent_s"] + answer["ttft_s"] if answer["ttft_s"] is not None else None
        return {"action_s": acted - began, "first_token_s": first, "answer": answer}

    # -- actions

    def do_act(self, action: dict[str, Any], times: int = 1) -> list[float]:
        """Seconds of each call."""
        return [self._act(action) for _ in range(times)]

    def do_act_amid(self, action: dict[str, Any], asks: list[dict[str, Any]]) -> dict[str, Any]:
        """An action (short: it holds the streams up) once all of these requests decode; they go on to their ends."""
        requests = [Ask(**ask) for ask in asks]
        prompts = [request.ids() for request in requests]
        yet_to_begin = len(requests)

        def begun() -> None:
            nonlocal yet_to_begin
            yet_to_begin -= 1
            if not yet_to_begin:
                self._act(action)

        result: dict[str, Any] = self._run(self._all(requests, prompts, begun=begun))
        if yet_to_begin:
            raise RuntimeError(f"{yet_to_begin} requests had no token, so {action['name']} was not done")
        return result

    def do_cycle(self, actions: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        """These actions one after the other, without pause, for so long (the last cycle is completed)."""
        times: list[list[float]] = [[] for _ in actions]

        def cycle() -> None:
            for taken, action in zip(times, actions, strict=True):
                taken.append(self._act(action))

        return {**without_pause(cycle, seconds), "times": times}

    def do_pids(self) -> list[int]:
        return process_tree()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()

    # -- inside

    @property
    def engine(self) -> EngineLike:
        assert self._engine is not None, "the engine is not started"
        return self._engine

    def _run(self, work: Any) -> Any:
        return self.engine.loop.run_until_complete(work)

    def _act(self, action: dict[str, Any]) -> float:
        """``{"name": ..., "args": {...}}``; returns seconds."""
        name, args = action["name"], action.get("args", {})
        began = time.monotonic()
        if name in _ENGINE_METHODS:
            getattr(self.engine, name)(**args)
        else:
            self.engine.collective_rpc(name, **args)
        return time.monotonic() - began

    async def _all(
        self,
        requests: Sequence[Ask],
        prompts: Sequence[list[int]],
        keep_ids: bool = False,
        one_by_one: bool = False,
        at: float = 0.0,
        begun: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        began = max(time.monotonic(), at)
        if one_by_one:
            answers = [
                await self._one(request, prompt, time.monotonic(), keep_ids)
                for request, prompt in zip(requests, prompts, strict=True)
            ]
        else:
            answers = await asyncio.gather(
                *(
                    self._one(request, prompt, began + request.at_s, keep_ids, begun)
                    for request, prompt in zip(requests, prompts, strict=True)
                )
            )
        return {"began": began, "wall_s": time.monotonic() - began, "answers": list(answers)}

    async def _one(
        self,
        request: Ask,
        prompt: list[int],
        due: float,
        keep_ids: bool,
        begun: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Times from ``due``, when the request should have been sent; ``tpot_s`` is the mean of this answer.

        ``begun`` is called at the first token.
        """
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        sent = time.monotonic()
        first = last = None
        ids: list[int] = []
        error = None
        cached = 0
        sampling = {"max_new_tokens": request.new_tokens, "temperature": 0, "ignore_eos": True}
        try:
            stream = await self.engine.async_generate(input_ids=prompt, sampling_params=sampling, stream=True)
            async for chunk in stream:
                last = time.monotonic()
                if chunk["output_ids"]:
                    if first is None:
                        first = last
                        begun()
                    ids += chunk["output_ids"]
                cached = chunk["meta_info"].get("cached_tokens", 0)
            if len(ids) != request.new_tokens:
                error = f"{len(ids)} tokens instead of {request.new_tokens}"
        except Exception as failure:  # the engine's own classes of every kind: a failed request is a result
            error = f"{type(failure).__name__}: {failure}"
        rest = len(ids) - 1
        return {
            "sent_s": sent - due,
            "ttft_s": None if first is None else first - sent,
            "tpot_s": (last - first) / rest if first is not None and last is not None and rest > 0 else None,
            "total_s": None if last is None else last - sent,
            "tokens": len(ids),
            "cached": cached,
            "error": error,
            "ids": ids if keep_ids else None,
        }

    async def _gaps(self, prompt: list[int], answer: list[int]) -> list[float]:
        result = await self.engine.async_generate(
            input_ids=prompt + answer,
            sampling_params={"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
            return_logprob=True,
            # Entries begin with this token, whose own has no value. No cached prefix reaches beyond it.
            logprob_start_len=len(prompt) - 1,
            top_logprobs_num=1,
            stream=False,
        )
        chosen, best = (result["meta_info"][f"input_{kind}_logprobs"][1:] for kind in ("token", "top"))
        # SGLang calls the vocabulary's last token 0 there (logprob_result_processor.py:54); the value is its own.
        if [token or asked for (_, token, *_), asked in zip(chosen, answer, strict=True)] != answer:
            raise RuntimeError(f"log probabilities of {chosen}, asked for those of {answer}")
        return [top[0][0] - entry[0] for entry, top in zip(chosen, best, strict=True)]


def _build_ours(spec: dict[str, Any], early: Any) -> EngineLike:
    import msgspec
    from sglang.srt.plugins import load_plugins

    from prism_sgl.engine.spec import announce_spec
    from prism_sgl.messages import RuntimeSpec

    checked = msgspec.convert(spec, RuntimeSpec)
    announce_spec(checked)  # before SGLang's children are spawned: they inherit it
    load_plugins()
    from prism_sgl.engine.launching import EarlyEngine, RuntimeEngine, server_args
    from prism_sgl.engine.seams import prove_hooks

    prove_hooks()
    engine = RuntimeEngine
    if early is not None:
        EarlyEngine.children = early
        engine = EarlyEngine
    return cast(EngineLike, engine(server_args=server_args(checked)))


def without_pause(cycle: Callable[[], None], seconds: float) -> dict[str, float]:
    """Again and again for so long; the last one is completed. Returns ``cycles`` and ``seconds``."""
    cycles = 0
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        cycle()
        cycles += 1
    return {"cycles": cycles, "seconds": spent}


def process_tree() -> list[int]:
    """This process and all below it."""
    import psutil

    me = psutil.Process()
    return [me.pid, *(child.pid for child in me.children(recursive=True))]


def serve(handler: Handler, commands: Iterator[str], replies: TextIO) -> None:
    """Answer commands in their order until they end or one says ``close``."""
    for line in commands:
        command = json.loads(line)
        verb = command.pop("verb")
        number = command.pop("id")
        if verb == "close":
            handler.close()
            reply: dict[str, Any] = {"id": number, "result": None}
        else:
            try:
                reply = {"id": number, "result": getattr(handler, f"do_{verb}")(**command)}
            except Exception as error:  # whatever it was, the parent decides
                traceback.print_exc()
                reply = {"id": number, "error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if verb == "close":
            return
    handler.close()


def load_handler(name: str) -> Handler:
    module, _, attribute = name.partition(":")
    return cast(Handler, getattr(importlib.import_module(module), attribute)())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="a connected stream socket")
    parser.add_argument("--handler", default="benchmarks.gpu.engine_process:EngineHandler")
    args = parser.parse_args()
    # A parent that is killed must not leave an engine on the card; SGLang would only note a SIGTERM.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.set_inheritable(args.fd, False)
    with socket.socket(fileno=args.fd) as line:
        serve(load_handler(args.handler), line.makefile("r"), line.makefile("w"))


if __name__ == "__main__":
    main()

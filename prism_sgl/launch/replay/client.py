"""Asks an OpenAI-compatible server as clients do, and times what they see of a streamed answer.

Prompts are token ids, so that they have the tokens of the trace whatever the tokenizer; a server that refuses ids gets
so many short words instead. What a server accepts is tried out before the trace begins, one small request a model.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from prism_sgl.errors import EXIT_UNAVAILABLE, PrismError
from prism_sgl.launch.http_url import mounts
from prism_sgl.schedulers.replay.spec import Arrival, Outcome, Slo

# One token each in the vocabularies of today's models; only for servers that refuse token ids.
_WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "for",
    "on",
    "are",
    "with",
    "they",
    "at",
    "one",
    "have",
)
_FIRST_ANSWER_S = 900.0  # of a model that has to be started for it
_SHOWN_CHARS = 200


class LiveError(PrismError):
    """The server cannot be replayed against: it is not there, or refuses what a replay needs."""

    exit_code = EXIT_UNAVAILABLE


@dataclass(frozen=True)
class Form:
    """What of a request a server accepts. Without ``exact_length`` answers may end before their time."""

    token_ids: bool
    exact_length: bool


_FORMS = (Form(True, True), Form(True, False), Form(False, True), Form(False, False))


@dataclass(frozen=True)
class Prompts:
    """Seeded random prompts. Ids lie within [low, high): above special tokens, inside small vocabularies.

    ``alike``: all prompts of one model begin alike, so that a prefix cache helps as much as it can.
    """

    low: int = 1_000
    high: int = 30_000
    seed: int = 0
    alike: bool = False

    def tokens(self, model: str, number: int, count: int) -> list[int]:
        return self._random(model, number).choices(range(self.low, self.high), k=count)

    def text(self, model: str, number: int, count: int) -> str:
        return " ".join(self._random(model, number).choices(_WORDS, k=count))

    def _random(self, model: str, number: int) -> random.Random:
        return random.Random(f"{self.seed} {model} {'' if self.alike else number}")


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None


_decode = msgspec.json.Decoder(_Chunk).decode


class LiveServer:
    """Owner of the connections to one server. ``served``: the server's name of each model of the fleet."""

    def __init__(
        self, url: str, served: Mapping[str, str], prompts: Prompts | None = None, *, key: str | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self._served, self._prompts = dict(served), prompts or Prompts()
        self._forms: dict[str, Form] = {}
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # How long an answer may take is the replay's to say, and one connection a request in flight.
            timeout=httpx.Timeout(None, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            mounts=mounts(self.url),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    # ------------------------------------------------------------ before the trace

    async def check(self) -> None:
        """Each model is known and answers; this starts and wakes it. Raises LiveError with the remedy."""
        known = await self._known_models()
        for model, name in self._served.items():
            if name not in known:
                raise LiveError(
                    f"{self.url} does not know the model {name!r} of models.{model}; it serves "
                    f"{', '.join(sorted(known)) or 'none'}: set served_as in the fleet file"
                )
        forms = await asyncio.gather(*(self._try_forms(model) for model in self._served))
        self._forms = dict(zip(self._served, forms, strict=True))

    async def _known_models(self) -> set[str]:
        try:
            response = await self._client.get("/v1/models", timeout=30.0)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            told = str(error) or type(error).__name__
            raise LiveError(f"{self.url} cannot be reached ({told}); start a server there") from None
        if response.status_code in (401, 403):
            raise LiveError(
                f"{self.url} refuses the request ({response.status_code}: {_told(response.content)}); give one "
                "of its API keys before the command, prism-sgl --key KEY replay, or as PRISM_ADMIN_KEY"
            )
        try:
            listed = response.raise_for_status().json()["data"]
            # prism_sgl knows a model by its aliases too, and tells them.
            aliases = {alias for model in listed for alias in model.get("prism", {}).get("aliases", ())}
            return aliases | {str(model["id"]) for model in listed}
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError, AttributeError):
            raise LiveError(
                f"{self.url}/v1/models was answered with {response.status_code} and no list of models; "
                "give the address of an OpenAI-compatible server, without /v1"
            ) from None

    async def _try_forms(self, model: str) -> Form:
        trial = Arrival(0.0, model, 4, 2)
        for form in _FORMS:
            outcome = Outcome(model, 0.0, trial.prompt_tokens, trial.output_tokens)
            try:
                async with asyncio.timeout(_FIRST_ANSWER_S):
                    await self.ask(self.request(trial, number=-1, form=form), outcome, 0.0)
            except TimeoutError:
                raise LiveError(f"{model}: no answer within {_FIRST_ANSWER_S:.0f} s") from None
            if not outcome.failure:
                return form
            if not outcome.failure.startswith(("status 400", "status 422")):
                break
        raise LiveError(f"{model}: a first request of 4 tokens was not answered: {outcome.failure}")

    def inexact(self) -> list[str]:
        """What a reader must know of these prompts and answers; empty if they are as the trace has them."""
        words = [model for model, form in self._forms.items() if not form.token_ids]
        early = [model for model, form in self._forms.items() if not form.exact_length]
        notes = [f"prompts of {', '.join(words)} are words, about as many tokens"] if words else []
        return notes + ([f"answers of {', '.join(early)} may end early"] if early else [])

    async def models(self) -> dict[str, dict[str, Any]] | None:
        """Of a prism_sgl server: state, device, wakes of each model of the fleet. None: it is another one's."""
        try:
            response = (await self._client.get("/api/v1/models", timeout=5.0)).raise_for_status()
            listed = {
                name: model
                for model in response.json()["models"]
                for name in (model["name"], *model.get("aliases", ()))
            }
            return {model: listed[name] for model, name in self._served.items()}
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None

    # ------------------------------------------------------------ requests

    def request(
        self, arrival: Arrival, *, number: int, slo: Slo | None = None, form: Form | None = None
    ) -> httpx.Request:
        """Made ahead of its time: a long prompt takes a millisecond."""
        form = form or self._forms[arrival.model]
        make = self._prompts.tokens if form.token_ids else self._prompts.text
        body: dict[str, Any] = {
            "model": self._served[arrival.model],
            "prompt": make(arrival.model, number, arrival.prompt_tokens),
            "max_tokens": arrival.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if form.exact_length:
            body["ignore_eos"] = True
        headers = {"content-type": "application/json"}
        if slo is not None:
            headers["x-slo-ttft-ms"] = f"{slo.ttft_s * 1000:.3f}"
            headers["x-slo-tpot-ms"] = f"{slo.tpot_s * 1000:.3f}"
        return self._client.build_request(
            "POST", "/v1/completions", content=msgspec.json.encode(body), headers=headers
        )

    async def ask(self, request: httpx.Request, outcome: Outcome, began: float) -> None:
        """Fill in the outcome: seconds since ``began`` (of the loop's clock), or what went wrong."""
        outcome.arrived_at = asyncio.get_running_loop().time() - began
        try:
            response = await self._client.send(request, stream=True)
            try:
                if response.is_error:
                    outcome.failure = f"status {response.status_code}: {_told(await response.aread())}"
                else:
                    await self._read(response, outcome, began)
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            outcome.failure = f"broken: {str(error) or type(error).__name__}"

    async def _read(self, response: httpx.Response, outcome: Outcome, began: float) -> None:
        loop = asyncio.get_running_loop()
        ended, finish, written = False, "", 0
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue  # comments that keep the connection alive
            data = line[5:].strip()
            if data == "[DONE]":
                ended = True
                break
            try:
                chunk = _decode(data)
            except msgspec.DecodeError:
                outcome.failure = f"broken: {data[:_SHOWN_CHARS]!r} is no chunk of an answer"
                return
            if chunk.error is not None:
                outcome.failure = f"broken: {_told(data.encode())}"
                return
            if chunk.usage is not None:
                written = max(written, chunk.usage.completion_tokens)
            if chunk.choices:
                # Also one without text: a token may be part of a character.
                last_at = loop.time() - began
                outcome.first_at = last_at if outcome.first_at is None else outcome.first_at
                finish = chunk.choices[0].finish_reason or finish
        if not ended or outcome.first_at is None or finish == "abort":
            told = "the stream ended before the answer did" if not ended else "aborted or empty"
            outcome.failure = f"broken: {told}"
            return
        outcome.ended_at = last_at
        outcome.output_tokens = written or outcome.output_tokens


def _told(body: bytes) -> str:
    """The message of an OpenAI-style error, or the body's begin."""
    try:
        content = msgspec.json.decode(body)
        error: Any = content.get("error", content)
        return str(error["message"])[:_SHOWN_CHARS]
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError):
        return body[:_SHOWN_CHARS].decode(errors="replace")

"""What we read of a request: model, stream, lengths, and how soon it wants to run. The body is never decoded whole.

How soon: the headers ``x-slo-ttft-ms`` and ``x-slo-tpot-ms`` (also as ``x-llm-d-slo-...``), else the model's ``slo``;
OpenAI's ``service_tier`` (schedulers/dispatch.py says what a tier means); ``priority`` in the body or the header
``x-prism-priority``, where bigger is sooner.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import msgspec

from prism_sgl.launch.errors_http import HttpError
from prism_sgl.schedulers.dispatch import TIERS

# Bytes of a JSON body to a token of English text; learned for each model from the usage in its answers.
_FIRST_BYTES_PER_TOKEN = 4.0
_LEARNING_RATE = 0.1
_USAGE_BYTES = 4096
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens"\s*:\s*(\d{1,9})')
_FORM_FIELD = b'name="model"\r\n'
_FORM_HEAD_BYTES = 1024  # of the field, from its name to the empty line
_FORM_VALUE = re.compile(rb"\r\n\r\n([^\r\n]{1,200})\r\n")
_SLO_HEADERS = {
    "ttft": (b"x-slo-ttft-ms", b"x-llm-d-slo-ttft-ms"),
    "tpot": (b"x-slo-tpot-ms", b"x-llm-d-slo-tpot-ms"),
}
_LONGEST_SLO_MS = 86_400_000.0
_ANTHROPIC_TIER = "standard_only"  # its other one is "auto", as OpenAI's
_SHOWN_CHARS = 40  # of a wrong value


class Peek(msgspec.Struct, frozen=True):
    """Fields of any of SGLang's JSON bodies. Odd types are for the engine to complain of, so all are objects."""

    model: object = None
    stream: object = None
    priority: object = None
    max_tokens: object = None
    max_completion_tokens: object = None
    max_output_tokens: object = None
    sampling_params: object = None
    service_tier: object = None


class Wish(msgspec.Struct, frozen=True):
    """What a request wants, as far as queueing it needs."""

    stream: bool = False
    max_new_tokens: int = 0  # 0: not said
    priority: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    service_tier: str = ""


_decode = msgspec.json.Decoder(Peek).decode


def peek_json(body: bytes) -> Peek:
    """Raises HttpError 400."""
    try:
        return _decode(body)
    except msgspec.ValidationError:
        raise HttpError(400, "invalid_json", "the body is not a JSON object") from None
    except UnicodeDecodeError:
        raise HttpError(400, "invalid_json", "the body is not JSON: it is not UTF-8") from None
    except (msgspec.DecodeError, RecursionError) as error:
        text = str(error) if isinstance(error, msgspec.DecodeError) else "it is nested too deeply"
        raise HttpError(400, "invalid_json", f"the body is not JSON: {text}") from None


def peek_form(body: bytes) -> Peek:
    """Of a multipart form only the model's name."""
    at = body.find(_FORM_FIELD)
    while at >= 0:
        head_end = body.find(b"\r\n\r\n", at, at + _FORM_HEAD_BYTES)
        is_name = body[max(0, at - 1) : at] in (b" ", b";")  # and not the end of filename="model"
        if is_name and head_end >= 0 and (found := _FORM_VALUE.match(body, head_end)):
            return Peek(model=found.group(1).decode(errors="replace"))
        # What was read is not read again, else a body of nothing but names would hold up everybody for seconds.
        at = body.find(_FORM_FIELD, head_end if head_end >= 0 else at + _FORM_HEAD_BYTES)
    return Peek()


def wish(peek: Peek, headers: Mapping[bytes, bytes]) -> Wish:
    """Raises HttpError 400 for headers that are not numbers, and for a tier that there is not. Other fields of the body
    are the engine's to judge; of service_tier most of its routes know nothing."""
    sampling = peek.sampling_params
    limits = (
        peek.max_completion_tokens,
        peek.max_tokens,
        peek.max_output_tokens,
        sampling.get("max_new_tokens") if isinstance(sampling, dict) else None,
    )
    return Wish(
        stream=peek.stream is True,
        max_new_tokens=next((_count(limit) for limit in limits if limit is not None), 0),
        priority=_priority(peek.priority, headers),
        ttft_s=_seconds("ttft", headers),
        tpot_s=_seconds("tpot", headers),
        service_tier=_tier(peek.service_tier),
    )


def _count(value: object) -> int:
    return min(max(0, value), 1 << 31) if isinstance(value, int) else 0


def _priority(value: object, headers: Mapping[bytes, bytes]) -> int:
    if (text := headers.get(b"x-prism-priority")) is not None:
        try:
            value = int(text)
        except ValueError:
            raise _bad_header(b"x-prism-priority", text, "a whole number, e.g. 1; bigger is sooner") from None
    return max(-(1 << 31), min(value, 1 << 31)) if isinstance(value, int) else 0


def _seconds(slo: str, headers: Mapping[bytes, bytes]) -> float | None:
    for name in _SLO_HEADERS[slo]:
        if (text := headers.get(name)) is not None:
            try:
                milliseconds = float(text)
            except ValueError:
                milliseconds = math.nan
            if not 0.0 < milliseconds <= _LONGEST_SLO_MS:  # false for nan too
                raise _bad_header(name, text, "milliseconds above 0 and up to a day, e.g. 500")
            return milliseconds / 1000.0
    return None


def _tier(value: object) -> str:
    if value is None:
        return ""
    if value == _ANTHROPIC_TIER:
        return "default"
    if isinstance(value, str) and value in TIERS:
        return value
    message = f"service_tier is {_shown(value)}; give one of {', '.join(TIERS)}, or leave it out"
    raise HttpError(400, "invalid_value", message, param="service_tier")


def _bad_header(name: bytes, value: bytes, remedy: str) -> HttpError:
    text = name.decode()
    message = f"the header {text} is {_shown(value.decode(errors='replace'))}; give {remedy}"
    return HttpError(400, "invalid_header", message, param=text)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


class TokenEstimate:
    """Tokens of a prompt from the bytes of its body, for one model. The runtime has the exact verdict."""

    def __init__(self) -> None:
        self._bytes_per_token = _FIRST_BYTES_PER_TOKEN

    def tokens(self, body_bytes: int) -> int:
        return max(1, round(body_bytes / self._bytes_per_token))

    def learn(self, body_bytes: int, answer: bytes) -> None:
        """From the usage that stands in the last bytes of an answer, if it does."""
        found = _PROMPT_TOKENS.findall(answer[-_USAGE_BYTES:])
        if found and (tokens := int(found[-1])) > 0:
            ratio = min(64.0, max(1.0, body_bytes / tokens))
            self._bytes_per_token += _LEARNING_RATE * (ratio - self._bytes_per_token)

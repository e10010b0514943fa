"""What is read of a body before it is passed on."""

from __future__ import annotations

import time

import pytest

from prism_sgl.launch.errors_http import HttpError
from prism_sgl.launch.peek import peek_form, peek_json

MIB = 1 << 20
NAME = b'; name="model"\r\n'
FIELD = b"--x\r\nContent-Disposition: form-data" + NAME
AUDIO = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\nRIFF\x00\xff\r\n\r\n\r\n"
)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (FIELD + b"\r\nchat\r\n--x--\r\n", "chat"),
        (AUDIO + FIELD + b"\r\norg/chat\r\n--x--\r\n", "org/chat"),
        (FIELD + b"Content-Type: text/plain\r\nX-A: b\r\n\r\nchat\r\n" + AUDIO, "chat"),
        (NAME + b"\r\n" + b"x" * 201 + b"\r\n" + FIELD + b"\r\nchat\r\n--x--\r\n", "chat"),
        (NAME + b"x" * 1100 + FIELD + b"\r\nchat\r\n--x--\r\n", "chat"),
        (FIELD + b"\r\nchat\xe9\r\n--x--\r\n", "chat\ufffd"),
        (FIELD + b"\r\n\r\n--x--\r\n", None),
        (FIELD + b"\r\nchat", None),
        (FIELD + b"X-A: " + b"b" * MIB + b"\r\n\r\nchat\r\n--x--\r\n", None),
        (AUDIO, None),
        (AUDIO.replace(b"a.wav", b"model") + FIELD + b"\r\nchat\r\n--x--\r\n", "chat"),
        (b"", None),
    ],
    ids=[
        "alone",
        "behind a file",
        "more headers",
        "behind one too long",
        "behind a name far from a value",
        "not UTF-8",
        "empty",
        "cut off",
        "endless header",
        "none",
        "behind a file of that name",
        "no body",
    ],
)
def test_model_of_a_form(body: bytes, model: str | None) -> None:
    assert peek_form(body).model == model


@pytest.mark.parametrize(
    "part",
    [
        NAME,
        NAME + b"\r\n",
        NAME + b"a\r\n",
        NAME + b"\r\n" + b"x" * 201,
        NAME + b"x" * 1000,
        NAME * 70 + b"\r\n" + b"x" * 201,
    ],
)
def test_hostile_form_is_read_once(part: bytes) -> None:
    body = part * (MIB // len(part))
    began = time.process_time()
    peek_form(body)
    assert time.process_time() - began < 0.2, "quadratic would take minutes"


@pytest.mark.parametrize(
    "body",
    [b'{"model": "chat\xe9"}', b'{"model": "chat", "sampling_params": {"stop": "\xff"}}'],
    ids=["model", "within an object"],
)
def test_json_that_is_not_utf8_is_a_bad_body(body: bytes) -> None:
    with pytest.raises(HttpError, match="not UTF-8") as caught:
        peek_json(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_strings_that_are_not_peeked_at_are_for_the_engine_to_judge() -> None:
    assert peek_json(b'{"model": "chat", "messages": "\xff"}').model == "chat"

"""Refusals as HTTP clients know them: the error body of OpenAI's API, with a remedy in the message."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from prism_sgl.errors import PrismError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}


class HttpError(PrismError):
    """What the client is answered instead of what it asked for."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def headers(self) -> Sequence[tuple[bytes, bytes]]:
        if self.retry_after_s is None:
            return ()
        seconds = max(1, round(self.retry_after_s))
        return ((b"retry-after", str(seconds).encode()),)

    def event(self) -> bytes:
        """As the last event of a stream of server-sent events."""
        return b"data: " + self.body() + b"\n\n"


def unknown_model(name: str) -> HttpError:
    message = f"the model {name!r} is not configured; GET /v1/models lists those that are"
    return HttpError(404, "model_not_found", message, param="model")

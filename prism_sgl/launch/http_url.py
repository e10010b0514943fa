"""Whether what a user gave as the address of a server is one that httpx can be asked to connect to."""

from __future__ import annotations

import httpx


def is_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host) and 0 < (url.port or 80) < 65536

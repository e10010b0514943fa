"""How many descriptors a process may have open; children inherit it. A client has one in the api_server.

The usual soft limit of 1024 is there for programs that call select(), and from 1,000 clients on they would be reset.
"""

from __future__ import annotations

import resource

ENOUGH = 65535  # to which SGLang raises it in its own processes


def raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit(soft, hard), hard))


def soft_limit(soft: int, hard: int) -> int:
    """``ENOUGH`` as far as ``hard`` allows it, and never less than ``soft``."""
    if soft == resource.RLIM_INFINITY:
        return soft
    allowed = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    return max(soft, allowed)

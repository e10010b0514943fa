"""Who may operate: programs of this host, not the pages that its browsers show."""

from __future__ import annotations

import pytest

from prism_sgl.config import ServerConfig
from prism_sgl.launch.call import Call, Gate
from prism_sgl.launch.errors_http import HttpError
from prism_sgl.launch.routes import find


def status_of(path: str, *, method: str = "GET", client: str = "127.0.0.1", **headers: str) -> int:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"method": method, "path": path, "query_string": b"", "headers": raw, "client": (client, 1)}
    call = Call(scope)
    route, call.params = find(method, path)
    try:
        Gate(ServerConfig()).check(call, route)
    except HttpError as error:
        return error.status
    return 200


@pytest.mark.parametrize("path", ["/flush_cache", "/start_profile", "/freeze_gc"])
@pytest.mark.parametrize(
    ("site", "status"),
    [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200), ("", 403)],
)
def test_image_in_a_page_of_another_site_does_not_operate(path: str, site: str, status: int) -> None:
    assert status_of(path, sec_fetch_site=site) == status
    assert status_of(path, sec_fetch_site=site, origin="http://evil.example") == 403
    assert status_of("/v1/models", sec_fetch_site=site) == 200


@pytest.mark.parametrize(
    ("client", "status"),
    [
        ("127.0.0.1", 200),
        ("127.8.0.1", 200),
        ("::1", 200),
        ("::ffff:127.0.0.1", 200),  # by IPv4, to a server that listens on "::"
        ("192.0.2.7", 403),
        ("2001:db8::7", 403),
        ("::ffff:192.0.2.7", 403),
        ("unix", 403),
    ],
)
def test_operators_call_from_this_host(client: str, status: int) -> None:
    assert status_of("/api/v1/models/chat/sleep", method="POST", client=client) == status

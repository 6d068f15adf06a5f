"""Who gets in: the key, the loopback names, key files, addresses that need a key."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from orchestrator.serving.app import create_app
from orchestrator.serving.auth import OPEN_PATHS, check_exposure, read_key
from orchestrator.serving.errors import AddressTaken, KeyFileInvalid, KeyRequired
from orchestrator.serving.server import bind, find_url
from orchestrator.serving.settings import ServiceSettings
from tests.serving.fakes import MODEL, FakeEngine

KEY = "correct-horse"


@pytest.fixture
def guarded(open_service: Callable[..., TestClient]) -> TestClient:
    return open_service(api_key=KEY)


def every_route() -> list[tuple[str, str]]:
    """Method and path of all that the application answers to, and of what it does not."""
    app = create_app(FakeEngine(), ServiceSettings(model=MODEL))
    routes = app.openapi()["paths"]
    found = [(method.upper(), path) for path, methods in routes.items() for method in methods]
    return [*found, ("GET", "/openapi.json"), ("GET", "/"), ("GET", "/v2"), ("OPTIONS", "/v1/x")]


@pytest.mark.parametrize(("method", "path"), every_route())
@pytest.mark.parametrize("header", [None, "", KEY, "Bearer", "Bearer wrong", f"Basic {KEY}"])
def test_everything_but_health_needs_the_key(
    guarded: TestClient, engine: FakeEngine, method: str, path: str, header: str | None
) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = guarded.request(method, path, headers=headers)
    if path in OPEN_PATHS:
        assert response.status_code == 200
        return
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text
    assert engine.asked == engine.ingested == []


def test_the_key_lets_in(guarded: TestClient) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Host": "longspan.example"}
    assert guarded.get("/v1/models", headers=headers).json()["data"][0]["id"] == MODEL
    assert guarded.get(f"/v1/models/{MODEL}", headers=headers).json()["owned_by"] == "longspan"
    assert guarded.get("/v1/models/other", headers=headers).status_code == 404


def test_keys_are_compared_as_wholes_and_in_constant_time(
    guarded: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: set[tuple[int, int]] = set()

    def compare(left: bytes, right: bytes) -> bool:
        lengths.add((len(left), len(right)))
        return left == right

    monkeypatch.setattr("hmac.compare_digest", compare)
    for key in ("", KEY[:-1], KEY + "x", "\u00fc" * 300):
        header = f"Bearer {key}".encode()
        assert guarded.get("/v1/models", headers={b"Authorization": header}).status_code == 401
    assert lengths == {(32, 32)}


@pytest.mark.parametrize("path", ["/health/", "/health/../v1/models", "/healthy", "//health"])
def test_only_the_health_routes_themselves_are_open(guarded: TestClient, path: str) -> None:
    assert guarded.get(path).status_code == 401


def test_a_socket_of_another_kind_is_closed(guarded: TestClient) -> None:
    with (
        pytest.raises(WebSocketDisconnect) as caught,
        guarded.websocket_connect("/v1/models"),
    ):
        pass
    assert caught.value.code == 1008


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:8000"}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "127.0.0.1", "Origin": "http://localhost:3000"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "127.0.0.1.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "["}, 403),
        ({"Host": "127.0.0.1", "Origin": "https://evil.example"}, 403),
        ({"Host": "127.0.0.1", "Origin": "null"}, 403),
    ],
)
def test_without_a_key_other_sites_are_kept_out(
    service: TestClient, headers: dict[str, str], status: int
) -> None:
    assert service.get("/v1/models", headers=headers).status_code == status


def test_a_key_is_one_line_that_not_everybody_can_read(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    file.chmod(0o640)
    assert read_key(file) == KEY


@pytest.mark.parametrize(
    ("content", "mode", "value"),
    [
        (b"", 0o600, "0 words"),
        (b" \n", 0o600, "0 words"),
        (b"two words", 0o600, "2 words"),
        (b"x" * 1025, 0o600, "1025"),
        (b"\xff", 0o600, "not ASCII"),
        (b"key", 0o644, "644"),
        (None, 0, "No such file"),
    ],
)
def test_a_bad_key_file_is_named(
    tmp_path: Path, content: bytes | None, mode: int, value: str
) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
        file.chmod(mode)
    with pytest.raises(KeyFileInvalid, match=value) as caught:
        read_key(file)
    assert str(file) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    check_exposure(host, None)


def test_a_name_that_also_leads_elsewhere_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(None, None, None, "", (host, 0)) for host in ("127.0.0.1", "10.1.2.3")]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(KeyRequired):
        check_exposure("both.example", None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "no.such.host.invalid", ""])
def test_any_other_address_needs_a_key(host: str) -> None:
    with pytest.raises(KeyRequired, match="--api-key-file"):
        bind(host, 0, api_key=None)
    check_exposure(host, KEY)


def test_a_taken_port_is_named() -> None:
    with bind("127.0.0.1", 0, api_key=None) as first:
        first.listen()
        port = first.getsockname()[1]
        assert find_url(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(AddressTaken, match=f"port {port} .*in use"):
            bind("127.0.0.1", port, api_key=None)
    with pytest.raises(AddressTaken, match=r"192\.0\.2\.1"):
        bind("192.0.2.1", 0, api_key=KEY)


def test_urls_of_the_newer_protocol_have_brackets() -> None:
    try:
        listener = bind("::1", 0, api_key=None)
    except AddressTaken:
        pytest.skip("this machine has no IPv6")
    with listener:
        assert listener.family == socket.AF_INET6
        assert find_url(listener).startswith("http://[::1]:")


def test_settings_do_not_show_the_key() -> None:
    assert KEY not in repr(ServiceSettings(model=MODEL, api_key=KEY))


def test_no_page_fetches_scripts() -> None:
    app = create_app(FakeEngine(), ServiceSettings(model=MODEL))
    paths = {route.path for route in app.routes if isinstance(route, Route)}
    assert paths.isdisjoint({"/docs", "/redoc"})

"""Row B10, security: who listens where, who gets in, and what bytes from the network can do.

Owns three parts. Every run that this machine can make (one process, spawned ranks, the launcher,
Ray) is watched from its start to its end: none of its processes may listen beyond loopback. A
service that is bound beyond loopback is asked with no key, wrong keys and the key. Bodies of noise,
broken JSON, pickles and archives go to every route: they are refused, and none of them is run.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.faults import SEGMENT_TOKENS, reference_text, run_cli
from benchmarks.harness import note, print_row
from benchmarks.listening import Listener, find_listeners, find_marked
from benchmarks.service import serving
from orchestrator import Client
from tests.source import PACKAGES, Source
from tests.test_ratchets import find_faults, unsafe_loads

BAR = (
    "no process of a run (local, launcher, spawn, ray) listens beyond loopback; beyond loopback a "
    "missing or wrong key is 401 on every route but /health*, and without a key the server does "
    "not start; bytes from the network are 4xx, never 5xx, and never unpickled"
)
MARK, KEY, NAME = "LONGSPAN_RUN", "b10-key-of-this-run", "reference"
NUM_TOKENS, ANSWER_TOKENS, BODIES_A_ROUTE = 700, 8, 60
RUNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "local": ((), ()),
    "spawn": ((), ("--executor", "spawn", "--mesh", "1x2")),
    "launcher": (("launch", "--nproc", "2", "--", sys.executable, "-m", "orchestrator"), ()),
    "ray": ((), ("--executor", "ray", "--mesh", "1x2")),
}
# A launcher that was told to end says so with its exit code.
ENDED_AS_TOLD = (0, 128 + signal.SIGTERM)
OBJECT_COLLECTIVES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
}
CONTENT_TYPES = (
    "application/json",
    "text/plain",
    "multipart/form-data; boundary=x",
    "application/octet-stream",
    "application/x-pickle",
)


@dataclass(kw_only=True)
class Watch:
    """Every listener and every process that a run has had, looked for again and again."""

    listeners: set[Listener] = field(default_factory=set)
    pids: set[int] = field(default_factory=set)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mark what is started inside the block, and look until its end."""
        mark, is_over = uuid.uuid4().hex, threading.Event()
        watcher = threading.Thread(target=self._look, args=(mark, is_over))
        os.environ[MARK] = mark
        watcher.start()
        try:
            yield
        finally:
            del os.environ[MARK]
            is_over.set()
            watcher.join()

    def _look(self, mark: str, is_over: threading.Event) -> None:
        while not is_over.wait(0.1):
            pids = find_marked(f"{MARK}={mark}")
            self.pids.update(pids)
            self.listeners.update(find_listeners(pids))


def watch_run(store: Path, run: str) -> dict[str, Any]:
    """Serve, ingest and ask in one way, and say who listened meanwhile."""
    launcher, options = RUNS[run]
    watch = Watch()
    try:
        with (
            watch.running(),
            serving(store, *options, launcher=launcher) as served,
            Client(served.url) as client,
        ):
            text = reference_text(NUM_TOKENS)
            client.ingest(text=text, name=NAME, segment_tokens=SEGMENT_TOKENS)
            answer = client.ask(NAME, "What is it?", max_tokens=ANSWER_TOKENS)
            ranks = len(client.health().ranks)
    except SystemExit as error:
        note(f"{run}: {error}")
        return {"run": run, "holds": False, "error": str(error)[:300]}
    beyond = [asdict(each) for each in watch.listeners if not each.is_loopback]
    note(f"{run}: {len(watch.pids)} processes, {len(watch.listeners)} listeners, beyond: {beyond}")
    return {
        "run": run,
        "ranks": ranks,
        "processes": len(watch.pids),
        "listeners": len(watch.listeners),
        "beyond_loopback": beyond,
        "answered_tokens": answer.usage.completion_tokens,
        "exit_code": served.code,
        "holds": not beyond and len(watch.listeners) > 0 and served.code in ENDED_AS_TOLD,
    }


def own_address() -> str:
    """An address of this machine that is not loopback, or loopback where it has no other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Of a block that is never used; a datagram socket sends nothing to connect.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


def list_routes(url: str) -> list[tuple[str, str]]:
    """Method and path of every route, with a document's name in it, and some that do not exist."""
    headers = {"Authorization": f"Bearer {KEY}"}
    paths = httpx2.get(f"{url}/openapi.json", headers=headers).json()["paths"]
    routes = [
        (method.upper(), path.replace("{name}", NAME).replace("{model}", "m"))
        for path, methods in paths.items()
        for method in methods
    ]
    return [*routes, ("GET", "/openapi.json"), ("GET", "/"), ("POST", "/v1/completions")]


def check_keys(url: str, routes: list[tuple[str, str]]) -> dict[str, Any]:
    """Ask every route with no key, wrong ones, and the key."""
    wrong = (None, "", KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x")
    let_in: list[str] = []
    with httpx2.Client(base_url=url, timeout=60) as http:
        for method, path in routes:
            for header in wrong:
                headers = {} if header is None else {"Authorization": header}
                status = http.request(method, path, headers=headers).status_code
                if (status != 200) if path.startswith("/health") else (status != 401):
                    let_in.append(f"{method} {path} {header!r}: {status}")
        headers = {"Authorization": f"Bearer {KEY}"}
        with_key = http.get("/v1/models", headers=headers).status_code
    return {
        "address": httpx2.URL(url).host,
        "routes": len(routes),
        "requests": len(routes) * len(wrong),
        "not_as_they_should": let_in,
        "with_key": with_key,
        "holds": not let_in and with_key == 200,
    }


def make_bodies(trap: Path, seed: int) -> Iterator[tuple[str, bytes]]:
    """Kinds and bodies: noise, JSON with a flaw, and what runs a command where it is loaded."""
    draw = random.Random(seed)
    command = f"touch {trap}".encode()
    runnable = b"cos\nsystem\n(S'" + command + b"'\ntR."
    whole = (
        b'{"model": "smollm2-135m", "documents": ["a"], "name": "a", "text": "t", "messages": []}'
    )
    while True:
        noise = draw.randbytes(draw.randrange(400))
        cut = draw.randrange(len(whole))
        yield draw.choice(CONTENT_TYPES), noise
        yield CONTENT_TYPES[0], whole[:cut] + noise[:3] + whole[cut + 3 :]
        yield CONTENT_TYPES[0], b"[" * draw.randrange(1, 9000)
        yield CONTENT_TYPES[0], b'{"model": ' + b"9" * draw.randrange(1, 9000) + b"}"
        yield CONTENT_TYPES[0], b'{"text": "\\ud800", "name": "\\u0000", "stream": NaN}'
        yield draw.choice(CONTENT_TYPES), runnable
        yield draw.choice(CONTENT_TYPES), b"\x80\x04" + noise
        yield draw.choice(CONTENT_TYPES), b"PK\x03\x04" + noise
        yield (
            CONTENT_TYPES[2],
            b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + noise,
        )


def fuzz(url: str, routes: list[tuple[str, str]], trap: Path) -> dict[str, Any]:
    """Send bodies to every route; a body that a route does not read cannot make it fail."""
    counts: dict[str, int] = {}
    faults: list[str] = []
    key = f"Bearer {KEY}"
    with httpx2.Client(base_url=url, timeout=60) as http:
        for seed, (method, path) in enumerate(routes):
            bodies = make_bodies(trap, seed)
            for _ in range(BODIES_A_ROUTE if method == "POST" else BODIES_A_ROUTE // 10):
                kind, body = next(bodies)
                headers = {"Authorization": key, "Content-Type": kind}
                try:
                    status = str(
                        http.request(method, path, content=body, headers=headers).status_code
                    )
                except httpx2.RemoteProtocolError as error:
                    status = f"5xx {error}"
                counts[status[0] + "xx"] = counts.get(status[0] + "xx", 0) + 1
                if status[0] == "5" or (status[0] == "2" and method == "POST"):
                    faults.append(f"{method} {path} {kind} {body[:40]!r}: {status}")
        is_alive = http.get("/health").status_code == 200
    was_run = trap.exists()
    return {
        "answers": counts,
        "faults": faults[:20],
        "commands_run": was_run,
        "alive": is_alive,
        "holds": not faults and not was_run and is_alive,
    }


def check_exposed(folder: Path) -> dict[str, Any]:
    """A service on every address of this machine, with a key; and one without, that must not be."""
    key_file = folder / "key"
    key_file.touch(mode=0o600)
    key_file.write_text(KEY, encoding="ascii")
    open_ = ("serve", "--host", "0.0.0.0", "--port", "0", "--store", str(folder / "store"))
    refused = run_cli(*open_)
    options = ("--host", "0.0.0.0", "--api-key-file", str(key_file))
    with serving(folder / "store", *options) as served:
        url = f"http://{own_address()}:{served.port}"
        routes = list_routes(url)
        keys = check_keys(url, routes)
        fuzzed = fuzz(url, routes, folder / "trap")
        says_key = any(KEY in line for line in served.lines)
        is_seen = not all(each.is_loopback for each in find_listeners([served.process.pid]))
    is_refused = refused.code == 2 and "--api-key-file" in refused.stderr
    note(f"without a key: {refused.code} {refused.stderr.strip()}")
    return {
        "without_key": {"code": refused.code, "message": refused.stderr.strip()},
        "keys": keys,
        "bodies": fuzzed,
        "key_printed": says_key,
        "seen_by_the_scan": is_seen,
        "holds": all((is_refused, is_seen, keys["holds"], fuzzed["holds"], not says_key)),
    }


def pickled_collectives(source: Source) -> Iterator[str]:
    """Collectives of torch that send objects: they pickle them."""
    for name in source.attributes():
        if name.rpartition(".")[2] in OBJECT_COLLECTIVES:
            yield f"uses {name}"


def main() -> int:
    """Measure the row; arguments name some of the runs to watch, all by default."""
    chosen = [run for run in RUNS if run in sys.argv[1:]] or list(RUNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [watch_run(folder / run, run) for run in chosen]
        exposed = check_exposed(folder)
    unsafe = [
        *find_faults(unsafe_loads, PACKAGES),
        *find_faults(pickled_collectives, PACKAGES),
    ]
    measured = {"runs": runs, "exposed": exposed, "unsafe_loads": unsafe}
    holds = (
        len(chosen) == len(RUNS)
        and all(run["holds"] for run in runs)
        and exposed["holds"]
        and not unsafe
    )
    return print_row(row="B10", measured=measured, bar=BAR, holds=holds)

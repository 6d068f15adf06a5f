"""A blocking call of the engine, in a thread of its own, followed from the event loop.

Owns the two bridges between them: pieces and result to the loop, cancellation to the thread; and
`Gate`, which counts what runs. Knows neither questions nor documents.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, TypeVar

from orchestrator.serving.errors import ShuttingDown, TooBusy

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class CallCancelled(Exception):
    """Raised inside the engine, from its callback, to end a call that nobody waits for."""


class Gate:
    """Counts what runs, refuses what would be too much, and everything once it is closed."""

    def __init__(self, what: str, *, limit: int) -> None:
        self._what, self._limit = what, limit
        self._lock = threading.Lock()
        self._running = 0
        self._is_closed = False

    @property
    def running(self) -> int:
        """How many have entered and not left."""
        return self._running

    @property
    def is_closed(self) -> bool:
        """Whether nothing more is let in."""
        return self._is_closed

    def close(self) -> None:
        """Let nothing more in."""
        self._is_closed = True

    def enter(self) -> None:
        """Raises ShuttingDown or TooBusy."""
        with self._lock:
            if self._is_closed:
                raise ShuttingDown(
                    f"the server is stopping and takes no new {self._what}; it finishes what it "
                    "has begun; ask again when it is back"
                )
            if self._running >= self._limit:
                raise TooBusy(
                    f"{self._running} {self._what} are running; limit {self._limit} at once; try "
                    "again later"
                )
            self._running += 1

    def leave(self) -> None:
        """After `enter`, once."""
        with self._lock:
            self._running -= 1

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Enter, and leave at the end of the block."""
        self.enter()
        try:
            yield
        finally:
            self.leave()


def start_thread(call: Callable[[], Result], *, name: str) -> Future[Result]:
    """Run `call` in a thread that never keeps the process from ending, unlike an executor's."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  (whoever holds the future gets it)
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


class Call(Generic[Piece, Result]):
    """One call that gives pieces to a callback before it returns. Belongs to one event loop."""

    def __init__(
        self, call: Callable[[Callable[[Piece], None]], Result], gate: Gate, *, name: str
    ) -> None:
        """Raises ShuttingDown or TooBusy; else the thread has been started."""
        gate.enter()
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Piece | Future[Result]] = asyncio.Queue()
        self._is_cancelled = threading.Event()
        future = start_thread(lambda: call(self._take), name=name)
        future.add_done_callback(lambda _: gate.leave())
        future.add_done_callback(self._put)

    def cancel(self) -> None:
        """End the call at its next piece; after its end, nothing."""
        self._is_cancelled.set()

    async def next(self, *, within_s: float) -> Piece | Future[Result] | None:
        """The next piece; the finished future after the last; None where neither came in time."""
        try:
            async with asyncio.timeout(within_s):
                return await self._items.get()
        except TimeoutError:
            return None

    def _take(self, piece: Piece) -> None:
        if self._is_cancelled.is_set():
            raise CallCancelled
        self._put(piece)

    def _put(self, item: Piece | Future[Result]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

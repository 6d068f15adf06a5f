"""Child processes that belong together: started, listened to, and ended as one.

Owns their common life, on one thread of its own: labelling what they print, passing signals on,
and the time between the first failure and the last SIGKILL. Refuses to know what they compute and
where they meet. Installs no signal handler: a command does that.

When one fails, the others have GRACE_S to notice by themselves and say so; then SIGTERM, and
TERM_S later SIGKILL; stopped processes too. If this process dies, they die with it.
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Self

from orchestrator.cluster.child import Child, Command, Guard
from orchestrator.cluster.ended import Ended
from orchestrator.cluster.labels import LabelledLines

GRACE_S, TERM_S = 4.0, 2.0
# A server that is told to stop finishes what it is doing.
SIGNAL_GRACE_S = 15.0
# What a grandchild in a session of its own keeps open is not waited for.
_DRAIN_S = 1.0
_READ_BYTES = 65536


def write_line(text: str) -> None:
    """Write a line to stderr at once; a reader that has gone is no fault of the ranks."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class Supervisor:
    """Runs commands while the context lasts; on leaving it, all of them are gone.

    `echo` gets each labelled line, on the supervisor's thread. The methods may be called from any
    thread, inside the context.
    """

    def __init__(
        self, commands: Sequence[Command], *, echo: Callable[[str], object] = write_line
    ) -> None:
        self._commands = tuple(commands)
        self._echo = echo
        self._is_muted = False
        self._is_closed = False
        self._was_signalled = False
        self._running: list[Child] = []
        self._gone: list[Child] = []
        self._steps: list[_Step] = []
        self._requests: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_started, self._is_done = threading.Event(), threading.Event()
        self._fault: BaseException | None = None
        # The leash is tied to the thread that starts a child: to this one, and to no caller's.
        self._thread = threading.Thread(target=self._run, name="longspan-ranks", daemon=True)

    def __enter__(self) -> Self:
        """Start the commands."""
        self._thread.start()
        self._is_started.wait()
        if self._fault is not None:
            self._close()
            raise self._fault
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop what still runs."""
        self.stop(grace_s=GRACE_S)
        self._close()

    def wait(self) -> list[Ended]:
        """Wait until all commands have ended; how they did, in the order in which they did."""
        self._is_done.wait()
        if self._fault is not None:
            raise self._fault
        return [child.describe() for child in self._gone]

    def stop(self, *, grace_s: float) -> list[Ended]:
        """End the commands: wait `grace_s` for them, then make them."""
        self._ask(partial(self._plan_end, grace_s))
        return self.wait()

    def forward(self, number: int) -> None:
        """Pass a signal on to every command and its children; the second one kills them.

        May be called inside a signal handler, and before the commands have started.
        """
        self._ask(partial(self._forward, number))

    def mute(self) -> None:
        """Echo nothing more: what the commands say from now on is known already."""
        self._is_muted = True

    def _close(self) -> None:
        self._thread.join()
        self._is_closed = True
        os.close(self._wake)

    def _ask(self, request: Callable[[], None]) -> None:
        """Have the thread do something, once it runs; nothing any more afterwards."""
        if not self._is_closed:
            self._requests.put(request)
            os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        """The thread: start, watch, and leave nothing behind whatever happens."""
        try:
            watcher = Guard()
            try:
                with selectors.DefaultSelector() as selector:
                    self._watch(selector, watcher)
            finally:
                self._clean_up()
                watcher.close()
        except BaseException as error:  # noqa: BLE001 - raised again on the caller's thread
            self._fault = error
        finally:
            self._is_done.set()
            self._is_started.set()

    def _watch(self, selector: selectors.BaseSelector, watcher: Guard) -> None:
        selector.register(self._wake, selectors.EVENT_READ, self._answer)
        for command in self._commands:
            self._start(command, watcher, selector)
        self._is_started.set()
        while self._running:
            self._turn(selector, self._time_left_s())
            self._follow_plan()
        drain_until_s = time.monotonic() + _DRAIN_S
        while len(selector.get_map()) > 1 and time.monotonic() < drain_until_s:
            self._turn(selector, _DRAIN_S)

    def _start(self, command: Command, watcher: Guard, selector: selectors.BaseSelector) -> None:
        child = Child(command, watcher, self._say)
        self._running.append(child)
        selector.register(child.pidfd, selectors.EVENT_READ, partial(self._reap, child, selector))
        for stream, lines in child.streams:
            read = partial(_read, stream, lines, selector)
            selector.register(stream, selectors.EVENT_READ, read)

    def _turn(self, selector: selectors.BaseSelector, timeout_s: float | None) -> None:
        for key, _ in selector.select(timeout_s):
            key.data()

    def _answer(self) -> None:
        os.eventfd_read(self._wake)
        while not self._requests.empty():
            self._requests.get()()

    def _reap(self, child: Child, selector: selectors.BaseSelector) -> None:
        selector.unregister(child.pidfd)
        code = child.reap()
        self._running.remove(child)
        self._gone.append(child)
        # After a signal a code other than 0 is no failure, and there is a plan.
        if code != 0 and not self._was_signalled:
            self._plan_end(GRACE_S)

    def _forward(self, number: int) -> None:
        if self._was_signalled:
            self._steps = [_Step(at_s=time.monotonic(), number=signal.SIGKILL)]
            return
        self._was_signalled = True
        for child in self._running:
            child.signal(number)
        self._plan_end(SIGNAL_GRACE_S)

    def _plan_end(self, grace_s: float) -> None:
        """Plan the end of those that run; an earlier plan stands where it is sooner."""
        term_s = time.monotonic() + grace_s
        if self._steps and self._steps[-1].at_s <= term_s + TERM_S:
            return
        self._steps = [
            _Step(at_s=term_s, number=signal.SIGTERM),
            _Step(at_s=term_s + TERM_S, number=signal.SIGKILL),
        ]

    def _time_left_s(self) -> float | None:
        return max(0.0, self._steps[0].at_s - time.monotonic()) if self._steps else None

    def _follow_plan(self) -> None:
        while self._steps and self._steps[0].at_s <= time.monotonic():
            step = self._steps.pop(0)
            for child in self._running:
                child.was_stopped = True
                self._say(f"[{child.command.label}] still runs; sent {step.number.name}")
                child.signal(step.number)
                # A stopped one hears a signal once it goes on.
                child.signal(signal.SIGCONT)

    def _clean_up(self) -> None:
        for child in self._running:
            child.reap()
        for child in self._gone + self._running:
            child.close()

    def _say(self, line: str) -> None:
        if not self._is_muted:
            self._echo(line)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A signal to all that still run, at a time of the monotonic clock."""

    at_s: float
    number: signal.Signals


def _read(stream: IO[bytes], lines: LabelledLines, selector: selectors.BaseSelector) -> None:
    data = os.read(stream.fileno(), _READ_BYTES)
    if data:
        lines.feed(data)
        return
    lines.finish()
    selector.unregister(stream)
    stream.close()

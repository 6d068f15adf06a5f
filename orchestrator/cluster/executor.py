"""Executors: one protocol for running a step on every rank, whoever started the ranks.

Owns the numbering, encoding and comparing of steps, their order (one at a time, first come first
served), and the heartbeat that notices a lost rank between questions. Refuses to know what a step
does. Rank 0 is always this process: it plans, sends and takes part.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from collectives import Group, SoloGroup, read_rendezvous
from orchestrator.cluster.rank import compare, identity_of, joined, load_worker
from orchestrator.config import EXTERNAL, EngineConfig, num_ranks
from orchestrator.steps import Action, Chain, Heartbeat, StepPlan, Stop
from orchestrator.worker import AgreedFault, Worker

HEARTBEAT_S = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProgress:
    """steps_done: by every rank of num_ranks, for a step ends together; idle_s: since the last
    ended; running_s: that the present one has taken, None between steps; is_broken: whether a rank
    was lost.
    """

    num_ranks: int
    steps_done: int
    idle_s: float
    running_s: float | None
    is_broken: bool


class Executor(Protocol):
    """Runs steps. `worker` is rank 0's; load_s: seconds that its weights took; free_bytes: of the
    rank with the least memory, for documents and questions.
    """

    worker: Worker
    load_s: float
    free_bytes: int

    def run(self, action: Action) -> Any:
        """Carry one action out on every rank; returns rank 0's result.

        Callers of several threads take turns. Raises what all ranks agreed on (they can go on), or
        PeerLost and RankMismatch, after which nothing can be run any more.
        """

    @property
    def failure(self) -> BaseException | None:
        """Why nothing can be run any more, or None."""

    def progress(self) -> StepProgress:
        """How far the ranks are."""

    def close(self) -> None:
        """Let all ranks go; a second call does nothing."""


class InProcessExecutor:
    """One rank, this process: an action is carried out where it is planned."""

    def __init__(self, config: EngineConfig) -> None:
        loaded = load_worker(config, SoloGroup())
        self.worker, self.load_s = loaded.worker, loaded.load_s
        self.free_bytes = loaded.free_bytes
        self._turn = Turn()
        self._clock = _Clock()

    @property
    def failure(self) -> BaseException | None:
        """Always None."""
        return None

    def progress(self) -> StepProgress:
        """How far this process is."""
        return self._clock.read(num_ranks=1, is_broken=False)

    def run(self, action: Action) -> Any:
        """Carry the action out."""
        with self._turn, self._clock:
            try:
                return self.worker.execute(action)
            except AgreedFault as fault:
                raise fault.error from fault

    def close(self) -> None:
        """Release the documents."""
        self.worker.close()


class GroupExecutor:
    """Rank 0 of several: sends each step to the others and carries it out with them."""

    def __init__(self, config: EngineConfig, group: Group) -> None:
        loaded = load_worker(config, group)
        self.worker, self.load_s = loaded.worker, loaded.load_s
        self.free_bytes = loaded.free_bytes
        self._group, self._ranks = group, ExitStack()
        self._chain = Chain(identity_of(config, self.worker.model))
        self._num_steps = 0
        self._turn, self._clock = Turn(), _Clock()
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self, ranks: ExitStack) -> None:
        """Take over what holds the group and the other ranks: when it is left they are gone, and an
        error that one of them caused becomes that rank's own.
        """
        self._ranks = ranks
        self._heart.start()

    @property
    def failure(self) -> BaseException | None:
        """The error after which nothing can be run any more, or None."""
        return self._failure

    def run(self, action: Action) -> Any:
        """Send the action to all ranks and carry it out with them."""
        with self._turn, self._clock:
            if self._failure is not None:
                raise self._failure
            try:
                return self._step(action)
            except AgreedFault as fault:
                raise fault.error from fault
            except BaseException as error:
                self._failure = self._leave(error)
                if self._failure is error:
                    raise
                raise self._failure from error

    def _step(self, action: Action) -> Any:
        plan = StepPlan(step=self._num_steps, action=action).encode()
        self._num_steps += 1
        self._group.control.broadcast_bytes(plan)
        compare(self._chain.add(plan), self._group)
        return self.worker.execute(action)

    def progress(self) -> StepProgress:
        """How far all ranks are."""
        return self._clock.read(num_ranks=self._group.size, is_broken=self._failure is not None)

    def _leave(self, error: BaseException) -> BaseException:
        """End the other ranks after an error; returns that error, or what caused it."""
        try:
            self._ranks.__exit__(type(error), error, error.__traceback__)
        except Exception as cause:  # noqa: BLE001  (it is raised by whoever asked)
            return cause
        return error

    def _beat(self) -> None:
        """Between questions, take a step now and then: whoever is gone is noticed."""
        while not self._closing.wait(HEARTBEAT_S):
            try:
                self.run(Heartbeat())
            except Exception:  # noqa: BLE001  (kept as the failure: whoever runs the next is told)
                return

    def close(self) -> None:
        """Tell the ranks to stop, and wait until they are gone."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._heart.join()
        try:
            if self._failure is None:
                self.run(Stop())
                self._ranks.close()
        finally:
            self.worker.close()


class Turn:
    """A lock that is given in the order in which it was asked for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    def __enter__(self) -> None:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket)
            except BaseException:
                self._waiting.remove(ticket)
                self._changed.notify_all()
                raise

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._waiting.popleft()
            self._changed.notify_all()


class _Clock:
    """Counts and times steps; entered by one at a time."""

    def __init__(self) -> None:
        self._steps_done, self._ended = 0, time.monotonic()
        self._began: float | None = None

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._steps_done += 1
        self._ended, self._began = time.monotonic(), None

    def read(self, *, num_ranks: int, is_broken: bool) -> StepProgress:
        """The present state."""
        now, began = time.monotonic(), self._began
        return StepProgress(
            num_ranks=num_ranks,
            steps_done=self._steps_done,
            idle_s=now - self._ended,
            running_s=None if began is None else now - began,
            is_broken=is_broken,
        )


def open_executor(config: EngineConfig) -> Executor:
    """Start or meet the ranks of `config` and load their shards.

    Raises UsageError, a ModelError, MeshInvalid, RendezvousFailed, RankFailed.
    """
    if num_ranks(config.mesh) == 1:
        return InProcessExecutor(config)
    with ExitStack() as stack:
        group = stack.enter_context(_ranks(config))
        executor = GroupExecutor(config, group)
        executor.start(stack.pop_all())
        return executor
    raise AssertionError("a context manager swallowed an error")


@contextmanager
def _ranks(config: EngineConfig) -> Iterator[Group]:
    """Rank 0's group, once all ranks have met; on leaving, the others are gone."""
    with ExitStack() as stack:
        if config.executor == EXTERNAL:
            rendezvous = read_rendezvous(timeout_s=config.timeout_s)
        elif config.executor == "ray":
            from orchestrator.cluster.ray_ranks import ray_ranks

            rendezvous = stack.enter_context(ray_ranks(config, num_ranks(config.mesh)))
        else:
            from orchestrator.cluster.spawn import spawn_ranks

            rendezvous = stack.enter_context(spawn_ranks(config, num_ranks(config.mesh)))
        yield stack.enter_context(joined(rendezvous, config))

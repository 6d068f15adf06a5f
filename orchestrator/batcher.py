"""Which questions take a step together: continuous batching, without a thread of its own.

Owns the tokens that wait for a step. Whoever brings a token when no step is under way plans the
next one, for all that wait, and hands the others their logits: a question joins with its first
token and leaves with its last, and nobody waits for a question that has not come. Refuses to know
how a step is carried out (`questions.py`), and answers.

Questions that took the last step together bring their next tokens at about the same time; a step
waits for them, at most as long as the last one took: then two steps would have been no slower. It
does not where several tokens in a step save nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from orchestrator.steps import Action, ForwardEach

# More is not worth waiting for: choosing a token takes a millisecond.
MAX_WAIT_S = 0.01


class _Ticket:
    """A token that waits, then its outcome."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.outcome: Tensor | BaseException | None = None


class Batcher:
    """run: carries out an action on all ranks; waits: whether a step waits for those that took the
    last one.
    """

    def __init__(self, run: Callable[[Action], Any], *, waits: bool) -> None:
        self._run, self._waits = run, waits
        self._changed = threading.Condition()
        self._waiting: dict[int, _Ticket] = {}
        self._expected: set[int] = set()
        self._is_stepping = False
        self._deadline = 0.0

    def forward(self, question_id: int, token: int) -> Tensor:
        """Logits [V] float32 after the token, in a step with whatever else waits.

        Raises what the question met in it.
        """
        ticket = _Ticket(token)
        with self._changed:
            self._waiting[question_id] = ticket
            self._changed.notify_all()
            try:
                while ticket.outcome is None and not self._may_step():
                    self._changed.wait(self._patience())
            except BaseException:
                self._waiting.pop(question_id, None)
                raise
            taken = {} if ticket.outcome is not None else self._take()
        if taken:
            self._step(taken)
        assert ticket.outcome is not None
        if isinstance(ticket.outcome, BaseException):
            raise ticket.outcome
        return ticket.outcome

    def leave(self, question_id: int) -> None:
        """The question brings no more tokens: nobody waits for it."""
        with self._changed:
            self._expected.discard(question_id)
            self._changed.notify_all()

    def _may_step(self) -> bool:
        is_complete = self._expected <= self._waiting.keys()
        return not self._is_stepping and (is_complete or time.monotonic() >= self._deadline)

    def _patience(self) -> float | None:
        """How long to wait before another look: a step that is under way ends with a notice."""
        return None if self._is_stepping else max(0.0, self._deadline - time.monotonic())

    def _take(self) -> dict[int, _Ticket]:
        """All that wait, in order of their questions."""
        taken = dict(sorted(self._waiting.items()))
        self._waiting.clear()
        self._is_stepping = True
        return taken

    def _step(self, taken: dict[int, _Ticket]) -> None:
        began = time.monotonic()
        outcomes: list[Any]
        try:
            ids = tuple(ticket.token for ticket in taken.values())
            outcomes = self._run(ForwardEach(question_ids=tuple(taken), ids=ids))
        except BaseException as error:  # noqa: BLE001  (each of them raises it)
            outcomes = [error] * len(taken)
        with self._changed:
            for ticket, outcome in zip(taken.values(), outcomes, strict=True):
                ticket.outcome = outcome
            ended = time.monotonic()
            self._expected = set(taken) if self._waits else set()
            self._deadline = ended + min(ended - began, MAX_WAIT_S)
            self._is_stepping = False
            self._changed.notify_all()

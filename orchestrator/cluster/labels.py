"""What a rank prints, cut into lines that say whose they are.

Owns the label, the cutting of a byte stream into lines, and the memory of the last one. Refuses to
know where lines go.
"""

from __future__ import annotations

from collections.abc import Callable

MAX_LINE_BYTES = 16384


class LabelledLines:
    """Cuts one stream into lines and hands each on as `[label] text`.

    last_line: the last one that was not blank, without its label; empty before that.
    """

    __slots__ = ("_begun", "_echo", "_label", "_mark", "last_line")

    def __init__(self, label: str, echo: Callable[[str], object]) -> None:
        self._label = f"[{label}] "
        # torch marks tracebacks of its ranks too.
        self._mark = f"[{label.replace(' ', '')}]: "
        self._echo = echo
        self._begun = b""
        self.last_line = ""

    def feed(self, data: bytes) -> None:
        """Take the next bytes; a line without an end is cut at MAX_LINE_BYTES."""
        *lines, self._begun = (self._begun + data).split(b"\n")
        if len(self._begun) > MAX_LINE_BYTES:
            lines.append(self._begun)
            self._begun = b""
        for line in lines:
            self._hand_on(line)

    def finish(self) -> None:
        """The stream has ended, perhaps inside a line."""
        if self._begun:
            self._hand_on(self._begun)
        self._begun = b""

    def _hand_on(self, line: bytes) -> None:
        # Of a line that was drawn over and over, such as a progress bar, the last state counts.
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", errors="replace")
        text = text.removeprefix(self._mark)
        if text.strip():
            self.last_line = " ".join(text.split())
        self._echo(self._label + text)

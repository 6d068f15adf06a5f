"""What the pages say is true: their Python runs, their symbols and links exist.

Python blocks of one page share a namespace and run from top to bottom in an empty folder. Blocks
marked `console` show a terminal and are not run; there is no mark that excuses Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.source import ROOT, Source

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOUR = ROOT / "docs" / "tour.md"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
EXCUSE = "<!-- no-run -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: its language, text, and the line it begins at."""

    language: str
    text: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """A row of the tour: a file and a symbol that it defines."""

    file: str
    symbol: str


def find_blocks(page: str) -> list[Block]:
    """Fenced blocks in order."""
    return [
        Block(language=match[1], text=match[2], line=page.count("\n", 0, match.start(2)) + 1)
        for match in FENCE.finditer(page)
    ]


def find_stops(page: str) -> Iterator[Stop]:
    """Every symbol in the second cell of the table rows whose first cell is a Python file."""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        file = re.match(r"`([\w/]+\.py)`", cells[0])
        if line.lstrip().startswith("|") and file and len(cells) > 1:
            for symbol in re.findall(r"`([A-Za-z_][\w.]*)(?:\(\))?`", cells[1]):
                yield Stop(file=file[1], symbol=symbol)


def find_broken(page: str) -> list[str]:
    """Stops of a tour whose file or symbol does not exist."""
    broken = []
    for stop in find_stops(page):
        path = ROOT / stop.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if stop.symbol not in Source.parse(path, text).definitions():
            broken.append(f"{stop.file}: {stop.symbol}")
    return broken


def run_blocks(page: Path) -> int:
    """Run the Python blocks of a page; returns how many there were."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = [
        block
        for block in find_blocks(page.read_text(encoding="utf-8"))
        if block.language in ("python", "py")
    ]
    for block in blocks:
        # Blank lines before it make a traceback name the page's own line.
        program = "\n" * (block.line - 1) + block.text
        exec(compile(program, str(page), "exec"), namespace)
    return len(blocks)


def page_name(page: Path) -> str:
    """Name of a page in the test's id."""
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGSPAN_STORE", str(tmp_path / "store"))
    run_blocks(page)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_page_has_no_excuses_and_no_dead_links(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert EXCUSE not in text
    links = [link for link in LINK.findall(text) if not re.match(r"\w+:", link)]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.skipif(not TOUR.exists(), reason="the tour is written when its last file stands")
def test_tour_names_what_exists() -> None:
    page = TOUR.read_text(encoding="utf-8")
    assert len(list(find_stops(page))) >= 10
    assert find_broken(page) == []


def test_blocks_share_a_namespace_and_fail_at_their_own_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n```console\n$ x\n```\n```python\nassert x == 1\n```\n")
    assert run_blocks(page) == 2
    page.write_text("text\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_blocks(page)
    assert caught.traceback[-1].lineno + 1 == 5


def test_tour_rows_are_resolved() -> None:
    page = (
        "| file | symbol |\n|---|---|\n"
        "| `tests/test_docs.py` | `find_stops`, `Block.line`, `nothing` | how |\n"
        "| `tests/gone.py` | `find_stops()` |\n"
        "| prose | `ignored` |\n"
    )
    assert len(list(find_stops(page))) == 4
    assert find_broken(page) == ["tests/test_docs.py: nothing", "tests/gone.py: find_stops"]

"""`python -m benchmarks.lines`: the line report of `make check`, one line a package.

Owns counting. The caps themselves are tests (`tests/test_ratchets.py`).
"""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("orchestrator", "sparse_attn", "kv_store", "collectives", "benchmarks", "tests")


def function_lengths(source: str) -> list[int]:
    """Lines of each function and method, decorators left out."""
    return [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def main() -> int:
    """Print files, lines, the longest file and the median function of each folder."""
    total = 0
    for folder in FOLDERS:
        sources = {
            path: path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).rglob("*.py"))
        }
        lines = {path: len(text.splitlines()) for path, text in sources.items()}
        if not lines:
            continue
        functions = [length for text in sources.values() for length in function_lengths(text)]
        longest = max(lines, key=lambda path: lines[path])
        median = statistics.median(functions) if functions else 0
        total += sum(lines.values())
        print(
            f"{folder:<14}{len(lines):>4} files {sum(lines.values()):>6} lines   functions: median "
            f"{median:g}   longest file {longest.relative_to(ROOT)} {lines[longest]}"
        )
    print(f"{'all':<14}{'':>10} {total:>6} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())

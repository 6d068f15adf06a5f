"""`python -m benchmarks.bar ROW [--save]`: runs the one script that measures a row.

Owns finding `benchmarks/bars/<row>.py` and its `main() -> int`. Refuses to know any row.
Exit code 0: the row holds; 1: it does not; 2: there is no such row.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

BARS = Path(__file__).resolve().parent / "bars"


def list_rows() -> list[str]:
    """Names of the rows that have a script, `A2` before `A10`."""
    rows = [path.stem.upper() for path in BARS.glob("[a-z][0-9]*.py")]
    return sorted(rows, key=lambda row: (row[0], int("".join(filter(str.isdigit, row)))))


def main(arguments: list[str]) -> int:
    """Run the row that the first argument names; the row reads the rest from `sys.argv`."""
    rows = list_rows()
    row = arguments[0].upper() if arguments else ""
    if row not in rows:
        print(
            f"bar: no row {row or '(none given)'!s}; rows are {', '.join(rows) or 'none yet'}; "
            "run make bar ROW=NAME",
            file=sys.stderr,
        )
        return 2
    sys.argv[1:] = arguments[1:]
    code = importlib.import_module(f"benchmarks.bars.{row.lower()}").main()
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

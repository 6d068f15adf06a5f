"""Times of row B4's long document on the GPUs that are here, without the demo's document.

For machines that the default model's file does not reach: `python -m benchmarks.one_gpu`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.bars.b4 import LONG_MODEL, LONG_TOKENS, time_long
from benchmarks.harness import environment


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--long-model", default=LONG_MODEL)
    parser.add_argument("--long-tokens", type=int, default=LONG_TOKENS)
    parser.add_argument("--counts", type=int, nargs="+", default=[1])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = {
            str(count): time_long(count, arguments, Path(folder) / str(count))
            for count in arguments.counts
        }
    result = {"model": arguments.long_model, "long": times, "environment": environment()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

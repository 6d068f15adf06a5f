"""Row C12, safety: inputs that no kernel was made for, and the kernels under compute-sanitizer.

The first half is tests that need no GPU: each wrong type, shape, device, layer or number must give
an error with a name before anything is launched. The second runs the GPU tests of the kernels under
the sanitizer's memcheck, with torch's caching allocator off, so that a byte beside a tensor is a
fault; most of its time is compiling, so shares of the tests run side by side. `--files NAME ...`
picks files; `--tool racecheck` another check; `--processes N` how many shares.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.harness import ROOT, note, print_row

BAR = "a named error before launch for whatever does not fit; compute-sanitizer finds nothing"
CHECKS = (
    "tests/sparse_attn/test_decode_checks.py",
    "tests/sparse_attn/test_kernel_listed.py",
    "tests/sparse_attn/test_kernel_layer.py",
    "tests/model/test_sampler.py",
)
NAMED = "refused or no_number"
KERNELS = ("decode", "fp8", "kmeans", "layer", "listed", "prefill", "prefill_select")
CUDA_TOOLS = Path("/usr/local/cuda/bin")
SHARE_S = 900.0
NO_CACHING = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def main() -> int:
    """Measure and print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", nargs="*", default=list(KERNELS), help="of test_kernel_NAME.py")
    parser.add_argument("--tool", default="memcheck")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/C12.json")
    args = parser.parse_args()
    named = _run([*PYTEST, *CHECKS, "-k", NAMED])
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{CUDA_TOOLS}")
    faults: dict[str, str] = {}
    tests: list[str] = []
    if sanitizer is not None and torch.cuda.is_available():
        tests = collect_tests([f"tests/sparse_attn/test_kernel_{name}.py" for name in args.files])
        check = [sanitizer, "--tool", args.tool, "--error-exitcode", "99", *PYTEST, "-m", "gpu"]
        shares = share_out(tests, args.processes)
        with ThreadPoolExecutor(len(shares)) as pool:
            found = pool.map(lambda own: _run([*check, *own], **NO_CACHING), shares)
            for own, fault in zip(shares, found, strict=True):
                note(f"{own[0]} and {len(own) - 1} more: {'clean' if fault is None else fault}")
                if fault is not None:
                    faults[own[0]] = fault[-2000:]
    return print_row(
        row="C12",
        measured={
            "named_errors": named is None,
            "named_errors_fault": named,
            "sanitizer": sanitizer,
            "tool": args.tool,
            "num_tests": len(tests),
            "faults": faults,
        },
        bar=BAR,
        holds=named is None and bool(tests) and not faults and set(args.files) >= set(KERNELS),
    )


def collect_tests(files: list[str]) -> list[str]:
    """Names of the tests of some files that need a GPU; an error where a file has none."""
    command = [*PYTEST, "--collect-only", "-m", "gpu", *files]
    printed = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True).stdout
    found = [line for line in printed.splitlines() if "::" in line]
    for file in files:
        if not any(name.startswith(f"{file}::") for name in found):
            raise SystemExit(f"{file}: no test needs a GPU; name files that have some")
    return found


def share_out(tests: list[str], num_shares: int) -> list[list[str]]:
    """At most so many shares of neighbours, which compile much the same, none of them empty."""
    size = max(1, math.ceil(len(tests) / max(1, num_shares)))
    return [tests[start : start + size] for start in range(0, len(tests), size)]


def _run(command: list[str], **environment: str) -> str | None:
    """None where it ended well and ran a test, else the end of what it printed."""
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=SHARE_S,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {SHARE_S:.0f} s"
    printed = done.stdout + done.stderr
    ran = re.search(r"\b(\d+) passed", printed)
    return None if done.returncode == 0 and ran else printed[-4000:]


if __name__ == "__main__":
    sys.exit(main())

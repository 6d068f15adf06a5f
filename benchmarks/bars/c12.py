"""Row C12, safety: inputs that no kernel was made for, and the kernels under compute-sanitizer.

The first half is tests that need no GPU: each wrong type, shape, device, layer or number must give
an error with a name before anything is launched. The second runs GPU tests of the kernels one
process a file under the sanitizer's memcheck, with torch's caching allocator off, so that a byte
beside a tensor is a fault. `--files NAME ...` picks files; `--tool racecheck` another check.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
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
KERNELS = ("decode", "fp8", "kmeans", "layer", "listed", "prefill", "sample")
CUDA_TOOLS = Path("/usr/local/cuda/bin")
FILE_S = 900.0


def main() -> int:
    """Measure and print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", nargs="*", default=list(KERNELS), help="of test_kernel_NAME.py")
    parser.add_argument("--tool", default="memcheck")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/C12.json")
    args = parser.parse_args()
    named = _run([sys.executable, "-m", "pytest", "-q", *CHECKS, "-k", NAMED])
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{CUDA_TOOLS}")
    faults: dict[str, str] = {}
    checked: list[str] = []
    if sanitizer is not None and torch.cuda.is_available():
        for name in args.files:
            found = _run(
                [
                    *(sanitizer, "--tool", args.tool, "--error-exitcode", "99"),
                    *(sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu"),
                    f"tests/sparse_attn/test_kernel_{name}.py",
                ],
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )
            note(f"{name}: {'clean' if found is None else found[-200:]}")
            checked.append(name)
            if found is not None:
                faults[name] = found[-2000:]
    return print_row(
        row="C12",
        measured={
            "named_errors": named is None,
            "named_errors_fault": named,
            "sanitizer": sanitizer,
            "tool": args.tool,
            "checked": checked,
            "faults": faults,
        },
        bar=BAR,
        holds=named is None and not faults and set(checked) == set(KERNELS),
    )


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
            timeout=FILE_S,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {FILE_S:.0f} s"
    printed = done.stdout + done.stderr
    ran = re.search(r"\b(\d+) passed", printed)
    return None if done.returncode == 0 and ran else printed[-4000:]


if __name__ == "__main__":
    sys.exit(main())

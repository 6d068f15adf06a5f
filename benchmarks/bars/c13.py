"""Row C13, kernels for two vendors: every Triton kernel compiled for sm_90 and for gfx942.

Owns the compiling: without a GPU, each entry of each list `tests/sparse_attn/compile_list_*.py`,
in processes of their own that do not interpret kernels and share an empty cache. `--each-once`
compiles one entry of each kernel. Runs nothing that it compiled.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, note, print_row

BAR = "every kernel compiles for sm_90 (cubin) and for gfx942 (hsaco) on a machine without a GPU"
TARGETS: dict[str, tuple[str | int, int, str]] = {
    "cuda": (90, 32, "cubin"),
    "hip": ("gfx942", 64, "hsaco"),
}
LISTS = ROOT / "tests" / "sparse_attn"
KERNELS = ROOT / "sparse_attn" / "kernels"
NUM_PROCESSES = 2
Entry = tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]


def main() -> int:
    """Measure the row."""
    options = _options()
    if options.share is not None:
        print(json.dumps(compile_share(options.share, each_once=options.each_once)))
        return 0
    with tempfile.TemporaryDirectory() as cache:
        done = compile_all(Path(cache), each_once=options.each_once)
    failures = [fault for own in done for fault in own["failures"]]
    for fault in failures:
        note(fault)
    listed = {name for own in done for name in own["kernels"]}
    measured = {
        "num_compiled": {t: sum(own["num_compiled"][t] for own in done) for t in TARGETS},
        "num_entries": {t: sum(own["num_entries"][t] for own in done) for t in TARGETS},
        "num_kernels": len(listed),
        "failures": failures,
        "not_listed": sorted(find_kernels() - listed),
        "each_once": options.each_once,
    }
    holds = not failures and not measured["not_listed"] and bool(listed)
    return print_row(row="C13", measured=measured, bar=BAR, holds=holds)


def find_kernels() -> set[str]:
    """Names of the kernels of sparse_attn: functions under `triton.jit` that end in `_kernel`."""
    found = set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                marks = {ast.unparse(mark).partition("(")[0] for mark in node.decorator_list}
                if "triton.jit" in marks:
                    found.add(node.name)
    return found


def compile_all(cache: Path, *, each_once: bool) -> list[dict[str, Any]]:
    """Compile everything over `NUM_PROCESSES`; what `compile_share` returned in each."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.bars.c13"]
    command += ["--each-once"] if each_once else []
    processes = [
        subprocess.Popen(
            [*command, "--share", str(share)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for share in range(NUM_PROCESSES)
    ]
    answers = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode != 0:
            raise SystemExit(f"row C13: compiling ended with {process.returncode}; see stderr")
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def compile_share(share: int, *, each_once: bool) -> dict[str, Any]:
    """Every `NUM_PROCESSES`-th entry, for both targets: counts, names of all kernels, faults."""
    failures: list[str] = []
    num_entries, num_compiled = dict.fromkeys(TARGETS, 0), dict.fromkeys(TARGETS, 0)
    names: set[str] = set()
    for target in TARGETS:
        entries = list(_listed(target))
        names |= {entry[0].__name__ for entry in entries}
        if each_once:
            entries = list({entry[0].__name__: entry for entry in reversed(entries)}.values())
        for entry in entries[share::NUM_PROCESSES]:
            fault = _compile(target, entry)
            num_entries[target] += 1
            num_compiled[target] += fault is None
            failures += [] if fault is None else [f"{target} {_describe(entry)}: {fault}"]
    return {
        "num_entries": num_entries,
        "num_compiled": num_compiled,
        "kernels": sorted(names),
        "failures": failures,
    }


def _listed(target: str) -> Iterator[Entry]:
    """The entries of all lists; some have their own for AMD."""
    for path in sorted(LISTS.glob("compile_list_*.py")):
        module = importlib.import_module(f"tests.sparse_attn.{path.stem}")
        own = module.KERNELS
        yield from getattr(module, "KERNELS_AMD", own) if target == "hip" else own


def _compile(target: str, entry: Entry) -> str | None:
    """What went wrong, None where the object came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, options = entry
    arch, warp_size, kind = TARGETS[target]
    if set(kernel.arg_names) != signature.keys() | constants.keys():
        odd = sorted(set(kernel.arg_names) ^ (signature.keys() | constants.keys()))
        return f"the list and the kernel disagree about {odd}"
    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=full,
        constexprs=constants,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, (name, of) in enumerate(full.items())
            if is_aligned(name, of)
        },
    )
    try:
        compiled = triton.compile(
            source, target=GPUTarget(target, arch, warp_size), options=options
        )
    except Exception as fault:  # noqa: BLE001  # compilers have no tree of errors; all are reported
        return f"{type(fault).__name__}: {str(fault).strip()[-400:]}"
    return None if compiled.asm.get(kind) else f"no {kind}"


def is_aligned(name: str, kind: str) -> bool:
    """Whether an argument is a multiple of 16 at run time: pointers, strides, and padded counts."""
    return kind.startswith("*") or "stride" in name or name.endswith(("_row", "num_centres"))


def _describe(entry: Entry) -> str:
    kernel, signature, constants, options = entry
    kinds = ",".join(sorted({of for of in signature.values() if of.startswith("*")}))
    numbers = " ".join(f"{name}={value}" for name, value in {**constants, **options}.items())
    return f"{kernel.__name__} [{kinds}] {numbers}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each-once", action="store_true", help="one entry of each kernel")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/C13.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

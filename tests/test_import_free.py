"""Importing a package starts nothing and changes nothing.

Each claim is checked in a fresh interpreter. Libraries that the packages stand on are imported
first where they have effects of their own (numpy's BLAS starts threads).
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.source import PACKAGES, ROOT

CHECK_FREE = """
import importlib, os, signal, sys
import numpy, torch, safetensors.torch, xxhash

def observe():
    return {
        "environment": dict(os.environ),
        "threads": len(os.listdir("/proc/self/task")),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "torch threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "random state": torch.random.initial_seed(),
    }

before = observe()
importlib.import_module(sys.argv[1])
after = observe()
changed = [name for name in before if before[name] != after[name]]
assert not changed, f"importing {sys.argv[1]} changed {changed}"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert not torch.distributed.is_initialized(), "a process group was made"
"""

CHECK_LIGHT = """
import sys
import orchestrator
heavy = {"torch", "transformers", "faiss", "ray", "triton"} & set(sys.modules)
assert not heavy, f"import orchestrator brought {heavy}"
"""


def run_python(program: str, *arguments: str) -> str:
    """Stderr of a program, empty where it ended well."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize("package", PACKAGES)
def test_import_has_no_effects(package: str) -> None:
    assert run_python(CHECK_FREE, package) == ""


def test_orchestrator_is_light() -> None:
    assert run_python(CHECK_LIGHT) == ""


def test_the_check_sees_effects() -> None:
    """The checks above can fail: this one-line effect is caught."""
    effect = CHECK_FREE.replace(
        "importlib.import_module(sys.argv[1])", "os.environ['LONGSPAN_X'] = '1'"
    )
    assert "changed ['environment']" in run_python(effect, "nothing")

"""Limits that the project sets itself; they are tightened, never loosened, without a reason."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.source import FOLDERS, PACKAGES, Source, read_sources
from tests.surface import read_frozen, read_surface

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 80
MAX_TYPE_IGNORES = {"packages": 0, "rest": 10}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
MARK = "# type: " + "ignore"


def long_files(source: Source) -> Iterator[str]:
    """The file, where it is too long to be read in one sitting."""
    if source.num_lines > MAX_FILE_LINES:
        yield f"{source.num_lines} lines; limit {MAX_FILE_LINES}"


def long_functions(source: Source) -> Iterator[str]:
    """Functions that are too long."""
    for name, length in source.functions():
        if length > MAX_FUNCTION_LINES:
            yield f"{name} has {length} lines; limit {MAX_FUNCTION_LINES}"


def unsafe_loads(source: Source) -> Iterator[str]:
    """Ways to run code that came with data."""
    for name in source.imports():
        if name.split(".", maxsplit=1)[0] in PICKLES:
            yield f"imports {name}"
    yield from (f"uses {name}" for name in source.attributes() if name == "torch.load")
    for keyword in source.keywords():
        is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in ("trust_remote_code", "allow_pickle") and not is_false:
            yield f"passes {keyword.arg}"


def prints(source: Source) -> Iterator[str]:
    """Writes to stdout outside the command line's own files."""
    is_console = source.path.stem == "console" or source.path.stem.startswith("cli")
    if not is_console and "print" in source.called_names():
        yield "calls print"


def distributed(source: Source) -> Iterator[str]:
    """Uses of torch.distributed outside collectives."""
    if source.path.parts[0] != "collectives":
        names = {*source.imports(), *source.attributes()}
        yield from (f"uses {name}" for name in names if name.startswith("torch.distributed"))


def undescribed(source: Source) -> Iterator[str]:
    """Modules that do not say what they own."""
    if source.text.strip() and ast.get_docstring(source.tree) is None:
        yield "has no module docstring"


Rule = Callable[[Source], Iterator[str]]
EVERYWHERE: tuple[Rule, ...] = (long_files, long_functions, unsafe_loads, undescribed)
IN_PACKAGES: tuple[Rule, ...] = (prints, distributed)


def find_faults(rule: Rule, folders: tuple[str, ...]) -> list[str]:
    """One line a fault."""
    return [f"{source.path}: {text}" for source in read_sources(*folders) for text in rule(source)]


@pytest.mark.parametrize("rule", EVERYWHERE)
def test_rule_everywhere(rule: Rule) -> None:
    assert find_faults(rule, FOLDERS) == []


@pytest.mark.parametrize("rule", IN_PACKAGES)
def test_rule_in_packages(rule: Rule) -> None:
    assert find_faults(rule, PACKAGES) == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (long_files, "x = 1\n" * 351),
        (long_functions, "def f():\n" + "    x = 1\n" * 80),
        (unsafe_loads, "import pickle"),
        (unsafe_loads, "from dill import loads"),
        (unsafe_loads, "import torch\ntorch.load('x')"),
        (unsafe_loads, "f(trust_remote_code=True)"),
        (unsafe_loads, "f(trust_remote_code=flag)"),
        (unsafe_loads, "f(allow_pickle=True)"),
        (prints, "print('x')"),
        (distributed, "import torch.distributed as dist"),
        (distributed, "from torch import distributed"),
        (distributed, "import torch\ntorch.distributed.barrier()"),
        (undescribed, "x = 1"),
    ],
)
def test_each_rule_catches_what_it_is_for(rule: Rule, text: str) -> None:
    assert list(rule(Source.parse(Path("kv_store/example.py"), text))) != []


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (long_files, "a.py", "x = 1\n" * 350),
        (long_functions, "a.py", "def f():\n" + "    x = 1\n" * 79),
        (unsafe_loads, "a.py", "f(trust_remote_code=False)"),
        (prints, "orchestrator/cli_docs.py", "print('x')"),
        (prints, "orchestrator/console.py", "print('x')"),
        (distributed, "collectives/group.py", "import torch.distributed"),
        (undescribed, "a.py", '"""Owns nothing."""'),
        (undescribed, "a/__init__.py", ""),
    ],
)
def test_each_rule_leaves_the_rest_alone(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source.parse(Path(path), text))) == []


def test_type_ignores_do_not_spread() -> None:
    def count(*folders: str) -> int:
        return sum(source.text.count(MARK) for source in read_sources(*folders))

    rest = [folder for folder in FOLDERS if folder not in PACKAGES]
    assert count(*PACKAGES) <= MAX_TYPE_IGNORES["packages"]
    assert count(*rest) <= MAX_TYPE_IGNORES["rest"]


@pytest.mark.parametrize("part", ["flags", "names"])
def test_public_surface_is_frozen(part: str) -> None:
    present, frozen = read_surface()[part], read_frozen()[part]
    assert present == frozen, (
        "the public surface changed; if it is meant, run python -m tests.surface"
    )

"""The project's own source as the ratchets see it: files, functions, calls and imports.

Owns reading it, once. Refuses to judge: limits stand in `test_ratchets.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("orchestrator", "sparse_attn", "kv_store", "collectives")
FOLDERS = (*PACKAGES, "benchmarks", "tests", "examples")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One Python file of the project; `path` is relative to the repository's root."""

    path: Path
    text: str
    tree: ast.Module

    @classmethod
    def parse(cls, path: Path, text: str) -> Source:
        """Source of a file that may not exist."""
        return cls(path=path, text=text, tree=ast.parse(text))

    @property
    def num_lines(self) -> int:
        """Lines of the file."""
        return len(self.text.splitlines())

    def imports(self) -> Iterator[str]:
        """Full names of what the file imports, `a.b` and `a.b.c` for `from a.b import c`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    def attributes(self) -> Iterator[str]:
        """Dotted names that are read, such as `torch.load`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute | ast.Name):
                name = dotted(node)
                if name:
                    yield name

    def keywords(self) -> Iterator[ast.keyword]:
        """Keyword arguments of every call."""
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.keyword))

    def called_names(self) -> Iterator[str]:
        """Plain names that are called."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                yield node.func.id

    def functions(self) -> Iterator[tuple[str, int]]:
        """Name and length in lines of each function."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1

    def definitions(self) -> set[str]:
        """Names defined at the top level, and `Class.member` for the members of classes."""
        return set(_definitions(self.tree.body, prefix=""))


@cache
def read_sources(*folders: str) -> tuple[Source, ...]:
    """Every Python file of the given folders."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return tuple(
        Source.parse(path.relative_to(ROOT), path.read_text(encoding="utf-8")) for path in paths
    )


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain that begins with a name, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def _definitions(body: list[ast.stmt], *, prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef) and not prefix:
            yield from _definitions(node.body, prefix=f"{node.name}.")
        if isinstance(node, ast.Assign):
            yield from (prefix + dotted(target) for target in node.targets if dotted(target))
        if isinstance(node, ast.AnnAssign):
            yield prefix + dotted(node.target)

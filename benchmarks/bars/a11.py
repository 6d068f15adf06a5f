"""Row A11, stack manifest: its hash changes with what computes an answer, and with nothing else.

Owns the list of changes. Each is made to a whole engine on a tiny random model: hashes depend on no
model's size. The tiny model is that of the tests (`tests/tiny_model.py`).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import note, print_row
from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions
from orchestrator.types import Answer, Mode
from sparse_attn.select.centroid_build import CentroidParams

BAR = (
    "the hash changes with dtype, threads, selector, weights, library version, and nothing else "
    "(backend, device, mesh and determinism are facts of the manifest too)"
)
SEGMENT_TOKENS = 256


class Stacks:
    """Hashes of answers under one change at a time."""

    def __init__(self, folder: Path) -> None:
        """Make a tiny model below `folder`."""
        from tests.tiny_model import QUESTION, TEXT, save_tiny_model

        self.folder, self.text, self.question = folder, TEXT, QUESTION
        self.model = save_tiny_model(folder / "model")
        self.base = self.hash()

    def hash(
        self,
        *,
        model: Path | None = None,
        store: str = "store",
        name: str = "boxes",
        text: str | None = None,
        question: str | None = None,
        mode: Mode = "centroid",
        clusters: CentroidParams | None = None,
        engine: dict[str, Any] | None = None,
        ask: dict[str, Any] | None = None,
    ) -> str:
        """Ingest what is not there yet, ask, and return the hash of the answer's stack."""
        place = self.folder / store
        options = IngestOptions(
            segment_tokens=SEGMENT_TOKENS, clusters=clusters or CentroidParams(), restart=True
        )
        settings: dict[str, Any] = {"threads": 1, **(engine or {})}
        with Engine.load(str(model or self.model), store=place, **settings) as loaded:
            if name not in [info.name for info in loaded.docs()]:
                loaded.ingest(text=text or self.text, name=name, options=options)
            answer: Answer = loaded.ask(
                name, question or self.question, mode=mode, **{"max_tokens": 2, **(ask or {})}
            )
        return str(answer.stack["hash"])

    def changed_weights(self) -> Path:
        """A copy of the model in which one bit of one weight differs."""
        copy = Path(shutil.copytree(self.model, self.folder / "changed"))
        weights = copy / "model.safetensors"
        raw = bytearray(weights.read_bytes())
        raw[-4] ^= 1
        weights.write_bytes(raw)
        return copy


@contextmanager
def other_version(library: str, folder: Path) -> Iterator[None]:
    """Metadata of another version of a library, found before the installed one."""
    metadata = folder / f"{library}-99.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: 99.0\n")
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def measure(folder: Path) -> tuple[dict[str, bool], dict[str, bool]]:
    """By change: whether the hash followed it, and by everything else: whether it stayed."""
    stacks = Stacks(folder)
    with other_version("numpy", folder / "versions"):
        version = stacks.hash()
    coarse = CentroidParams(keys_per_cluster=32)
    changes = {
        "dtype": stacks.hash(engine={"dtype": "bfloat16"}, store="bfloat16"),
        "threads": stacks.hash(engine={"threads": 2}),
        "selector mode": stacks.hash(mode="exact"),
        "selector budget": stacks.hash(ask={"budget": "5%"}),
        "selector mass": stacks.hash(ask={"mass": 0.9}),
        "selector levels": stacks.hash(ask={"levels": 2}),
        "selector clusters": stacks.hash(clusters=coarse, store="coarse"),
        "weights": stacks.hash(model=stacks.changed_weights(), store="weights"),
        "library version": version,
    }
    moved = Path(shutil.copytree(stacks.model, folder / "elsewhere" / "other-name"))
    same = {
        "asked again": stacks.hash(),
        "document name": stacks.hash(name="crates"),
        "document text": stacks.hash(name="short", text=stacks.text[:700]),
        "question": stacks.hash(question="How many boxes are there?"),
        "store path": stacks.hash(store="other/place"),
        "model path": stacks.hash(model=moved),
        "seed and temperature": stacks.hash(ask={"seed": 7, "temperature": 0.7, "top_p": 0.9}),
        "max tokens": stacks.hash(ask={"max_tokens": 5}),
        "system text": stacks.hash(ask={"system": "Be brief."}),
        "audit": stacks.hash(ask={"audit": True}),
        "streaming": stacks.hash(ask={"on_token": lambda _: None}),
        "default budget by name": stacks.hash(ask={"budget": "12.5%"}),
    }
    return (
        {name: found != stacks.base for name, found in changes.items()},
        {name: found == stacks.base for name, found in same.items()},
    )


def main() -> int:
    """Measure the row."""
    with tempfile.TemporaryDirectory() as folder:
        changes, same = measure(Path(folder))
    note(json.dumps({"changes": changes, "same": same}, indent=1))
    measured = {"hash_changes_with": changes, "hash_stays_with": same}
    holds = all(changes.values()) and all(same.values())
    return print_row(row="A11", measured=measured, bar=BAR, holds=holds)

"""The Containerfile as the tests see it: stages, instructions and the environment of the image.

Owns reading it; builds nothing.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tests.deploy.manifests import DEPLOY

CONTAINERFILE = DEPLOY / "Containerfile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction with the index of its stage; stage -1 is before the first FROM."""

    stage: int
    name: str
    text: str


def read_instructions() -> list[Instruction]:
    """All instructions, continued lines joined and comments left out."""
    lines = [
        line
        for line in CONTAINERFILE.read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    instructions: list[Instruction] = []
    stage = -1
    for logical in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        name, _, text = logical.partition(" ")
        stage += name == "FROM"
        instructions.append(Instruction(stage=stage, name=name, text=text))
    return instructions


def image_environment() -> dict[str, str]:
    """Variables of the image, PATH left out: it names folders of the image."""
    last = max(instruction.stage for instruction in read_instructions())
    pairs = [
        word.partition("=")
        for instruction in read_instructions()
        if instruction.stage == last and instruction.name == "ENV"
        for word in shlex.split(instruction.text)
    ]
    return {name: value for name, _, value in pairs if name != "PATH"}

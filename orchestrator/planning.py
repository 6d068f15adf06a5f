"""From what a user names (model, machine, tokens, mode) to a plan: reads files, asks the planner.

Owns which topology stands for a machine and where the calibrated one is kept. Reads a model's
configuration and never its weights. Refuses to predict: that is `planner/`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from orchestrator.errors import ContextTooLong, TopologyInvalid, UsageError
from orchestrator.planner import (
    MachineSpec,
    PlanReport,
    Reading,
    Topology,
    Workload,
    decode_topology,
    find_plan,
    parse_machine,
    published_topology,
)
from orchestrator.planner.topology_json import FORMAT
from orchestrator.selection import decide
from orchestrator.types import AskOptions

if TYPE_CHECKING:
    from orchestrator.model.config import ModelConfig

KV_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "fp8": "float8_e4m3fn"}
PLANNED_MODES = ("auto", "exact", "centroid")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What to plan. mode `auto` compares `exact` with `centroid`; budget: as `ask` takes it;
    kv_dtype: as `ingest` takes it.
    """

    model: str
    machine: str
    num_tokens: int
    segment_tokens: int = 8192
    mode: str = "auto"
    budget: str | None = None
    question_tokens: int = 48
    answer_tokens: int = 128
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in PLANNED_MODES:
            raise UsageError(
                f"mode {self.mode!r} has no cost model; limit {', '.join(PLANNED_MODES)}; "
                "plan one of these"
            )
        for what in ("num_tokens", "question_tokens", "answer_tokens"):
            if getattr(self, what) < 1:
                raise UsageError(
                    f"{what.replace('_', ' ')} {getattr(self, what)} is below 1; give a number of "
                    "tokens, such as 100000"
                )
        check_kv_dtype(self.kv_dtype)
        if self.segment_tokens < 256 or self.segment_tokens % 256:
            raise UsageError(
                f"segment tokens {self.segment_tokens} is not a positive multiple of 256; give "
                "1024 or 8192, for example"
            )


def check_kv_dtype(word: str | None) -> None:
    """Raises UsageError for what is no word of `KV_DTYPES`, and not None."""
    if word is not None and word not in KV_DTYPES:
        raise UsageError(
            f"KV dtype {word!r} is none that a document has; limit {', '.join(KV_DTYPES)}; leave "
            "it out for the model's own"
        )


def default_topology_file() -> Path:
    """Where `longspan calibrate` writes and plans look; an earlier version's file is not read."""
    return Path(platformdirs.user_data_dir("longspan")) / f"topology-v{FORMAT}.json"


def make_plan(request: PlanRequest, topology_file: Path | None = None) -> PlanReport:
    """The report of a request. Raises UsageError, TopologyInvalid, a ModelError, ContextTooLong
    where the model's context is shorter, and NoPlanFits.
    """
    topology = find_topology(parse_machine(request.machine), topology_file)
    cfg, file_bytes = read_model(request.model)
    if request.num_tokens >= cfg.max_context_tokens:
        raise ContextTooLong(
            f"document has {request.num_tokens} tokens, the context of {cfg.name} holds "
            f"{cfg.max_context_tokens}, question and answer included; plan a shorter one or "
            "another model"
        )
    workload = Workload(
        cfg=cfg,
        num_tokens=request.num_tokens,
        segment_tokens=request.segment_tokens,
        question_tokens=request.question_tokens,
        answer_tokens=request.answer_tokens,
        weights_file_bytes=file_bytes,
        kv_dtype=None if request.kv_dtype is None else KV_DTYPES[request.kv_dtype],
    )
    return find_plan(workload, topology, readings_of(request, workload))


def readings_of(request: PlanRequest, workload: Workload) -> list[Reading]:
    """The readings that a request compares, resolved as a question's options are."""
    modes = ("exact", "centroid") if request.mode == "auto" else (request.mode,)
    found: list[Reading] = []
    for mode in modes:
        # A budget says what a look-up reads; `exact` reads everything, whatever it is.
        budget = request.budget if mode == "centroid" else None
        decision = decide(
            AskOptions(mode="exact" if mode == "exact" else "centroid", budget=budget),
            num_tokens=workload.num_tokens,
            num_steady=workload.sinks + workload.window,
            keys_per_cluster=workload.clusters.keys_per_cluster,
            device="cpu" if parse_machine(request.machine).kind == "cpu" else "cuda",
        )
        reading = Reading(
            mode="centroid" if decision.mode == "centroid" else "exact",
            keys=decision.retrieved_keys or 0,
            levels=decision.levels,
        )
        if reading not in found:
            found.append(reading)
    return found


def read_model(name: str) -> tuple[ModelConfig, int]:
    """Configuration of a known name, a path or `shape:NAME`, and bytes of its largest weight file.

    Reads no weights. Raises a ModelError.
    """
    from orchestrator.model.gguf_file import open_gguf
    from orchestrator.model.gguf_weights import read_gguf_config
    from orchestrator.model.hf_weights import find_weight_files, read_hf_config
    from orchestrator.model.registry import SHAPE_PREFIX, find_model
    from orchestrator.model.shapes import shape_config

    if name.startswith(SHAPE_PREFIX):
        return shape_config(name), 0
    path = find_model(name)
    if path.is_dir():
        files = find_weight_files(path)
        return read_hf_config(path), max(file.stat().st_size for file in files)
    return read_gguf_config(open_gguf(path)), path.stat().st_size


def read_topology(path: Path) -> Topology:
    """The topology in a file. Raises TopologyInvalid where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise TopologyInvalid(
            f"topology {path} cannot be read ({reason}); limit a file that longspan calibrate "
            "wrote; run longspan calibrate"
        ) from error
    return decode_topology(text, source=str(path))


def find_topology(machine: MachineSpec, path: Path | None = None) -> Topology:
    """What is known of a machine: the calibrated file where it is of this kind, else published
    figures.

    path: the file to use, instead of the default one, which need not exist for known GPUs.
    """
    file = path or default_topology_file()
    if path is not None or file.exists():
        measured = read_topology(file)
        if measured.kind == machine.kind:
            return _resize(measured, machine)
        if path is not None:
            raise UsageError(
                f"machine {machine} is not the {measured.kind} that {path} describes; limit that "
                "kind; give another file or another --gpus"
            )
    if machine.kind == "cpu":
        raise TopologyInvalid(
            f"machine {machine} has not been measured; limit a topology file at {file}; "
            "run longspan calibrate"
        )
    return published_topology(machine)


def _resize(measured: Topology, machine: MachineSpec) -> Topology:
    """The measured machine with as many devices as were asked for."""
    if measured.is_cpu and machine.num_devices > measured.num_devices:
        raise UsageError(
            f"machine {machine} has more cores than were measured; limit {measured.num_devices}; "
            f"give cpu:{measured.num_devices}"
        )
    resized = replace(measured, num_devices=machine.num_devices)
    if measured.is_cpu or measured.links or machine.num_devices == 1:
        return resized
    # One GPU was measured, which has nobody to talk to.
    return replace(
        resized,
        links=published_topology(machine).links,
        origin=f"{measured.origin}; links from published figures",
    )

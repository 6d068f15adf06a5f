"""The topology file: one JSON object, one spelling, refused where anything in it is not known.

Owns the format and its version. Refuses to know paths: callers read and write the text.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any, TypeVar

from orchestrator.errors import TopologyInvalid
from orchestrator.planner.topology import (
    REMEDY,
    Contention,
    Curve,
    Disk,
    Link,
    Rates,
    Topology,
)

FORMAT = 2
Part = TypeVar("Part", Rates, Contention, Link, Disk)
_CURVES = {
    "matrix_flops_per_s",
    "question_flops_per_s",
    "attention_flops_per_s",
    "causal_flops_per_s",
    "cluster_flops_per_s",
    "lookup_flops_per_s",
    "list_units_per_s",
}


def encode_topology(topology: Topology) -> str:
    """The topology as text that `decode_topology` reads back unchanged."""
    return json.dumps({"format": FORMAT, **_plain(asdict(topology))}, indent=1) + "\n"


def decode_topology(text: str, *, source: str) -> Topology:
    """The topology in `text`; source: how errors call it. Raises TopologyInvalid."""
    try:
        body = json.loads(text)
        if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
            raise ValueError(f"not a topology of format {FORMAT}")
        return _read_topology(body)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise TopologyInvalid(
            f"topology {source} cannot be used ({type(error).__name__}: {reason}); limit a file "
            f"that this version wrote; {REMEDY}"
        ) from error


def _read_topology(body: dict[str, Any]) -> Topology:
    return Topology(
        rates=tuple(_read(Rates, each) for each in body.pop("rates")),
        contention=tuple(_read(Contention, each) for each in body.pop("contention")),
        links=tuple(_read(Link, each) for each in body.pop("links")),
        disk=_read(Disk, body.pop("disk")),
        **body,
    )


def _read(kind: type[Part], values: dict[str, Any]) -> Part:
    if set(values) != {field.name for field in fields(kind)}:
        raise ValueError(f"fields {sorted(values)} of {kind.__name__}")
    return kind(**{name: _read_value(kind, name, value) for name, value in values.items()})


def _read_value(kind: type[Any], name: str, value: Any) -> Any:
    if name in _CURVES or (kind is Link and name == "bytes_per_s"):
        return Curve(points=tuple((float(x), float(y)) for x, y in value))
    return value


def _plain(value: Any) -> Any:
    """Dataclasses as `asdict` left them, a curve as the list of its points."""
    if isinstance(value, dict):
        if set(value) == {"points"}:
            return [list(point) for point in value["points"]]
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value

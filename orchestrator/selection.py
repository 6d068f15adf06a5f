"""Turns what a user asked for (`--mode`, `--budget`, `--mass`) into one explicit attention plan.

Pure decisions over numbers: knows no tensors, no files. The reason for each decision is part of the
answer (`selection.reason`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.types import MODES, AskOptions, SelectionReport

DEFAULT_BUDGET_SHARE = 0.125
# Below this many document keys `auto` reads them all: a decode step of `centroid` is not faster
# there than `exact`, by `longspan bench amortised` on CPUs and `longspan bench decode` on an H200
# (docs/log.md, docs/kernels.md).
EXACT_BELOW_KEYS = {"cpu": 8192, "cuda": 131_072}
# Above this many clusters per KV head the look-up goes through groups first. A GPU holds 2,048
# units of a choice on the chip; one level over 8,192 clusters took 306 us of a layer with 16
# questions on an H200 (docs/log.md).
TWO_LEVEL_ABOVE_CLUSTERS = {"cpu": 8192, "cuda": 2048}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A resolved selection: mode, retrieved keys or mass, levels, and the report for the answer."""

    mode: str
    retrieved_keys: int | None
    mass: float | None
    levels: int
    report: SelectionReport


def decide(
    options: AskOptions,
    *,
    num_tokens: int,
    num_steady: int,
    keys_per_cluster: int,
    device: str = "cpu",
) -> Decision:
    """Resolve a question's options for a document of num_tokens keys, num_steady of them always
    read, on a device of that type.

    Raises UsageError for an unknown mode, a budget or mass outside its range, or both at once, and
    for a mode that needs clusters where there are none (keys_per_cluster 0).
    """
    check_request(options)
    budget_keys = None if options.budget is None else parse_budget(options.budget, num_tokens)
    mass = None if options.mass is None else _check_mass(options.mass)
    mode, reason = _choose_mode(options, num_tokens, budget_keys, mass, device)
    if not keys_per_cluster and mode in ("centroid", "window"):
        if options.mode == mode:
            raise UsageError(
                f"mode {mode!r} needs clusters; this document was ingested without; ask in mode "
                "exact, or ingest it again"
            )
        mode, reason = "exact", "the document was ingested without clusters"
    if num_tokens <= num_steady:
        mode, reason = "exact", f"all {num_tokens} keys are among those that are always read"
    if mode == "exact":
        return _decision(
            options, mode, reason, budget_keys=num_tokens, mass=None, levels=1, retrieved=None
        )
    if mode == "window":
        return _decision(
            options, mode, reason, budget_keys=num_steady, mass=None, levels=1, retrieved=0
        )
    levels = _choose_levels(options, num_tokens, keys_per_cluster, device)
    if mass is not None:
        return _decision(
            options, mode, reason, budget_keys=None, mass=mass, levels=levels, retrieved=None
        )
    if budget_keys is None:
        budget_keys = round(DEFAULT_BUDGET_SHARE * num_tokens)
    budget_keys = min(max(budget_keys, num_steady), num_tokens)
    retrieved = budget_keys - num_steady
    return _decision(
        options,
        mode,
        reason,
        budget_keys=budget_keys,
        mass=None,
        levels=levels,
        retrieved=retrieved,
    )


def check_request(options: AskOptions) -> None:
    """Refuse what no document could answer, before weights are loaded.

    Raises UsageError.
    """
    if options.mode not in MODES:
        raise UsageError(f"mode {options.mode!r} does not exist; choose one of {', '.join(MODES)}")
    if options.budget is not None and options.mass is not None:
        raise UsageError(
            f"budget {options.budget} and mass {options.mass} were both given; they exclude each "
            f"other; drop one"
        )
    if options.budget is not None:
        parse_budget(options.budget, 1)
    if options.mass is not None:
        _check_mass(options.mass)
    if options.levels not in (None, 1, 2):
        raise UsageError(
            f"levels {options.levels} does not exist; a look-up has 1 or 2 levels; give one of them"
        )
    if options.max_tokens < 1:
        raise UsageError(
            f"max tokens {options.max_tokens} is below 1; an answer needs at least one; give 128"
        )


def selector_facts(
    options: AskOptions, decision: Decision, *, index: Mapping[str, Any]
) -> dict[str, Any]:
    """The selector as the stack manifest names it, `index` being what built the clusters.

    A budget stands as it was asked for: in keys, a share would change with every document.
    """
    is_by_budget = decision.mode == "centroid" and decision.mass is None
    return {
        "mode": decision.mode,
        "budget": state_budget(options.budget) if is_by_budget else None,
        "mass": decision.mass,
        "levels": decision.levels,
        "index": dict(index),
    }


def state_budget(budget: str | int | None) -> str:
    """One spelling of a budget, the default's included."""
    if budget is None:
        return f"{DEFAULT_BUDGET_SHARE * 100:g}%"
    value, is_share = _read_budget(budget)
    return f"{value:g}%" if is_share else f"{value:.0f} keys"


def parse_budget(budget: str | int, num_tokens: int) -> int:
    """Keys of a budget given as a number or as a percentage such as "12.5%" of num_tokens keys."""
    value, is_share = _read_budget(budget)
    return max(1, round(value / 100 * num_tokens)) if is_share else int(value)


def _read_budget(budget: str | int) -> tuple[float, bool]:
    """Number of a budget, and whether it is a percentage; raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", str(budget))
    if match is None:
        raise UsageError(
            f"budget {budget!r} is neither keys nor a percentage; give 2048 or 12.5%, for example"
        )
    value, is_share = float(match[1]), match[2] == "%"
    if value <= 0 or (is_share and value > 100) or (not is_share and value != int(value)):
        limit = "above 0% and at most 100%" if is_share else "a whole number of at least 1 key"
        raise UsageError(
            f"budget {budget} is out of range; it must be {limit}; give 12.5%, for example"
        )
    return value, is_share


def _check_mass(mass: float) -> float:
    if not 0.0 < mass <= 1.0:
        raise UsageError(
            f"mass {mass} is out of range; it must be above 0 and at most 1; give 0.95, for example"
        )
    return mass


def _choose_mode(
    options: AskOptions,
    num_tokens: int,
    budget_keys: int | None,
    mass: float | None,
    device: str,
) -> tuple[str, str]:
    if options.mode != "auto":
        return options.mode, "asked for"
    if budget_keys is not None and budget_keys >= num_tokens:
        return "exact", f"the budget covers all {num_tokens} keys"
    if budget_keys is not None:
        return "centroid", f"a budget of {budget_keys} of {num_tokens} keys needs a selection"
    enough = EXACT_BELOW_KEYS[device]
    if num_tokens < enough:
        return "exact", f"{num_tokens} keys are fewer than {enough}: reading all is as fast"
    limit = "the default budget" if mass is None else f"mass {mass}"
    return "centroid", f"{num_tokens} keys are at least {enough}: selection by {limit}"


def _choose_levels(options: AskOptions, num_tokens: int, keys_per_cluster: int, device: str) -> int:
    if options.levels is not None:
        return options.levels
    return 2 if num_tokens // keys_per_cluster > TWO_LEVEL_ABOVE_CLUSTERS[device] else 1


def _decision(
    options: AskOptions,
    mode: str,
    reason: str,
    *,
    budget_keys: int | None,
    mass: float | None,
    levels: int,
    retrieved: int | None,
) -> Decision:
    report = SelectionReport(
        requested=options.mode,
        mode=mode,
        budget_keys=budget_keys,
        mass=mass,
        levels=levels,
        reason=reason,
    )
    return Decision(mode=mode, retrieved_keys=retrieved, mass=mass, levels=levels, report=report)

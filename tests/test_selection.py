"""Which mode `auto` takes, and what a budget becomes."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import UsageError
from orchestrator.selection import EXACT_BELOW_KEYS, TWO_LEVEL_ABOVE_CLUSTERS, Decision, decide
from orchestrator.types import AskOptions

STEADY = 68


def decision(
    num_tokens: int, *, keys_per_cluster: int = 8, device: str = "cpu", **options: Any
) -> Decision:
    return decide(
        AskOptions(**options),
        num_tokens=num_tokens,
        num_steady=STEADY,
        keys_per_cluster=keys_per_cluster,
        device=device,
    )


@pytest.mark.parametrize(
    ("num_tokens", "options", "mode"),
    [
        (EXACT_BELOW_KEYS["cpu"] - 1, {}, "exact"),
        (EXACT_BELOW_KEYS["cpu"], {}, "centroid"),
        (1000, {"budget": "12.5%"}, "centroid"),
        (1000, {"budget": 1000}, "exact"),
        (1000, {"mass": 0.9}, "exact"),
        (STEADY, {"budget": "50%"}, "exact"),
    ],
)
def test_auto_reads_everything_where_that_is_as_fast_and_allowed(
    num_tokens: int, options: dict[str, Any], mode: str
) -> None:
    decided = decision(num_tokens, **options)
    assert decided.mode == mode
    assert decided.report.requested == "auto"
    assert decided.report.reason


@pytest.mark.parametrize("device", EXACT_BELOW_KEYS)
def test_how_many_keys_are_as_fast_depends_on_the_device(device: str) -> None:
    enough = EXACT_BELOW_KEYS[device]
    assert decision(enough - 1, device=device).mode == "exact"
    assert decision(enough, device=device).mode == "centroid"
    assert str(enough) in decision(enough, device=device).report.reason


def test_a_budget_counts_the_steady_zone_and_never_falls_below_it() -> None:
    assert decision(8000, mode="centroid", budget="12.5%").retrieved_keys == 1000 - STEADY
    assert decision(8000, mode="centroid", budget=10).retrieved_keys == 0
    assert decision(8000, mode="centroid", budget="100%").retrieved_keys == 8000 - STEADY


@pytest.mark.parametrize("device", TWO_LEVEL_ABOVE_CLUSTERS)
def test_large_documents_are_looked_up_in_two_levels(device: str) -> None:
    limit = TWO_LEVEL_ABOVE_CLUSTERS[device] * 8
    assert decision(limit, mode="centroid", device=device).levels == 1
    assert decision(limit + 8, mode="centroid", device=device).levels == 2
    assert decision(1000, mode="centroid", levels=2).levels == 2


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "nearest"},
        {"budget": "0"},
        {"budget": "101%"},
        {"budget": "1.5"},
        {"budget": "many"},
        {"mass": 0.0},
        {"mass": 0.9, "budget": 100},
        {"levels": 3},
        {"max_tokens": 0},
    ],
)
def test_requests_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        decision(1000, **options)


def test_a_document_without_clusters_is_read_whole_or_refused() -> None:
    assert decision(9000, keys_per_cluster=0).mode == "exact"
    with pytest.raises(UsageError, match="without"):
        decision(9000, keys_per_cluster=0, mode="centroid")

"""A true report passes; one that is constant, shuffled, biased or overconfident does not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from orchestrator.evaluation.calibration import (
    NUM_DECILES,
    Array,
    Calibration,
    measure_calibration,
)

NUM_REPORTS = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """Columns `[n]` as `measure_calibration` takes them."""

    reported: Array
    ci_low: Array
    ci_high: Array
    audited: Array

    def measure(self, bound_violations: int = 0) -> Calibration:
        """Calibration of these columns."""
        return measure_calibration(
            reported=self.reported,
            ci_low=self.ci_low,
            ci_high=self.ci_high,
            audited=self.audited,
            bound_violations=bound_violations,
        )


def make_true_reports(seed: int = 0) -> Reports:
    """Audited masses, and reports that miss them by noise of known size."""
    rng = np.random.default_rng(seed)
    audited = 0.4 + 0.55 * rng.beta(3, 1.5, NUM_REPORTS)
    spread = rng.uniform(0.005, 0.03, NUM_REPORTS)
    reported = audited + spread * rng.standard_normal(NUM_REPORTS)
    return Reports(
        reported=reported,
        ci_low=reported - 1.96 * spread,
        ci_high=reported + 1.96 * spread,
        audited=audited,
    )


@pytest.mark.parametrize("seed", range(3))
def test_true_report_passes(seed: int) -> None:
    found = make_true_reports(seed).measure()
    assert found.list_faults() == []
    assert found.holds()
    assert sum(decile.num_reports for decile in found.deciles) == NUM_REPORTS
    means = [decile.reported_mean for decile in found.deciles]
    assert means == sorted(means)


def test_best_possible_constant_report_fails_on_skill_alone() -> None:
    true = make_true_reports()
    low, high = np.quantile(true.audited, [0.025, 0.975])
    constant = replace(
        true,
        reported=np.full(NUM_REPORTS, true.audited.mean()),
        ci_low=np.full(NUM_REPORTS, low),
        ci_high=np.full(NUM_REPORTS, high),
    )
    faults = constant.measure().list_faults()
    assert len(faults) == 1
    assert faults[0].startswith("skill")


def test_shuffled_report_fails() -> None:
    true = make_true_reports()
    order = np.random.default_rng(1).permutation(NUM_REPORTS)
    shuffled = replace(
        true,
        reported=true.reported[order],
        ci_low=true.ci_low[order],
        ci_high=true.ci_high[order],
    )
    found = shuffled.measure()
    assert not found.holds()
    assert found.skill < 0
    assert found.max_decile_gap > 0.03
    assert found.coverage < 0.93
    # A shuffle leaves the mean alone: bias cannot see it, so something else must.
    assert abs(found.bias) < 0.01


def test_bias_fails() -> None:
    true = make_true_reports()
    biased = replace(true, reported=true.reported - 0.02)
    found = biased.measure()
    assert found.bias == pytest.approx(-0.02, abs=2e-3)
    assert any(fault.startswith("bias -0.0") for fault in found.list_faults())


@pytest.mark.parametrize("factor", [0.7, 1.6])
def test_intervals_too_narrow_or_too_wide_fail(factor: float) -> None:
    true = make_true_reports()
    half = factor * (true.ci_high - true.ci_low) / 2
    stretched = replace(true, ci_low=true.reported - half, ci_high=true.reported + half)
    assert [fault.split()[0] for fault in stretched.measure().list_faults()] == ["coverage"]


def test_one_wrong_decile_fails() -> None:
    true = make_true_reports()
    worst = np.argsort(true.reported)[: NUM_REPORTS // NUM_DECILES]
    audited = true.audited.copy()
    audited[worst] -= 0.05
    found = replace(true, audited=audited).measure()
    assert abs(found.deciles[0].reported_mean - found.deciles[0].audited_mean) > 0.03
    assert any(fault.startswith("decile gap") for fault in found.list_faults())


def test_one_violation_of_the_bound_fails() -> None:
    found = make_true_reports().measure(bound_violations=1)
    assert found.list_faults() == ["1 bound violations; limit 0"]


def test_audited_mass_that_never_varies_leaves_no_skill() -> None:
    ones = np.ones(NUM_DECILES)
    found = measure_calibration(reported=ones, ci_low=ones, ci_high=ones, audited=ones)
    assert found.skill == 0.0
    assert not found.holds()


def test_malformed_columns_are_refused() -> None:
    ones = np.ones(NUM_DECILES)
    short = np.ones(NUM_DECILES - 1)
    for audited in (short, np.ones((NUM_DECILES, 1)), np.full(NUM_DECILES, np.nan)):
        with pytest.raises(ValueError, match="limit"):
            measure_calibration(reported=ones, ci_low=ones, ci_high=ones, audited=audited)
    with pytest.raises(ValueError, match="one length"):
        measure_calibration(reported=short, ci_low=short, ci_high=short, audited=short)


def test_json_carries_deciles_and_faults() -> None:
    row = make_true_reports().measure().as_json()
    deciles = row["deciles"]
    assert isinstance(deciles, tuple)
    assert len(deciles) == NUM_DECILES
    assert set(deciles[0]) == {"reported_mean", "audited_mean", "num_reports"}
    assert row["faults"] == []

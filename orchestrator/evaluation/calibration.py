"""Whether the reported recall is true: reported against audited attention mass.

Owns the statistics of row A4 and their limits. Refuses to know how either side was obtained, and
torch: it takes plain arrays, one entry for each report (a question, say, or a question's head).

    bias        mean of reported minus audited
    coverage    share of the audited masses that lie within the reported 95 % interval
    deciles     reports in order of reported mass, cut into ten runs of equal size; in each the mean
                reported and the mean audited mass
    skill       1 - mean squared error / variance of the audited mass: above 0 where the report
                says more than the audited mean alone would. A constant can have no bias, the right
                coverage and flat deciles, and has no skill
    violations  audited misses above their bound, as counted by the audit over every query, layer
                and head
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_BIAS = 0.01
MAX_DECILE_GAP = 0.03
MIN_COVERAGE = 0.93
MAX_COVERAGE = 0.97
NUM_DECILES = 10

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decile:
    """One tenth of the reports, in order of reported mass."""

    reported_mean: float
    audited_mean: float
    num_reports: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What `measure_calibration` found; masses are shares in [0, 1]."""

    bias: float
    coverage: float
    skill: float
    deciles: tuple[Decile, ...]
    bound_violations: int
    num_reports: int

    @property
    def max_decile_gap(self) -> float:
        """Largest distance between reported and audited mean over the deciles."""
        return max(abs(d.reported_mean - d.audited_mean) for d in self.deciles)

    def list_faults(self) -> list[str]:
        """One line for each limit that does not hold; empty where the report is true."""
        limits = (
            (abs(self.bias) <= MAX_BIAS, f"bias {self.bias:+.4f}; limit {MAX_BIAS}"),
            (
                MIN_COVERAGE <= self.coverage <= MAX_COVERAGE,
                f"coverage {self.coverage:.4f}; limit {MIN_COVERAGE} to {MAX_COVERAGE}",
            ),
            (
                self.max_decile_gap <= MAX_DECILE_GAP,
                f"decile gap {self.max_decile_gap:.4f}; limit {MAX_DECILE_GAP}",
            ),
            (self.skill > 0.0, f"skill {self.skill:.3f}; limit above 0"),
            (self.bound_violations == 0, f"{self.bound_violations} bound violations; limit 0"),
        )
        return [text for is_kept, text in limits if not is_kept]

    def holds(self) -> bool:
        """Whether every limit of row A4 holds."""
        return not self.list_faults()

    def as_json(self) -> dict[str, object]:
        """All fields, the largest decile gap and the faults, as plain JSON values."""
        return asdict(self) | {
            "max_decile_gap": self.max_decile_gap,
            "faults": self.list_faults(),
        }


def measure_calibration(
    *,
    reported: ArrayLike,
    ci_low: ArrayLike,
    ci_high: ArrayLike,
    audited: ArrayLike,
    bound_violations: int = 0,
) -> Calibration:
    """Compare n reports with n audits, each array `[n]` float; needs n >= 10.

    `bound_violations` is the audits' own count over every (query, layer, head). Raises ValueError
    for arrays that differ in length, are too short, or hold a NaN or infinity.
    """
    mass, low, high, truth = _columns(reported, ci_low, ci_high, audited)
    error = mass - truth
    order = np.argsort(mass, kind="stable")
    return Calibration(
        bias=float(error.mean()),
        coverage=float(((low <= truth) & (truth <= high)).mean()),
        skill=_skill(error, truth),
        deciles=tuple(
            Decile(
                reported_mean=float(mass[run].mean()),
                audited_mean=float(truth[run].mean()),
                num_reports=len(run),
            )
            for run in np.array_split(order, NUM_DECILES)
        ),
        bound_violations=bound_violations,
        num_reports=len(mass),
    )


def _skill(error: Array, truth: Array) -> float:
    variance = float(truth.var())
    mean_square = float(np.square(error).mean())
    # Where the audited mass never varies there is nothing to predict, and no skill to have.
    return 1.0 - mean_square / variance if variance > 0.0 else 0.0


def _columns(*arrays: ArrayLike) -> list[Array]:
    columns = [np.asarray(array, dtype=np.float64) for array in arrays]
    shapes = {column.shape for column in columns}
    if len(shapes) != 1 or columns[0].ndim != 1 or len(columns[0]) < NUM_DECILES:
        raise ValueError(
            f"reports of shapes {sorted(shapes)}; limit one length of {NUM_DECILES} or more; "
            "pass one entry for each report"
        )
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError(
            "reports with a NaN or infinity; limit finite masses; check what was reported"
        )
    return columns

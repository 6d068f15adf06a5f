"""What a machine can do, as measured or published numbers: rates of one rank, links between ranks.

Owns the description that every prediction stands on, and the checks that it means something.
Refuses to know how it was obtained (`calibration.py` measures, `machines.py` quotes) and how it is
stored (`topology_json.py`). Flops count a multiplication and an addition as two.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import TopologyInvalid

Operation = Literal["all_gather", "all_reduce", "all_to_all"]
OPERATIONS: tuple[Operation, ...] = ("all_gather", "all_reduce", "all_to_all")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
REMEDY = "run longspan calibrate, or give --gpus a machine that is known"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A measured table of y against x, both positive, x ascending.

    Between two points y is a power of x (a straight line in the logarithms); outside it is the
    nearest point's.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        xs = [x for x, _ in self.points]
        is_positive = all(math.isfinite(n) and n > 0 for point in self.points for n in point)
        if not self.points or not is_positive or xs != sorted(set(xs)):
            raise TopologyInvalid(
                f"table {list(self.points)}: limit one or more (x, y), finite and above 0, x "
                f"ascending; {REMEDY}"
            )

    @classmethod
    def flat(cls, y: float) -> Curve:
        """The same y everywhere."""
        return cls(points=((1.0, y),))

    def at(self, x: float) -> float:
        """The table's y at x."""
        i = bisect_right(self.points, (x, math.inf))
        if i == 0 or i == len(self.points):
            return self.points[min(i, len(self.points) - 1)][1]
        (x0, y0), (x1, y1) = self.points[i - 1 : i + 1]
        return float(y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one rank reaches while no other computes beside it.

    threads: of the rank, on a CPU; 0 on a GPU. In flops/s: matrix, question: dense products against
    rows, as an ingest and as a question of several tokens multiplies; attention, causal: against
    query tokens; cluster: k-means distances against the keys of a segment; lookup: scoring clusters
    for several query tokens, against the head dim. list: units/s of ranking and listing them for
    other ranks, and of cutting all lists, against units (of all KV heads and query tokens).
    In bytes/s: of one-token steps, weights, KV that
    is read whole, cluster tables and the KV of chosen clusters; elementwise: what norms, rotations
    and activations take in; fresh: written to memory that was just allocated. exact_layer_s,
    centroid_layer_s: seconds of a layer in which there is next to nothing to do, for one token;
    exact_tile_s, centroid_tile_s: the same for several question tokens; run_s: of each further run
    (a segment of a KV head) that several question tokens read whole.
    """

    threads: int
    matrix_flops_per_s: Curve
    question_flops_per_s: Curve
    attention_flops_per_s: Curve
    causal_flops_per_s: Curve
    cluster_flops_per_s: Curve
    lookup_flops_per_s: Curve
    list_units_per_s: Curve
    weight_bytes_per_s: float
    kv_bytes_per_s: float
    lookup_bytes_per_s: float
    elementwise_bytes_per_s: float
    fresh_bytes_per_s: float
    exact_layer_s: float
    centroid_layer_s: float
    exact_tile_s: float
    centroid_tile_s: float
    run_s: float

    def __post_init__(self) -> None:
        scalars = (
            self.weight_bytes_per_s,
            self.kv_bytes_per_s,
            self.lookup_bytes_per_s,
            self.elementwise_bytes_per_s,
            self.fresh_bytes_per_s,
            self.exact_layer_s,
            self.centroid_layer_s,
            self.exact_tile_s,
            self.centroid_tile_s,
            self.run_s,
        )
        _check(all(_is_positive(x) for x in scalars) and self.threads >= 0, "rates", scalars)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """How much longer a rank takes while `ranks` of them compute at once, each on its share of the
    machine: for work bound by arithmetic, and by memory. 1 where ranks share nothing.
    """

    ranks: int
    compute: float
    stream: float

    def __post_init__(self) -> None:
        is_right = self.ranks >= 1 and min(self.compute, self.stream) > 0
        _check(is_right, "contention", (self.ranks, self.compute, self.stream))


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One collective between `ranks` ranks: the least time of a call, and bytes/s against the bytes
    that each rank receives.
    """

    operation: Operation
    ranks: int
    latency_s: float
    bytes_per_s: Curve

    def __post_init__(self) -> None:
        is_right = self.operation in OPERATIONS and self.ranks >= 2 and _is_positive(self.latency_s)
        _check(is_right, "link", (self.operation, self.ranks, self.latency_s))

    def seconds(self, received_bytes: float) -> float:
        """Seconds of one call."""
        return max(self.latency_s, received_bytes / self.bytes_per_s.at(max(1.0, received_bytes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Bytes/s of segments written (checksums and fsync included) and read (checksums included)."""

    write_bytes_per_s: float
    read_bytes_per_s: float

    def __post_init__(self) -> None:
        pair = (self.write_bytes_per_s, self.read_bytes_per_s)
        _check(all(_is_positive(x) for x in pair), "disk", pair)


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """One machine.

    kind: `cpu` or a GPU's name; num_devices: GPUs, or cores; memory_bytes: of one GPU, or of the
    whole machine on a CPU, where ranks share it; process_bytes: what a rank takes beside its
    tensors; start_s: what a process needs once before its first document; num_sms: of one GPU, 0 on
    a CPU; overlap_share: the share of communication that computing beside it can hide; origin: who
    says so.
    """

    kind: str
    num_devices: int
    memory_bytes: int
    process_bytes: int
    start_s: float
    dtype: str
    num_sms: int
    overlap_share: float
    rates: tuple[Rates, ...]
    contention: tuple[Contention, ...]
    links: tuple[Link, ...]
    disk: Disk
    origin: str

    def __post_init__(self) -> None:
        sizes = (self.num_devices, self.memory_bytes)
        _check(min(sizes) >= 1 and self.process_bytes >= 0, "machine", sizes)
        _check(0.0 <= self.overlap_share <= 1.0, "overlap share", (self.overlap_share,))
        _check(self.dtype in ITEM_BYTES, "dtype", (self.dtype,))
        _check(bool(self.rates) and bool(self.kind), "rates", (len(self.rates),))
        ranks = {link.ranks for link in self.links}
        is_whole = all(self._links_of(count) == set(OPERATIONS) for count in ranks)
        _check(is_whole, "links", sorted(ranks))

    @property
    def is_cpu(self) -> bool:
        """Whether ranks are processes that share cores and memory."""
        return self.kind == "cpu"

    @property
    def item_bytes(self) -> int:
        """Bytes of one number of weights and KV."""
        return ITEM_BYTES[self.dtype]

    def _links_of(self, ranks: int) -> set[Operation]:
        return {link.operation for link in self.links if link.ranks == ranks}

    def threads_of(self, num_ranks: int) -> int:
        """Threads of each of num_ranks ranks; 0 on GPUs."""
        return max(1, self.num_devices // num_ranks) if self.is_cpu else 0

    def rates_of(self, threads: int) -> Rates:
        """Rates of a rank with that many threads: those measured with the most that it has."""
        fitting = [rates for rates in self.rates if rates.threads <= threads]
        return max(fitting or self.rates[:1], key=lambda rates: rates.threads)

    def contention_of(self, num_ranks: int) -> Contention:
        """Slow-down of each of num_ranks ranks: that of the nearest number measured below."""
        alone = Contention(ranks=1, compute=1.0, stream=1.0)
        fitting = [entry for entry in self.contention if entry.ranks <= num_ranks]
        return max([alone, *fitting], key=lambda entry: entry.ranks)

    def link_of(self, operation: Operation, num_ranks: int) -> Link:
        """The collective between num_ranks ranks: that of the nearest number measured.

        Raises TopologyInvalid where none was.
        """
        fitting = [link for link in self.links if link.operation == operation]
        if not fitting:
            raise TopologyInvalid(
                f"topology of {self.kind}: no {operation} between ranks was measured; limit 1 "
                f"rank; {REMEDY}"
            )
        return min(fitting, key=lambda link: (abs(link.ranks - num_ranks), link.ranks))


def _is_positive(x: float) -> bool:
    return math.isfinite(x) and x > 0


def _check(is_right: bool, what: str, values: object) -> None:
    if not is_right:
        raise TopologyInvalid(f"topology: {what} {values} mean no machine; {REMEDY}")

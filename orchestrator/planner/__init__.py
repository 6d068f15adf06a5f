"""Predicts what ingesting and asking a document takes on a machine, and finds the best way to.

Owns the topology, the cost model and the search. Refuses to measure anything: it is a function of
numbers, imports no torch and knows no clock. Read `workload.py`, then `cost.py`, `phases.py`,
`memory.py` and `search.py`; docs/cost_model.md derives what they compute.
"""

from orchestrator.planner.machines import MachineSpec, parse_machine, published_topology
from orchestrator.planner.plan import Plan, PlanReport, Prediction
from orchestrator.planner.search import NoPlanFits, find_plan, predict
from orchestrator.planner.topology import Topology
from orchestrator.planner.topology_json import decode_topology, encode_topology
from orchestrator.planner.workload import Choice, Reading, Workload

__all__ = [
    "MachineSpec",
    "parse_machine",
    "published_topology",
    "Plan",
    "PlanReport",
    "Prediction",
    "NoPlanFits",
    "find_plan",
    "predict",
    "Topology",
    "decode_topology",
    "encode_topology",
    "Choice",
    "Reading",
    "Workload",
]

"""`/v1/plan`: what a document would take on a machine, before anything runs.

Owns the bounds of what is asked. Plans for the served model or a published shape alone: a request
names no file of the server.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool

from orchestrator.model.registry import SHAPE_PREFIX
from orchestrator.planner import parse_machine
from orchestrator.planning import PlanRequest, make_plan
from orchestrator.serving.errors import InvalidRequest
from orchestrator.serving.routes.models import check_model
from orchestrator.serving.service import ServiceDep

router = APIRouter(prefix="/v1/plan", tags=["plan"])
MAX_CONTEXT_TOKENS = 1 << 34
MAX_DEVICES = 8


@router.get("")
async def plan(
    service: ServiceDep,
    gpus: Annotated[str, Query(max_length=64)],
    context: Annotated[int, Query(ge=1, le=MAX_CONTEXT_TOKENS)],
    model: Annotated[str | None, Query(max_length=1024)] = None,
    mode: Annotated[str, Query(max_length=64)] = "auto",
    budget: Annotated[str | None, Query(max_length=24)] = None,
    segment_tokens: Annotated[int, Query(ge=256, le=1 << 20)] = 8192,
) -> dict[str, Any]:
    """Predict times and memory, and find the best way to run it: the object of `plan --json`."""
    if parse_machine(gpus).num_devices > MAX_DEVICES:
        raise InvalidRequest(
            f"field gpus is {gpus!r}; limit {MAX_DEVICES} devices here, since more take seconds to "
            "search; use `longspan plan`",
            param="gpus",
        )
    name = model or service.settings.model
    if not name.startswith(SHAPE_PREFIX):
        check_model(service, name)
    asked = PlanRequest(
        model=name,
        machine=gpus,
        num_tokens=context,
        segment_tokens=segment_tokens,
        mode=mode,
        budget=budget,
    )
    with service.plans.passing():
        report = await run_in_threadpool(make_plan, asked)
    return {
        "schema": 1,
        "model": name,
        "machine": gpus,
        "tokens": context,
        "mode": mode,
        "budget": budget,
        "segment_tokens": segment_tokens,
        **report.to_json(),
    }

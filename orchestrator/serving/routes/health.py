"""`/health*`: whether the process is of use, takes work, and gets on.

The only routes without a key: liveness, readiness and progress, for whoever watches the process.
"""

from __future__ import annotations

from fastapi import APIRouter, Response

from orchestrator.serving.service import ServiceDep
from orchestrator.serving.wire import Alive, Health

router = APIRouter(prefix="/health", tags=["health"])


@router.get("")
async def alive(service: ServiceDep, response: Response) -> Alive:
    """200 while this process is of use, also while it drains; 503 once a rank was lost."""
    status = service.health().status
    response.status_code = 503 if status == "broken" else 200
    return Alive(status=status)


@router.get("/ready")
async def ready(service: ServiceDep, response: Response) -> Alive:
    """200 while new work is taken, else 503."""
    status = service.health().status
    response.status_code = 200 if status == "ok" else 503
    return Alive(status=status)


@router.get("/progress")
async def progress(service: ServiceDep) -> Health:
    """Steps of each rank and seconds since its last one: what a watchdog compares."""
    return service.health()

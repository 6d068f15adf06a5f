"""`/v1/models`: the one model that this server runs."""

from __future__ import annotations

from fastapi import APIRouter

from orchestrator.errors import ModelNotFound
from orchestrator.serving.service import Service, ServiceDep
from orchestrator.serving.wire import ModelCard, ModelList

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def list_models(service: ServiceDep) -> ModelList:
    """List the models that can be asked."""
    return ModelList(data=[_card(service)])


@router.get("/{model:path}")
async def get_model(model: str, service: ServiceDep) -> ModelCard:
    """Describe one model."""
    check_model(service, model)
    return _card(service)


def check_model(service: Service, model: str) -> None:
    """Raises ModelNotFound for any model but the one that is served."""
    if model != service.settings.model:
        raise ModelNotFound(
            f"model {model[:80]!r} is not served here; limit {service.settings.model!r}; ask that"
        )


def _card(service: Service) -> ModelCard:
    return ModelCard(id=service.settings.model, created=service.started_at)

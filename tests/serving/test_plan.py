"""`/v1/plan`: the planner's report for the served model or a shape, bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from orchestrator.planning import PlanRequest, make_plan

SHAPE = "shape:llama-3.1-8b@2"
ASKED: dict[str, Any] = {"gpus": "2xH100", "context": 100_000}


@pytest.fixture
def planning(open_service: Callable[..., TestClient]) -> TestClient:
    """A server of a shape: a plan reads its configuration alone."""
    return open_service(model=SHAPE)


def refuse(service: TestClient, status: int, **changes: Any) -> dict[str, Any]:
    response = service.get("/v1/plan", params={**ASKED, **changes})
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_a_plan_is_that_of_the_command(planning: TestClient) -> None:
    response = planning.get("/v1/plan", params={**ASKED, "mode": "exact"})
    request = PlanRequest(model=SHAPE, machine="2xH100", num_tokens=100_000, mode="exact")
    assert response.json() == {
        "schema": 1,
        "model": SHAPE,
        "machine": "2xH100",
        "tokens": 100_000,
        "mode": "exact",
        "budget": None,
        "segment_tokens": 8192,
        **make_plan(request).to_json(),
    }


def test_another_shape_is_planned_another_model_is_not(planning: TestClient) -> None:
    other = planning.get("/v1/plan", params={**ASKED, "model": "shape:qwen3-32b@2", "context": 99})
    assert other.json()["model"] == "shape:qwen3-32b@2"
    assert refuse(planning, 404, model="/etc")["code"] == "model_not_found"
    assert refuse(planning, 404, model="shape:../x")["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"gpus": "9xH100"}, "gpus"),
        ({"gpus": "x" * 65}, "gpus"),
        ({"context": 0}, "context"),
        ({"context": "many"}, "context"),
        ({"context": 1 << 40}, "context"),
        ({"segment_tokens": 1}, "segment_tokens"),
        ({"budget": "9" * 25}, "budget"),
        ({"gpus": "2xAbacus"}, None),
        ({"mode": "psychic"}, None),
        ({"budget": "0%"}, None),
        ({"segment_tokens": 300}, None),
        ({"context": 1 << 30}, None),
    ],
)
def test_what_cannot_be_planned_is_refused(
    planning: TestClient, changes: dict[str, Any], param: str | None
) -> None:
    assert refuse(planning, 400, **changes)["param"] == param


def test_a_field_that_is_missing_is_named(planning: TestClient) -> None:
    response = planning.get("/v1/plan", params={"context": 5})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "gpus"
    assert "missing" in response.json()["error"]["message"]


def test_plans_are_made_one_at_a_time(planning: TestClient) -> None:
    app: Any = planning.app
    with app.state.service.plans.passing():
        assert refuse(planning, 429)["code"] == "too_busy"
    assert planning.get("/v1/plan", params=ASKED).status_code == 200

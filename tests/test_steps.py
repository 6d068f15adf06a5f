"""What ranks are told: every action survives the way as JSON, and ranks that differ find out."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import PlanInvalid
from orchestrator.steps import (
    ACTIONS,
    Action,
    AttentionPlan,
    AwaitSegment,
    BeginIngest,
    BeginQuestion,
    Chain,
    EndQuestion,
    Forward,
    ForwardEach,
    Heartbeat,
    OpenDocument,
    PrefillChunk,
    SealSegment,
    StepPlan,
    decode,
)

EXAMPLES: list[Action] = [
    OpenDocument(document="bücher", document_hash="00ff"),
    BeginQuestion(
        question_id=7,
        document="b",
        attention=AttentionPlan(mode="centroid", keys=None, mass=0.1 + 0.2, choice="proportional"),
        capacity_tokens=99,
    ),
    Forward(question_id=7, ids=(1, 2, 3)),
    ForwardEach(question_ids=(7, 9), ids=(1, 2)),
    EndQuestion(question_id=7, reports=True),
    BeginIngest(
        document="b",
        directory="b",
        digest="ab",
        params={"rope": {"base": 1e6}, "window": 64},
        num_tokens=10,
        sealed_segments=0,
        clusters={"keys_per_cluster": 4},
        sparse={"budget": "10%", "min_keys": 1024},
    ),
    PrefillChunk(document="b", ids=(5,), start=3, split=None),
    SealSegment(document="b", segment_idx=2),
    AwaitSegment(document="b"),
    Heartbeat(),
]


@pytest.mark.parametrize("action", EXAMPLES, ids=lambda action: type(action).__name__)
def test_a_plan_comes_back_as_it_was_sent(action: Action) -> None:
    plan = StepPlan(step=3, action=action)
    data = plan.encode()
    assert decode(data) == plan
    assert decode(data).encode() == data
    json.loads(data)


def test_every_action_has_a_name_and_is_frozen() -> None:
    assert all(ACTIONS[kind.__name__] is kind for kind in ACTIONS.values())
    for action in EXAMPLES:
        for field in fields(action):
            with pytest.raises(AttributeError):
                setattr(action, field.name, None)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.integers(0, 2**40))
def test_token_ids_keep_their_order_and_values(ids: list[int], step: int) -> None:
    plan = StepPlan(step=step, action=Forward(question_id=0, ids=tuple(ids)))
    assert decode(plan.encode()) == plan


def changed(**changes: Any) -> bytes:
    body = json.loads(StepPlan(step=0, action=EXAMPLES[2]).encode())
    body.update(changes)
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[1]",
        b"\x80\x04\x95",
        changed(kind="Explode"),
        changed(format=2),
        changed(action={"question_id": 1}),
        changed(action={"question_id": 1, "ids": [1], "more": 2}),
        changed(action={"question_id": 1, "ids": ["x"]}),
        changed(extra=1),
        StepPlan(step=0, action=EXAMPLES[2]).encode() + b" ",
    ],
)
def test_what_no_rank_would_send_is_refused(data: bytes) -> None:
    with pytest.raises(PlanInvalid, match="start all ranks from one installation") as caught:
        decode(data)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=60))
def test_no_bytes_do_anything_but_raise(data: bytes) -> None:
    with pytest.raises(PlanInvalid):
        decode(data)


def test_a_chain_covers_identity_and_all_that_came_before() -> None:
    plans = [StepPlan(step=i, action=action).encode() for i, action in enumerate(EXAMPLES)]

    def digests(identity: dict[str, Any], sent: list[bytes]) -> list[bytes]:
        chain = Chain(identity)
        return [chain.add(plan) for plan in sent]

    same = digests({"dtype": "float32"}, plans)
    assert same == digests({"dtype": "float32"}, plans)
    assert len({*same}) == len(plans)
    assert all(a != b for a, b in zip(same, digests({"dtype": "bf16"}, plans), strict=True))
    skipped = digests({"dtype": "float32"}, [plans[0], *plans[2:]])
    assert skipped[0] == same[0]
    assert not {*skipped[1:]} & {*same}

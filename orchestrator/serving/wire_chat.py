"""Chat completions as OpenAI's clients send and read them, and what Longspan adds to them.

Owns the request's bounds, which of the standard's fields are refused, and the shapes of answers and
of chunks of a stream. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
)

from orchestrator.serving.wire import Budget, DocumentName, Reply, Request
from orchestrator.types import Mode

MAX_ANSWER_TOKENS = 1 << 20
MAX_MESSAGE_CHARS = 1 << 20
MAX_SEED = (1 << 63) - 1
_EARLIER_ROLES = ("assistant", "tool", "function")


def _only(*neutral: JsonValue) -> AfterValidator:
    """Of the standard, but not implemented: taken where it asks for nothing, else refused."""

    def check(value: JsonValue) -> JsonValue:
        if value is not None and value not in neutral:
            raise ValueError("this service does not implement it; leave it out")
        return value

    return AfterValidator(check)


def _refuse_earlier_turns(value: object) -> object:
    """A conversation is refused by what it is, not by the fields that its messages have."""
    turns = value if isinstance(value, list) else []
    roles = [turn.get("role") for turn in turns if isinstance(turn, Mapping)]
    earlier = [role for role in roles if role in _EARLIER_ROLES]
    if earlier:
        raise ValueError(
            f"a message has role {earlier[0]!r}, and earlier turns are not read; limit one user "
            "message after at most one system message; put what matters into the question"
        )
    return value


def _one_question(messages: list[Message]) -> list[Message]:
    num_users = sum(message.role == "user" for message in messages)
    if num_users != 1 or len(messages) > 2 or messages[-1].role != "user":
        raise ValueError(
            f"{num_users} user and {len(messages) - num_users} system messages; limit one user "
            "message after at most one system message; put what matters into the question"
        )
    return messages


def _join_text_parts(value: object) -> object:
    """Content given as a list of parts, if they are all text."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f"a content part of type {kind!r} is not read; limit text; send text")
    return "".join(part["text"] for part in value)


class Message(Request):
    """The question (role user), or an instruction that goes before it (role system)."""

    role: Literal["system", "developer", "user"]
    content: Annotated[
        str,
        BeforeValidator(_join_text_parts),
        StringConstraints(min_length=1, max_length=MAX_MESSAGE_CHARS, pattern=r"\S"),
    ]
    name: Annotated[JsonValue, _only()] = None


class SelectionRequest(Request):
    """How the document is read; the fields of `ask --mode --budget --mass`."""

    mode: Mode = "auto"
    budget: Budget | None = None
    mass: Annotated[float, Field(gt=0, le=1)] | None = None


class StreamOptions(Request):
    """include_usage: a last chunk with the usage and no choices; the rest asks for nothing."""

    include_usage: bool = False
    include_obfuscation: Annotated[JsonValue, _only(False)] = None


class _Standard(Request):
    """What OpenAI's request may also hold: labels are ignored, the rest must ask for nothing."""

    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None

    n: Annotated[JsonValue, _only(1)] = None
    stop: Annotated[JsonValue, _only([])] = None
    tools: Annotated[JsonValue, _only([])] = None
    tool_choice: Annotated[JsonValue, _only("none", "auto")] = None
    parallel_tool_calls: Annotated[JsonValue, _only(True, False)] = None
    functions: Annotated[JsonValue, _only([])] = None
    function_call: Annotated[JsonValue, _only("none", "auto")] = None
    response_format: Annotated[JsonValue, _only({"type": "text"})] = None
    logprobs: Annotated[JsonValue, _only(False)] = None
    top_logprobs: Annotated[JsonValue, _only(0)] = None
    logit_bias: Annotated[JsonValue, _only({})] = None
    frequency_penalty: Annotated[JsonValue, _only(0)] = None
    presence_penalty: Annotated[JsonValue, _only(0)] = None
    modalities: Annotated[JsonValue, _only(["text"])] = None
    audio: Annotated[JsonValue, _only()] = None
    prediction: Annotated[JsonValue, _only()] = None
    reasoning_effort: Annotated[JsonValue, _only()] = None
    verbosity: Annotated[JsonValue, _only()] = None
    service_tier: Annotated[JsonValue, _only("auto", "default")] = None
    store: Annotated[JsonValue, _only(False)] = None
    web_search_options: Annotated[JsonValue, _only()] = None


class ChatRequest(_Standard):
    """One question about one document. Null stands for a field's default, as in the standard."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    messages: Annotated[
        list[Message],
        Field(min_length=1, max_length=64),
        BeforeValidator(_refuse_earlier_turns),
        AfterValidator(_one_question),
    ]
    documents: Annotated[list[DocumentName], Field(max_length=64)] = Field(default_factory=list)
    selection: SelectionRequest | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_ANSWER_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_ANSWER_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class PromptTokensDetails(Reply):
    """cached_tokens: of the document, computed when it was ingested."""

    cached_tokens: int


class ChatUsage(Reply):
    """Tokens as the standard counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatMessage(Reply):
    """The answer's text."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Reply):
    """The one choice."""

    index: Literal[0] = 0
    message: ChatMessage
    finish_reason: str


class ChatCompletion(Reply):
    """A whole answer; longspan: the object of `ask --json`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    longspan: dict[str, Any]


class ChunkChoice(Reply):
    """What a chunk adds: role, content, or nothing but the reason of the end."""

    index: Literal[0] = 0
    delta: dict[Literal["role", "content"], str]
    finish_reason: str | None = None


class ChatChunk(BaseModel):
    """One event of a stream; usage and longspan come with the last."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: ChatUsage | None = None
    longspan: dict[str, Any] | None = None

    def to_json(self) -> str:
        """JSON without the two fields that only the last chunk has."""
        absent = {name for name in ("usage", "longspan") if getattr(self, name) is None}
        return self.model_dump_json(exclude=absent)

"""An answer of the engine as a chat completion, whole or in chunks: owns that translation alone."""

from __future__ import annotations

import time
import uuid

from orchestrator.serving.wire_chat import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatMessage,
    ChatUsage,
    ChunkChoice,
    PromptTokensDetails,
)
from orchestrator.types import Answer


class Trimmer:
    """Streams exactly the text of the whole answer: without white space at either end."""

    def __init__(self) -> None:
        self._held: str | None = None

    def push(self, piece: str) -> str:
        """What of the text so far is certain to stay, and new."""
        text = piece.lstrip() if self._held is None else self._held + piece
        kept = text.rstrip()
        if kept or self._held is not None:
            self._held = text[len(kept) :]
        return kept


class Completion:
    """One completion: its id and its chunks. Each method returns the JSON of one event."""

    def __init__(self, *, model: str) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    def whole(self, answer: Answer) -> ChatCompletion:
        """The answer at once."""
        message = ChatMessage(content=answer.text)
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[ChatChoice(message=message, finish_reason=answer.finish_reason)],
            usage=count_usage(answer),
            longspan=answer.to_json(),
        )

    def opening(self) -> str:
        """The first chunk: who speaks."""
        return self._chunk([ChunkChoice(delta={"role": "assistant", "content": ""})]).to_json()

    def piece(self, text: str) -> str:
        """A chunk of text."""
        return self._chunk([ChunkChoice(delta={"content": text})]).to_json()

    def closing(self, answer: Answer, *, includes_usage: bool) -> list[str]:
        """The last chunks: why it ended; the usage, if asked for. The last one has `longspan`."""
        end = self._chunk([ChunkChoice(delta={}, finish_reason=answer.finish_reason)])
        if not includes_usage:
            return [end.model_copy(update={"longspan": answer.to_json()}).to_json()]
        counted = {"usage": count_usage(answer), "longspan": answer.to_json()}
        return [end.to_json(), self._chunk([]).model_copy(update=counted).to_json()]

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices)


def count_usage(answer: Answer) -> ChatUsage:
    """Tokens as the standard counts them."""
    usage = answer.usage
    return ChatUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )

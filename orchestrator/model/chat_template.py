"""Splits a model's chat template around the document and the question.

Owns the rendering (transformers' sandboxed Jinja) and the cut: what stands before the document,
what follows the question. Texts that users bring are never rendered into the template: sentinels
stand for them, so that no text can close a turn or open one. Refuses to know token ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ModelUnsupported, UsageError

_SYSTEM, _DOCUMENT = "LONGSPAN-SYSTEM-TEXT", "LONGSPAN-DOCUMENT-TEXT"

# Templates may print today's date. A frame is ingested once and asked for years, and the document
# hash knows no clock: the date is the one Llama 3.1 falls back to, for every template.
_DATE = "26 Jul 2024"
_FIXED_CLOCK = "{%- macro strftime_now(format) -%}" + _DATE + "{%- endmacro -%}"

PLAIN_TAIL = "\nAnswer:"
"""What follows the question for a model without a chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTemplate:
    """A rendered template: `before_system` system text `before_document` document ... `tail`.

    `takes_system` tells whether a system text stands between the first two; without one the
    first holds everything before the document.
    """

    before_system: str
    takes_system: bool
    before_document: str
    tail: str


def split_template(
    template: str, special_tokens: Mapping[str, str], *, with_system: bool
) -> SplitTemplate:
    """Render `template` for one user turn and cut it; `special_tokens` are bos_token and so on.

    Raises UsageError where the template takes no system text, ModelUnsupported where it fails.
    """
    messages = [{"role": "system", "content": _SYSTEM}] if with_system else []
    messages.append({"role": "user", "content": _DOCUMENT})
    text = _render(template, messages, special_tokens, with_system=with_system)
    before, found, tail = text.partition(_DOCUMENT)
    if not found or _DOCUMENT in tail:
        raise ModelUnsupported(
            f"the model's chat template shows the user's text {text.count(_DOCUMENT)} times; "
            "once is needed; use a model with a plain template"
        )
    if not with_system:
        return SplitTemplate(
            before_system=before, takes_system=False, before_document="", tail=tail
        )
    before_system, found, before_document = before.partition(_SYSTEM)
    if not found or _SYSTEM in before_document:
        raise UsageError(
            f"the model's chat template shows a system text {before.count(_SYSTEM)} times; "
            "once is needed; leave out --system"
        )
    return SplitTemplate(
        before_system=before_system, takes_system=True, before_document=before_document, tail=tail
    )


def _render(
    template: str,
    messages: list[dict[str, str]],
    special_tokens: Mapping[str, str],
    *,
    with_system: bool,
) -> str:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if "strftime_now" in template:
        template = _FIXED_CLOCK + template
    # Direct answers: reasoning templates open a thinking block unless they are told not to.
    variables: dict[str, Any] = {
        **special_tokens,
        "add_generation_prompt": True,
        "enable_thinking": False,
        "date_string": _DATE,
    }
    try:
        rendered: Any = render_jinja_template(
            conversations=[messages], chat_template=template, **variables
        )
    except TemplateError as error:
        if with_system:
            raise UsageError(
                f"the model's chat template takes no system text ({error}); one user turn alone "
                "is accepted; leave out --system"
            ) from error
        raise ModelUnsupported(
            f"the model's chat template fails for one user turn ({error}); one that renders it is "
            "needed; choose another model"
        ) from error
    texts, _ = rendered
    return str(texts[0])

"""Chat templates: how they are cut, what they see, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import ModelUnsupported, UsageError
from orchestrator.model.tokenizer_files import load_gguf_tokenizer
from tests.model.tokenizer_stubs import gguf_vocabulary, with_metadata

TEMPLATE_NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ messages[0]['content'] | trim }}<|im_end|>"
)


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (TEMPLATE_NO_SYSTEM, UsageError, "takes no system text"),
        ("{{ messages[-1]['content'] }}", UsageError, "0 times"),
        ("{{ messages[1]['content'] }}{{ messages }}", ModelUnsupported, "2 times"),
    ],
)
def test_templates_that_cannot_be_split_for_a_system_text(
    template: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    file = with_metadata(gguf_vocabulary(tmp_path / "v.gguf"), {"chat_template": template})
    with pytest.raises(error, match=message):
        load_gguf_tokenizer(file, tmp_path).frame("be brief")


@pytest.mark.parametrize("template", ["{{ messages[0]['nothing'].x.y }}", "{% broken", "fixed"])
def test_templates_that_fail_are_refused(template: str, tmp_path: Path) -> None:
    file = with_metadata(gguf_vocabulary(tmp_path / "v.gguf"), {"chat_template": template})
    with pytest.raises(ModelUnsupported, match="chat template"):
        load_gguf_tokenizer(file, tmp_path).frame()


def test_a_template_without_a_system_role_serves_without_one(tmp_path: Path) -> None:
    changes = {"chat_template": TEMPLATE_NO_SYSTEM}
    file = with_metadata(gguf_vocabulary(tmp_path / "v.gguf"), changes)
    tokenizer = load_gguf_tokenizer(file, tmp_path)
    assert tokenizer.frame() == [1]
    assert tokenizer.question("x")[-1] == 2


def test_a_template_sees_a_fixed_date_and_no_thinking(tmp_path: Path) -> None:
    template = (
        "{{ strftime_now('%d %b %Y') }}{% if not enable_thinking %}!{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    file = with_metadata(gguf_vocabulary(tmp_path / "v.gguf"), {"chat_template": template})
    tokenizer = load_gguf_tokenizer(file, tmp_path)
    assert tokenizer.decode(tokenizer.frame()) == "26 Jul 2024!"


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[0]['content'] }}"
    file = with_metadata(gguf_vocabulary(tmp_path / "v.gguf"), {"chat_template": template})
    with pytest.raises(ModelUnsupported, match="unsafe"):
        load_gguf_tokenizer(file, tmp_path).frame()

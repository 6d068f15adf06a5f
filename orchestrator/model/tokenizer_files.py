"""Builds tokenizers: from a Hugging Face directory, from GGUF metadata, and one of plain bytes.

Owns which files are read and the pre-tokenisation that GGUF names by a word. A word not known here
is refused: the split before merging is mathematics too. Code in a model directory is never run:
`auto_map` and `tokenizer_class` are not even looked at. Refuses to know what ids are used for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from orchestrator.errors import ModelDamaged, ModelNotFound, ModelUnsupported
from orchestrator.model.fingerprint import fingerprint_parts
from orchestrator.model.gguf_file import GgufFile
from orchestrator.model.hf_weights import read_json
from orchestrator.model.tokenizer import Tokenizer, TokenizerParts

_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")
_GGUF_SPECIALS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_GGUF_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# Llama 3's split; Qwen2's differs in how many digits stay together.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pre:
    """One kind of byte-level BPE: how text is split and normalised before merges.

    `digits` None keeps GPT-2's split; `single_digits` cuts every digit off first; with
    `ignore_merges` a word that is a token is taken whole.
    """

    digits: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False


_PRE = {
    "gpt-2": _Pre(),
    "smollm": _Pre(single_digits=True),
    "llama-bpe": _Pre(digits=r"\p{N}{1,3}", ignore_merges=True),
    "qwen2": _Pre(digits=r"\p{N}", nfc=True),
}


def load_hf_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a Hugging Face directory; needs its tokenizer.json."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFound(
            f"{path} does not exist; tokenizers are read from tokenizer.json alone; save the "
            "model's fast tokenizer there"
        )
    content = path.read_bytes()
    settings = _read_optional(directory / "tokenizer_config.json")
    backend = _parse_backend(content, path)
    specials = {
        name: text for name in _SPECIALS if (text := _token_text(settings.get(name))) is not None
    }
    template = _find_template(directory, settings)
    bos = backend.token_to_id(specials["bos_token"]) if "bos_token" in specials else None
    # What the file adds to an empty text tells whether BOS belongs before every text.
    added = backend.encode("", add_special_tokens=True).ids
    stops = _stop_ids(directory)
    if (eos := backend.token_to_id(specials.get("eos_token", ""))) is not None:
        stops.add(eos)
    return _finish(
        backend,
        template=template,
        special_tokens=specials,
        lead_ids=(bos,) if bos is not None and bos in added[:1] else (),
        stop_ids=frozenset(stops),
        content=[content],
    )


def load_gguf_tokenizer(file: GgufFile, directory: Path) -> Tokenizer:
    """Return the tokenizer that a GGUF file carries.

    For kinds that are not rebuilt here (SentencePiece), a tokenizer.json beside the file serves,
    if it has the same vocabulary. Raises ModelUnsupported or ModelDamaged.
    """
    ggml = _GgmlKeys(file)
    tokens, types = ggml.needed("tokens"), ggml.get("token_type") or []
    merges = ggml.get("merges") or []
    kind, pre = ggml.get("model"), ggml.get("pre")
    content = [str([kind, pre]).encode(), "\n".join(tokens).encode(), "\n".join(merges).encode()]
    if kind == "gpt2" and pre in _PRE:
        backend = _byte_level_bpe(tokens, merges, _PRE[pre])
        _add_tokens(backend, tokens, types)
    else:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelUnsupported(
                f"tokenizer {kind!r} with pre-tokenisation {pre!r} of {file.name} is not "
                f"supported; supported: gpt2 with {', '.join(_PRE)}; put the model's "
                "tokenizer.json beside the file"
            )
        content.append(path.read_bytes())
        backend = _parse_backend(content[-1], path)
        _check_same_vocabulary(backend, tokens, types, file.name)
    specials = {
        name: tokens[token_id]
        for name, key in _GGUF_SPECIALS.items()
        if (token_id := ggml.get(key)) is not None
    }
    leads = (
        bool(ggml.get("add_bos_token", kind == "llama")) and ggml.get("bos_token_id") is not None
    )
    return _finish(
        backend,
        template=file.metadata.get("tokenizer.chat_template"),
        special_tokens=specials,
        lead_ids=(ggml.get("bos_token_id"),) if leads else (),
        stop_ids=frozenset(ggml.get(k) for k in _GGUF_STOPS if ggml.get(k) is not None),
        content=content,
    )


def byte_tokenizer() -> Tokenizer:
    """Return a stand-in for models of random weights: one id a byte, no template, no stop."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = _byte_level_bpe(alphabet, [], _Pre())
    return _finish(
        backend,
        template=None,
        special_tokens={},
        lead_ids=(),
        stop_ids=frozenset(),
        content=[b"bytes"],
    )


@dataclass(frozen=True, slots=True)
class _GgmlKeys:
    file: GgufFile

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{key}", default)

    def needed(self, key: str) -> Any:
        value = self.get(key)
        if not value:
            raise ModelDamaged(
                f"tokenizer.ggml.{key} of {self.file.name} is missing; a vocabulary is needed; "
                "choose a file that carries its tokenizer"
            )
        return value


def _byte_level_bpe(tokens: list[str], merges: list[str], pre: _Pre) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(left, right) for left, _, right in (m.partition(" ") for m in merges)],
            ignore_merges=pre.ignore_merges,
        )
    )
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.digits is not None:
        steps.append(pre_tokenizers.Split(Regex(_SPLIT.format(digits=pre.digits)), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.digits is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Mark control tokens as special and user-defined ones as whole; their ids stay."""
    marked = list(zip(tokens, types, strict=False))
    special = [AddedToken(t, special=True, normalized=False) for t, k in marked if k == _CONTROL]
    whole = [
        AddedToken(t, special=False, normalized=False) for t, k in marked if k == _USER_DEFINED
    ]
    backend.add_special_tokens(special)
    backend.add_tokens(whole)


def _check_same_vocabulary(
    backend: tokenizers.Tokenizer, tokens: list[str], types: list[int], name: str
) -> None:
    """GGUF may spell SentencePiece's space mark as a space; control and byte tokens may differ."""
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        other = backend.id_to_token(i)
        if kind == _NORMAL and (other or "").replace("▁", " ") != token.replace("▁", " "):
            raise ModelDamaged(
                f"token {i} is {token!r} in {name} and {other!r} in the tokenizer.json beside it; "
                "both must have one vocabulary; put the model's own tokenizer.json there"
            )


def _finish(
    backend: tokenizers.Tokenizer,
    *,
    template: str | None,
    special_tokens: Mapping[str, str],
    lead_ids: tuple[int, ...],
    stop_ids: frozenset[int],
    content: list[bytes],
) -> Tokenizer:
    # Nothing is cut, padded or added behind the caller's back, and spans keep their whitespace.
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    marks = str([template, sorted(special_tokens.items()), lead_ids, sorted(stop_ids)])
    return Tokenizer(
        parts=TokenizerParts(
            backend=backend,
            template=template,
            special_tokens=special_tokens,
            lead_ids=lead_ids,
            stop_ids=stop_ids,
            fingerprint=fingerprint_parts([*content, marks.encode()]),
        )
    )


def _parse_backend(content: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except ValueError as error:
        raise ModelDamaged(
            f"{path} is cut or damaged at {len(content)} bytes ({error}); fetch the model again"
        ) from error


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _token_text(value: Any) -> str | None:
    """Special tokens are stored as a string, or as an object with its text in `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _find_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The template's own file comes first; a list of named templates means its "default"."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    stated = settings.get("chat_template")
    if isinstance(stated, list):
        stated = {entry["name"]: entry["template"] for entry in stated}.get("default")
    return stated if isinstance(stated, str) else None


def _stop_ids(directory: Path) -> set[int]:
    """End-of-sequence ids of generation_config.json and config.json: a number or a list."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        stated = _read_optional(directory / name).get("eos_token_id")
        ids.update(stated if isinstance(stated, list) else [] if stated is None else [stated])
    return ids

"""The command line on a tiny model: what is printed where, in which shape, with which exit code."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions, Progress
from tests.tiny_model import QUESTION, SEGMENT_TOKENS, TEXT, save_tiny_model

NAME = "boxes"
NUMBER = (int, float)
# DESIGN section 7, `ask --json`.
SHAPE: dict[str, Any] = {
    "schema": int,
    "answer": str,
    "finish_reason": str,
    "model": str,
    "document": {"name": str, "hash": str},
    "selection": {
        "requested": str,
        "mode": str,
        "budget_keys": (int, type(None)),
        "mass": (float, type(None)),
        "reason": str,
    },
    "usage": {
        "prompt_tokens": int,
        "prompt_tokens_details": {"cached_tokens": int},
        "question_tokens": int,
        "completion_tokens": int,
        "attended_keys_mean": NUMBER,
        "attended_keys_max": int,
        "bytes_read": int,
    },
    "timing": {
        "load_s": NUMBER,
        "open_s": NUMBER,
        "ttft_s": NUMBER,
        "tpot_s": NUMBER,
        "total_s": NUMBER,
    },
    "recall": {
        "mass_mean": NUMBER,
        "mass_p10": NUMBER,
        "ci95": list,
        "bound": {"p50": NUMBER, "p99": NUMBER, "vacuous_share": NUMBER},
        "audit": {"mass_mean": NUMBER, "mass_p10": NUMBER, "miss_max": NUMBER},
    },
    "evidence": list,
    "plan": (dict, type(None)),  # of a machine that was calibrated, or not
    "stack": dict,
}
SPAN_SHAPE = {"start_char": int, "end_char": int, "score": NUMBER, "text": str}


def find_misfit(value: Any, shape: Any, place: str = "answer") -> str | None:
    """Where a JSON value is not of that shape; keys must be exactly those, in that order."""
    if not isinstance(shape, dict):
        return None if isinstance(value, shape) else f"{place} is {value!r}"
    if not isinstance(value, dict) or list(value) != list(shape):
        return f"{place} is {value!r}"
    found = (find_misfit(value[key], shape[key], f"{place}.{key}") for key in shape)
    return next((misfit for misfit in found if misfit is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cli:
    """The command, run in this process, with a tiny model and a store."""

    capsys: pytest.CaptureFixture[str]
    folder: Path

    @property
    def engine(self) -> Engine:
        return Engine.load(str(self.folder / "model"), store=self.folder / "store", threads=1)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        code = main(list(arguments))
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def ok(self, *arguments: str) -> str:
        """Stdout of a command that must end well."""
        code, out, err = self.run(*arguments)
        assert code == 0, err
        return out

    def docs(self, *arguments: str) -> tuple[int, str, str]:
        return self.run("docs", *arguments, "--store", str(self.folder / "store"))

    def ask(self, *arguments: str) -> str:
        return self.ok("ask", *arguments, "--max-tokens", "6", *self.common())

    def common(self) -> tuple[str, ...]:
        model, store = self.folder / "model", self.folder / "store"
        return "--model", str(model), "--store", str(store), "--threads", "1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a store with one document."""
    folder = tmp_path_factory.mktemp("cli")
    model = save_tiny_model(folder / "model")
    (folder / f"{NAME}.txt").write_text(TEXT)
    with Engine.load(str(model), store=folder / "store", threads=1) as engine:
        options = IngestOptions(segment_tokens=SEGMENT_TOKENS)
        engine.ingest(folder / f"{NAME}.txt", options=options)
    return folder


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], folder: Path) -> Cli:
    return Cli(capsys=capsys, folder=folder)


def test_ask_json_has_exactly_the_public_shape(cli: Cli) -> None:
    out = cli.ask(NAME, QUESTION, "--mode", "centroid", "--audit", "--json")
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert find_misfit(answer, SHAPE) is None
    assert answer["evidence"]
    assert [find_misfit(span, SPAN_SHAPE) for span in answer["evidence"]] == [None] * len(
        answer["evidence"]
    )
    assert answer["schema"] == 1
    assert len(answer["recall"]["ci95"]) == 2
    assert answer["document"]["name"] == NAME
    assert answer["timing"]["load_s"] > 0
    assert answer["timing"]["open_s"] > 0


def test_the_shape_check_sees_a_difference() -> None:
    assert find_misfit({"a": 1}, {"a": str}) == "answer.a is 1"
    assert find_misfit({"a": 1, "b": 2}, {"a": int}) is not None
    assert find_misfit({}, {"a": int}) is not None


@pytest.mark.parametrize("mode", ["auto", "exact", "window", "centroid"])
def test_every_mode_is_reachable(cli: Cli, mode: str) -> None:
    answer = json.loads(cli.ask(NAME, QUESTION, "--mode", mode, "--json"))
    assert answer["selection"]["requested"] == mode
    assert answer["recall"]["audit"] is None
    if mode != "auto":
        assert answer["selection"]["mode"] == mode


def test_a_budget_and_a_mass_reach_the_selection(cli: Cli) -> None:
    def selection(*options: str) -> dict[str, Any]:
        asked = cli.ask(NAME, QUESTION, "--mode", "centroid", "--json", *options)
        found: dict[str, Any] = json.loads(asked)["selection"]
        return found

    assert selection("--budget", "200")["budget_keys"] == 200
    assert selection("--budget", "50%")["budget_keys"] == round(0.5 * (len(TEXT) + 6))
    assert selection("--mass", "0.5")["mass"] == 0.5


def test_a_streamed_answer_is_the_answer(cli: Cli) -> None:
    streamed, whole = cli.ask(NAME, QUESTION), cli.ask(NAME, QUESTION, "--no-stream")
    answer = json.loads(cli.ask(NAME, QUESTION, "--json"))["answer"]
    for out in (streamed, whole):
        assert out.split("selection ")[0].strip() == answer
        assert "recall" in out
        assert "evidence" in out


def test_temperature_and_seed(cli: Cli) -> None:
    def draw(seed: int) -> str:
        options = ("--temperature", "1.5", "--top-p", "0.99", "--seed", str(seed), "--json")
        answer: str = json.loads(cli.ask(NAME, QUESTION, *options))["answer"]
        return answer

    assert draw(3) == draw(3)
    assert len({draw(seed) for seed in range(3)}) > 1


def test_questions_of_a_file_are_answered_line_by_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = "Who?\n\n  What?  \nHow many?\n"
    (tmp_path / "questions.txt").write_text(questions)
    from_file = cli.ask(NAME, "--questions", str(tmp_path / "questions.txt"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(questions.encode())))
    from_stdin = cli.ask(NAME, "--questions", "-")
    for out in (from_file, from_stdin):
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line.pop("question") for line in lines] == ["Who?", "What?", "How many?"]
        assert [line["recall"]["audit"] for line in lines] == [None] * 3
        assert [line["timing"]["open_s"] > 0 for line in lines] == [True, False, False]
    answers = [[json.loads(line)["answer"] for line in o.splitlines()] for o in (from_file, out)]
    assert answers[0] == answers[1]


def test_ingest_says_what_it_did(cli: Cli, tmp_path: Path) -> None:
    store = ("--model", str(cli.folder / "model"), "--store", str(tmp_path), "--threads", "1")
    source, segments = str(cli.folder / f"{NAME}.txt"), ("--segment-tokens", "256")
    first = json.loads(cli.ok("ingest", source, "--json", *segments, *store))
    assert first["name"] == NAME
    assert first["computed_tokens"] == first["num_tokens"] == len(TEXT) + 6
    assert first["was_complete"] is False
    again = cli.ok("ingest", source, *segments, *store)
    assert "already ingested" in again
    assert first["document_hash"] in again
    replaced = cli.ok("ingest", source, "--window", "32", "--replace", *segments, *store)
    assert first["document_hash"] not in replaced


def test_a_sparse_ingest_is_another_document(cli: Cli, folder: Path) -> None:
    path = str(folder / f"{NAME}.txt")
    common = (path, "--name", "sparse", "--segment-tokens", str(SEGMENT_TOKENS), *cli.common())
    asked = ("--prefill", "sparse", "--prefill-budget", "25%")
    report = json.loads(cli.ok("ingest", *common, *asked, "--json"))
    assert report["prefill"] == "sparse"
    code, _, said = cli.run("ingest", *common)
    assert code != 0
    assert "prefill 'sparse budget=25%" in said
    code, _, said = cli.run("ingest", *common, "--prefill-budget", "25%")
    assert (code, "give prefill sparse too" in said) == (2, True)
    assert cli.docs("rm", "sparse")[0] == 0


def test_ingest_of_standard_input(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    model = ("--model", str(cli.folder / "model"), "--threads", "1", "--store", str(tmp_path))
    out = cli.ok("ingest", "-", "--name", "piped", "--segment-tokens", "256", "--json", *model)
    assert json.loads(out)["document_hash"] == cli.engine.docs()[0].document_hash


class Stopped(Exception):
    """Ends an ingest in the middle."""


def stop(progress: Progress) -> None:
    if progress.done_tokens > SEGMENT_TOKENS:
        raise Stopped


def test_docs_from_listing_to_removal(cli: Cli) -> None:
    options = IngestOptions(segment_tokens=SEGMENT_TOKENS)
    with cli.engine as engine, pytest.raises(Stopped):
        engine.ingest(text=TEXT, name="stopped", options=options, on_progress=stop)
    code, out, _ = cli.docs("ls", "--json")
    infos = {info["name"]: info for info in json.loads(out)["documents"]}
    assert code == 0
    assert {name: info["is_complete"] for name, info in infos.items()} == {
        NAME: True,
        "stopped": False,
    }
    assert infos["stopped"]["sealed_tokens"] == SEGMENT_TOKENS
    assert f"incomplete ({SEGMENT_TOKENS} tokens sealed)" in cli.docs("ls")[1]
    shown = json.loads(cli.docs("show", NAME, "--json")[1])
    assert shown["hash"] == infos[NAME]["document_hash"]
    assert shown["segment_tokens"] == SEGMENT_TOKENS
    assert f"{shown['hash']}\n" in cli.docs("show", NAME)[1]
    assert cli.docs("verify", NAME)[:2] == (0, f"{NAME}: every byte is as written\n")
    assert cli.docs("rm", "stopped")[0] == 0
    assert [info["name"] for info in json.loads(cli.docs("ls", "--json")[1])["documents"]] == [NAME]


@pytest.mark.parametrize(
    "file", ["segments/00002/kv001.safetensors", "text.txt", "tokens.safetensors", "manifest.json"]
)
def test_verify_names_a_damaged_file_and_ask_refuses_it(
    cli: Cli, tmp_path: Path, file: str
) -> None:
    model = ("--model", str(cli.folder / "model"), "--store", str(tmp_path), "--threads", "1")
    cli.ok("ingest", str(cli.folder / f"{NAME}.txt"), "--segment-tokens", "256", *model)
    path = tmp_path / NAME / file
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = cli.run("docs", "verify", NAME, "--json", "--store", str(tmp_path))
    assert code == 1
    assert [damage["file"] for damage in json.loads(out)["damaged"]] == [file]
    code, out, err = cli.run("docs", "verify", NAME, "--store", str(tmp_path))
    assert (code, err) == (1, "")
    assert f"{NAME}/{file}: " in out
    code, out, err = cli.run("ask", NAME, QUESTION, *model)
    assert (code, out) == (1, "")
    assert file in err
    repaired = cli.ok("ingest", str(cli.folder / f"{NAME}.txt"), "--replace", "--segment-tokens",
                      "256", "--json", *model)  # fmt: skip
    assert json.loads(repaired)["document_hash"] == cli.engine.docs()[0].document_hash
    assert cli.run("docs", "verify", NAME, "--store", str(tmp_path))[0] == 0


def test_an_empty_store_is_no_error(cli: Cli, tmp_path: Path) -> None:
    assert json.loads(cli.ok("docs", "ls", "--json", "--store", str(tmp_path)))["documents"] == []
    assert "add one with" in cli.run("docs", "ls", "--store", str(tmp_path))[2]


def test_the_store_comes_from_the_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSPAN_STORE", str(cli.folder / "store"))
    assert NAME in cli.ok("docs", "ls")


def test_models_and_doctor_answer_in_json(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGSPAN_MODELS", str(tmp_path))
    models = json.loads(cli.ok("models", "ls", "--json"))["models"]
    assert [model["path"] for model in models] == [None] * len(models)
    code, out, _ = cli.run("doctor", "--json", "--store", str(tmp_path))
    checks = {check["what"]: check for check in json.loads(out)["checks"]}
    assert code == 1
    assert checks["default model"]["is_fine"] is False
    assert checks["store"]["is_fine"] is True


@pytest.mark.parametrize("arguments", [[], ["docs"], ["models"]])
def test_no_arguments_show_the_help_as_wrong_usage(cli: Cli, arguments: list[str]) -> None:
    code, out, err = cli.run(*arguments)
    assert (code, out) == (2, "")
    assert "Commands:" in err


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "-h"], ["--version"]])
def test_help_and_version_end_well(cli: Cli, arguments: list[str]) -> None:
    assert cli.ok(*arguments) != ""


def test_an_interrupt_says_how_to_go_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "ask", interrupt)
    code, out, err = cli.run("ask", NAME, QUESTION, *cli.common())
    assert (code, out) == (130, "")
    assert "run the same command to resume" in err

"""The Containerfile as far as it can be judged without building it."""

from __future__ import annotations

import re
import shlex

from tests.deploy.containerfile import CONTAINERFILE, image_environment, read_instructions
from tests.deploy.manifests import DEPLOY, JOB, find_all_pods
from tests.deploy.test_hardening import PINS, VERSION
from tests.source import PACKAGES, ROOT

INSTRUCTIONS = read_instructions()
LAST = [item for item in INSTRUCTIONS if item.stage == INSTRUCTIONS[-1].stage]


def texts(name: str, *, last: bool = False) -> list[str]:
    """The arguments of every instruction of that name."""
    return [item.text for item in (LAST if last else INSTRUCTIONS) if item.name == name]


def test_the_base_is_one_exact_tag() -> None:
    [image] = [text.partition("=")[2] for text in texts("ARG") if text.startswith("PYTHON_IMAGE")]
    assert re.fullmatch(r"docker\.io/library/python:3\.\d+\.\d+-slim-[a-z]+", image)
    bases = [text.split(" AS ") for text in texts("FROM")]
    assert [base[0] for base in bases] == ["${PYTHON_IMAGE}", "base", "base"]


def test_the_user_is_the_one_of_the_manifests() -> None:
    [user] = texts("USER", last=True)
    [pod] = find_all_pods(JOB)
    context = pod.spec["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
    # Libraries look the user up by its number.
    assert any(f"useradd --uid {context['runAsUser']} " in text for text in texts("RUN", last=True))


def test_what_is_written_lies_on_mounts_of_the_manifests() -> None:
    [pod] = find_all_pods(JOB)
    mounts = {mount["mountPath"] for mount in pod.containers[0]["volumeMounts"]}
    folders = {name: value for name, value in image_environment().items() if value.startswith("/")}
    assert {"HOME", "LONGSPAN_STORE", "LONGSPAN_MODELS", "TRITON_CACHE_DIR"} <= set(folders)
    for name, folder in folders.items():
        assert any(folder == mount or folder.startswith(f"{mount}/") for mount in mounts), name
    assert folders["LONGSPAN_STORE"].startswith("/data/")


def test_only_the_project_goes_in() -> None:
    sources = [
        source
        for text in texts("COPY")
        if not text.startswith("--from")
        for source in text.split()[:-1]
    ]
    assert set(PACKAGES) <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    ignored = (DEPLOY / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == set(sources)
    assert texts("ADD") == []
    assert "models fetch" not in CONTAINERFILE.read_text(encoding="utf-8")


def test_every_installation_is_constrained() -> None:
    installs = [text for text in texts("RUN") if "pip install" in text]
    assert installs
    assert all("-c constraints.txt" in text for text in installs)
    lines = (DEPLOY / "ray-constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    normal = {re.sub(r"[-_.]+", "-", name.lower()) for name in PINS}
    again = {re.sub(r"[-_.]+", "-", line.partition("==")[0].lower()) for line in lines} & normal
    assert again == set(), "pinned twice"


def test_it_names_itself() -> None:
    labels = dict(
        word.split("=", 1) for text in texts("LABEL", last=True) for word in shlex.split(text)
    )
    assert labels["org.opencontainers.image.title"] == "longspan"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert f"VERSION={VERSION}" in texts("ARG", last=True)
    assert texts("ENTRYPOINT", last=True) == ['["longspan"]']

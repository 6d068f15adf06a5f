"""The small kustomize builds what the real one builds, and says so where it cannot."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.kustomization import Unsupported, build, find, json_patch, strategic_merge
from tests.deploy.manifests import DEPLOY, FOLDERS, RUNNABLE, find_pods, folder_name
from tests.source import ROOT

KUBECTL, KUSTOMIZE = shutil.which("kubectl"), shutil.which("kustomize")
VOLUMES = (DEPLOY / "kubernetes" / "volume", DEPLOY / "kuberay" / "volume")
BASE = """
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  containers:
  - {name: a, image: "x:1", env: [{name: K, value: old}, {name: L, value: kept}]}
  - {name: b, image: "y:1"}
"""


@pytest.mark.skipif(not (KUBECTL or KUSTOMIZE), reason="neither kubectl nor kustomize is installed")
@pytest.mark.parametrize("folder", FOLDERS, ids=folder_name)
def test_it_builds_what_the_real_one_builds(folder: Path) -> None:
    command = [KUSTOMIZE, "build"] if KUSTOMIZE else [KUBECTL, "kustomize"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=True)
    assert _sorted(list(yaml.safe_load_all(done.stdout))) == _sorted(build(folder))


def _sorted(resources: list[dict[str, Any]]) -> list[str]:
    """Order of resources, and of a list of named items, says nothing."""
    return sorted(json.dumps(_normal(resource), sort_keys=True) for resource in resources)


def _normal(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    if isinstance(value, list):
        items = [_normal(item) for item in value]
        is_named = all(isinstance(item, dict) and "name" in item for item in items)
        return sorted(items, key=lambda item: str(item["name"])) if is_named else items
    return value


def _write(folder: Path, kustomization: str, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "kustomization.yaml").write_text(kustomization)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_strategic_patch_merges_named_items(tmp_path: Path) -> None:
    patch = """
    apiVersion: v1
    kind: Pod
    metadata: {name: p}
    spec:
      containers:
      - {name: a, env: [{name: K, value: new}, {name: M, value: more}]}
    """
    folder = _write(
        tmp_path, "resources: [base.yaml]\npatches: [{path: patch.yaml}]", base=BASE, patch=patch
    )
    a, b = build(folder)[0]["spec"]["containers"]
    assert {entry["name"]: entry["value"] for entry in a["env"]} == {
        "K": "new",
        "L": "kept",
        "M": "more",
    }
    assert (a["image"], b["image"]) == ("x:1", "y:1")


def test_a_strategic_patch_replaces_other_lists_and_deletes_with_null() -> None:
    old = {"command": ["a", "b"], "gone": 1, "kept": 2}
    assert strategic_merge(old, {"command": ["c"], "gone": None}) == {"command": ["c"], "kept": 2}


def test_a_json_patch_finds_its_place() -> None:
    resource = yaml.safe_load(BASE)
    json_patch(
        resource,
        [
            {"op": "replace", "path": "/spec/containers/1/image", "value": "z:1"},
            {"op": "add", "path": "/metadata/labels", "value": {}},
            {"op": "add", "path": "/metadata/labels/a~1b", "value": "c"},
            {"op": "remove", "path": "/spec/containers/0"},
        ],
    )
    assert resource["metadata"]["labels"] == {"a/b": "c"}
    assert [c["image"] for c in resource["spec"]["containers"]] == ["z:1"]
    with pytest.raises(KeyError):
        json_patch(resource, [{"op": "replace", "path": "/spec/nodeName", "value": "n"}])


@pytest.mark.parametrize("folder", [*RUNNABLE, *VOLUMES], ids=folder_name)
def test_the_folder_that_the_page_shows_fits(folder: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    default = "../longspan/deploy/kubernetes/overlays/h100-8"
    assert default in shown
    (tmp_path / "longspan").symlink_to(ROOT)
    reading = tmp_path / "reading"
    _write(reading, shown.replace(default, f"../longspan/deploy/{folder_name(folder)}"))
    (reading / "questions.txt").write_text("Why?\n")
    resources = build(reading)
    assert {resource["metadata"]["namespace"] for resource in resources} == {"reading"}
    pods = [pod for resource in resources for pod in find_pods(resource)]
    used = {container["image"].partition(":")[0] for pod in pods for container in pod.containers}
    assert used == {"registry.example.com/longspan"}
    options = find(resources, "ConfigMap", "longspan-options")["data"]
    assert (options["JOB_NAME"], options["JOB_MODE"]) == ("novel", "auto")
    questions = find(resources, "ConfigMap", "longspan-questions")["data"]
    assert questions == {"questions.txt": "Why?\n"}


@pytest.mark.parametrize(
    "kustomization",
    [
        "helmCharts: []",
        "configMapGenerator: [{name: a, literals: [b=c]}]",
        "resources: [../outside.yaml]",
        "resources: [base.yaml]\npatches: [{patch: '{apiVersion: ray.io/v1, kind: RayJob}'}]",
    ],
)
def test_what_it_cannot_build_is_refused(tmp_path: Path, kustomization: str) -> None:
    (tmp_path / "outside.yaml").write_text(BASE)
    with pytest.raises(Unsupported):
        build(_write(tmp_path / "folder", kustomization, base=BASE))

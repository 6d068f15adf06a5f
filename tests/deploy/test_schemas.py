"""Every manifest is valid: Kubernetes' own OpenAPI schemas, strictly, and a schema for the RayJob.

The package kubernetes-validate ships the schemas of each Kubernetes release; unknown fields fail.
No package ships KubeRay's custom resource. `schemas/rayjob.json` is written from the API reference
of KubeRay 1.6 and 1.7 and from the checks that its operator makes (a name's form and length, a Ray
version with token mode, a time to live only with shut-down, no submitter template with a sidecar).
It covers what deploy/kuberay uses and its closest neighbours and refuses every other field; pod
templates inside it are checked by Kubernetes' schema. That an operator accepts the whole is not
shown.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.deploy.kustomization import Resource, find
from tests.deploy.manifests import FOLDERS, JOB, RAY, built, find_pods, folder_name

RAY_SCHEMA = json.loads((Path(__file__).parent / "schemas" / "rayjob.json").read_text("utf-8"))
# The first release where a Job's pod failure policy is stable, and the newest that has a schema.
RELEASES = ("1.31", kubernetes_validate.latest_version())


def check(resource: Resource, release: str) -> None:
    """Raise a ValidationError for a resource that is not valid."""
    if resource["apiVersion"].partition("/")[0] == "ray.io":
        jsonschema.Draft202012Validator(RAY_SCHEMA).validate(resource)
        templates = [
            {"apiVersion": "v1", "kind": "PodTemplate", "template": pod.template}
            for pod in find_pods(resource)
        ]
        for template in templates:
            kubernetes_validate.validate(template, release, strict=True)
        return
    kubernetes_validate.validate(resource, release, strict=True)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("folder", FOLDERS, ids=folder_name)
def test_manifests_are_valid(folder: Path, release: str) -> None:
    for resource in built(folder):
        check(resource, release)


def test_the_ray_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(RAY_SCHEMA)


def _job(change: Callable[[dict[str, Any]], object]) -> Resource:
    resource = copy.deepcopy(find(list(built(JOB)), "Job", "longspan"))
    change(resource["spec"])
    return resource


def _ray(change: Callable[[dict[str, Any]], object]) -> Resource:
    resource = copy.deepcopy(find(list(built(RAY)), "RayJob", "longspan"))
    change(resource["spec"])
    return resource


def _worker(spec: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    return group


@pytest.mark.parametrize(
    "resource",
    [
        _job(lambda spec: spec.update(backoffLimits=3)),
        _job(lambda spec: spec.update(backoffLimit="3")),
        _job(lambda spec: spec["template"]["spec"]["containers"][0].pop("name")),
        _job(lambda spec: spec["template"]["spec"]["securityContext"].update(runAsUser="root")),
        _job(lambda spec: spec["podFailurePolicy"]["rules"][1].pop("action")),
        _ray(lambda spec: spec.update(entrypointNumGPUs=1)),
        _ray(lambda spec: spec.pop("shutdownAfterJobFinishes")),
        _ray(lambda spec: spec.update(submissionMode="SidecarMode")),
        _ray(lambda spec: spec["rayClusterSpec"].pop("rayVersion")),
        _ray(lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="tokens")),
        _ray(lambda spec: _worker(spec)["rayStartParams"].update({"num-gpus": 4})),
        _ray(lambda spec: _worker(spec)["template"]["spec"].update(hostnetwork=True)),
        _ray(lambda spec: spec["submitterPodTemplate"]["spec"].pop("containers")),
    ],
)
def test_a_wrong_field_is_found(resource: Resource) -> None:
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(resource, RELEASES[-1])

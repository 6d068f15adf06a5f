"""The manifests under deploy/ as the tests see them: built resources, and the pods that they make.

Owns where the folders are and where in a resource a pod is described. Refuses to judge.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.deploy.kustomization import Resource, build
from tests.source import ROOT

DEPLOY = ROOT / "deploy"
FOLDERS = tuple(sorted(path.parent for path in DEPLOY.rglob("kustomization.yaml")))
JOB, RAY = DEPLOY / "kubernetes" / "base", DEPLOY / "kuberay"
RUNNABLE = (JOB, *sorted((DEPLOY / "kubernetes" / "overlays").iterdir()), RAY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod that a resource makes. count: how many of them run at once."""

    where: str
    template: dict[str, Any]
    count: int = 1

    @property
    def spec(self) -> dict[str, Any]:
        """Its PodSpec."""
        spec: dict[str, Any] = self.template["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        """Its labels."""
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return labels

    @property
    def containers(self) -> list[dict[str, Any]]:
        """Init containers and containers."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def num_gpus(self) -> int:
        """GPUs of all its containers."""
        return sum(int(c["resources"]["limits"].get("nvidia.com/gpu", 0)) for c in self.containers)


@cache
def built(folder: Path) -> tuple[Resource, ...]:
    """The resources of a folder; whoever changes them copies them first."""
    return tuple(build(folder))


def folder_name(folder: Path) -> str:
    """Name of a folder in a test's id."""
    return str(folder.relative_to(DEPLOY))


def find_pods(resource: Resource) -> Iterator[Pod]:
    """The pods that a resource makes."""
    kind, spec = resource["kind"], resource.get("spec", {})
    if kind == "Pod":
        yield Pod(where="pod", template={"metadata": resource["metadata"], "spec": spec})
    elif kind == "Job":
        yield Pod(where="job", template=spec["template"])
    elif kind == "RayJob":
        cluster = spec["rayClusterSpec"]
        yield Pod(where="submitter", template=spec["submitterPodTemplate"])
        yield Pod(where="head", template=cluster["headGroupSpec"]["template"])
        for group in cluster["workerGroupSpecs"]:
            name = f"worker {group['groupName']}"
            yield Pod(where=name, template=group["template"], count=group["replicas"])


def find_all_pods(folder: Path) -> list[Pod]:
    """The pods of all resources of a folder."""
    return [pod for resource in built(folder) for pod in find_pods(resource)]


def find_worker(folder: Path) -> Pod:
    """The only kind of pod with GPUs: it runs the entry point."""
    [pod] = [pod for pod in find_all_pods(folder) if pod.num_gpus]
    return pod


def find_entry_point(folder: Path) -> list[str]:
    """The command that does the work: the Job's container's, or the RayJob's entry point."""
    entries = [
        shlex.split(resource["spec"]["entrypoint"])
        for resource in built(folder)
        if resource["kind"] == "RayJob"
    ]
    [command] = entries or [find_worker(folder).containers[0]["command"]]
    return list(command)


def environment(container: dict[str, Any], resources: tuple[Resource, ...]) -> dict[str, str]:
    """Variables that the manifest gives a container, those of ConfigMaps included."""
    variables: dict[str, str] = {}
    for source in container.get("envFrom", []):
        [data] = [
            resource["data"]
            for resource in resources
            if resource["kind"] == "ConfigMap"
            and resource["metadata"]["name"] == source["configMapRef"]["name"]
        ]
        variables |= data
    return variables | {entry["name"]: entry["value"] for entry in container.get("env", [])}

"""What every pod, and every manifest as a whole, must never be without.

Each rule yields its faults; below the rules, changes show that each finds what it is for.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from collectives.bootstrap import NO_MULTICAST
from tests.deploy.kustomization import Resource, find
from tests.deploy.manifests import FOLDERS, JOB, RAY, Pod, built, find_pods, folder_name
from tests.source import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
)
CREDENTIAL = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY")
NOT_CREDENTIALS = ("JOB_SEGMENT_TOKENS", "JOB_MAX_TOKENS")


def identity(pod: Pod) -> Iterator[str]:
    """Not root, a numeric user and groups, the default seccomp filter."""
    context = pod.spec.get("securityContext", {})
    if context.get("runAsNonRoot") is not True:
        yield "may run as root"
    for field in ("runAsUser", "runAsGroup", "fsGroup"):
        if not (isinstance(context.get(field), int) and context[field] > 0):
            yield f"{field} is {context.get(field)!r}"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "has no seccomp profile"


def privileges(pod: Pod) -> Iterator[str]:
    """No privilege to gain and none to begin with; a file system that cannot be written."""
    wanted = {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for container in pod.containers:
        if container.get("securityContext") != wanted:
            yield f"{container['name']} has {container.get('securityContext')}"


def host(pod: Pod) -> Iterator[str]:
    """Nothing of the node."""
    yield from (f"uses {field}" for field in pod.spec if field.startswith("host"))
    for volume in pod.spec.get("volumes", []):
        if "hostPath" in volume:
            yield f"mounts {volume['hostPath']}"
    for container in pod.containers:
        yield from (
            "opens a port of the host" for p in container.get("ports", ()) if "hostPort" in p
        )


def credentials(pod: Pod) -> Iterator[str]:
    """No token of the API, no secret in a variable or a volume, nothing injected from Services."""
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield "mounts a token of the API"
    if pod.spec.get("enableServiceLinks") is not False:
        yield "gets variables of Services"
    yield from ("mounts a secret" for volume in pod.spec.get("volumes", ()) if "secret" in volume)
    for container in pod.containers:
        yield from ("reads a secret" for s in container.get("envFrom", ()) if "secretRef" in s)
        for entry in container.get("env", []):
            is_named = CREDENTIAL.search(entry["name"]) and entry["name"] not in NOT_CREDENTIALS
            if is_named or "secretKeyRef" in entry.get("valueFrom", {}):
                yield f"holds {entry['name']}"


def resources(pod: Pod) -> Iterator[str]:
    """CPU is requested; memory is requested and limited alike."""
    for container in pod.containers:
        asked, limits = (container["resources"].get(kind, {}) for kind in ("requests", "limits"))
        if "cpu" not in asked:
            yield f"{container['name']} asks for no CPU"
        if not asked.get("memory") or asked["memory"] != limits.get("memory"):
            yield f"{container['name']} has memory {asked.get('memory')} to {limits.get('memory')}"


def images(pod: Pod) -> Iterator[str]:
    """Our image at this version; no moving tag."""
    for container in pod.containers:
        if container["image"] != f"longspan:{VERSION}":
            yield f"{container['name']} runs {container['image']}"


def volumes(pod: Pod) -> Iterator[str]:
    """Volumes and mounts belong together; scratch space is bounded; /tmp can be written."""
    declared = {volume["name"] for volume in pod.spec.get("volumes", [])}
    mounts = {m["mountPath"]: m["name"] for c in pod.containers for m in c.get("volumeMounts", ())}
    if declared != set(mounts.values()):
        yield f"mounts {sorted(mounts.values())} of {sorted(declared)}"
    if "/tmp" not in mounts:
        yield "cannot write to /tmp"
    for volume in pod.spec.get("volumes", []):
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"{volume['name']} may fill the node"


def gpus(pod: Pod) -> Iterator[str]:
    """A pod with GPUs has shared memory in memory, and no multicast."""
    if not pod.num_gpus:
        return
    [container] = pod.containers
    shm = [m["name"] for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"]
    [volume] = [v for v in pod.spec["volumes"] if v["name"] in shm] or [{}]
    if volume.get("emptyDir", {}).get("medium") != "Memory":
        yield "has no shared memory"
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    for name, value in NO_MULTICAST.items():
        if variables.get(name) != value:
            yield f"{name} is {variables.get(name)}"


def mesh(all_resources: list[Resource]) -> Iterator[str]:
    """As many ranks as GPUs, and CPUs for the threads of all of them and for Ray's driver."""
    for pod in (pod for resource in all_resources for pod in find_pods(resource)):
        if not pod.num_gpus:
            continue
        variables = {entry["name"]: entry["value"] for entry in pod.containers[0]["env"]}
        heads, context = map(int, variables["JOB_MESH"].split("x"))
        if heads * context != pod.num_gpus * pod.count:
            yield f"{pod.where}: mesh {heads}x{context} on {pod.count} x {pod.num_gpus} GPUs"
        if variables["JOB_EXECUTOR"] == "launch" and int(variables["JOB_NPROC"]) != pod.num_gpus:
            yield f"{pod.where}: {variables['JOB_NPROC']} processes"
        cpus = int(pod.containers[0]["resources"]["requests"]["cpu"])
        if pod.num_gpus * int(variables["JOB_THREADS"]) + (pod.count > 1) > cpus:
            yield f"{pod.where}: {variables['JOB_THREADS']} threads a rank on {cpus} CPUs"


def references(all_resources: list[Resource]) -> Iterator[str]:
    """What pods name exists."""
    there = {(resource["kind"], resource["metadata"]["name"]) for resource in all_resources}
    for pod in (pod for resource in all_resources for pod in find_pods(resource)):
        wanted = {("ServiceAccount", pod.spec["serviceAccountName"])}
        for volume in pod.spec.get("volumes", []):
            if "configMap" in volume:
                wanted.add(("ConfigMap", volume["configMap"]["name"]))
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                wanted.add(("PersistentVolumeClaim", claim))
        for container in pod.containers:
            for source in container.get("envFrom", []):
                wanted.add(("ConfigMap", source["configMapRef"]["name"]))
        yield from (f"{pod.where}: {kind} {name}" for kind, name in sorted(wanted - there))


def network(all_resources: list[Resource]) -> Iterator[str]:
    """Nobody may connect to a pod but whom a rule names; pods with GPUs reach nothing else."""
    policies = [r["spec"] for r in all_resources if r["kind"] == "NetworkPolicy"]
    for pod in (pod for resource in all_resources for pod in find_pods(resource)):
        closed = {
            direction
            for spec in policies
            if spec["podSelector"]["matchLabels"].items() <= pod.labels.items()
            for direction in spec["policyTypes"]
        }
        wanted = {"Ingress", "Egress"} if pod.num_gpus else {"Ingress"}
        if not wanted <= closed:
            yield f"{pod.where} is open"
    for spec in policies:
        peers = [p for rule in spec.get("ingress", []) for p in rule.get("from") or [{}]]
        peers += [p for rule in spec.get("egress", []) for p in rule.get("to") or [{}]]
        yield from ("a rule names nobody" for peer in peers if not peer.get("podSelector"))


def ray(all_resources: list[Resource]) -> Iterator[str]:
    """Ray of constraints.txt, behind a token, inside the cluster, and gone after the job."""
    for resource in all_resources:
        if resource["kind"] != "RayJob":
            continue
        spec, cluster = resource["spec"], resource["spec"]["rayClusterSpec"]
        head = cluster["headGroupSpec"]
        if cluster.get("rayVersion") != PINS["ray"]:
            yield f"Ray {cluster.get('rayVersion')}"
        if cluster.get("authOptions") != {"mode": "token"}:
            yield "no token"
        if head.get("serviceType") != "ClusterIP" or head.get("enableIngress") is not False:
            yield "the dashboard is exposed"
        if not spec.get("shutdownAfterJobFinishes"):
            yield "the cluster stays"
        # The driver runs where there are CPUs; its GPU it asks for itself.
        cpus = [group["rayStartParams"]["num-cpus"] for group in (head, *_workers(spec))]
        asked = [pod.containers[0]["resources"]["requests"]["cpu"] for pod in find_pods(resource)]
        if spec.get("entrypointNumCpus") != 1 or "entrypointNumGpus" in spec:
            yield "rank 0 takes another GPU than its own"
        if cpus != ["0", *asked[2:]] or head["rayStartParams"]["num-gpus"] != "0":
            yield f"rank 0 may be on the head: CPUs {cpus}"


def _workers(job: dict[str, Any]) -> list[Any]:
    return list(job["rayClusterSpec"]["workerGroupSpecs"])


PodRule = Callable[[Pod], Iterator[str]]
WholeRule = Callable[[list[Resource]], Iterator[str]]
POD_RULES: tuple[PodRule, ...] = (
    identity,
    privileges,
    host,
    credentials,
    resources,
    images,
    volumes,
    gpus,
)
WHOLE_RULES: tuple[WholeRule, ...] = (mesh, references, network, ray)


def find_faults(all_resources: list[Resource]) -> list[str]:
    """Of all rules, each with the rule's name."""
    pods = [pod for resource in all_resources for pod in find_pods(resource)]
    faults = [
        f"{rule.__name__}: {pod.where}: {fault}"
        for rule in POD_RULES
        for pod in pods
        for fault in rule(pod)
    ]
    return faults + [f"{r.__name__}: {fault}" for r in WHOLE_RULES for fault in r(all_resources)]


@pytest.mark.parametrize("folder", FOLDERS, ids=folder_name)
def test_rules_hold(folder: Path) -> None:
    assert find_faults(list(built(folder))) == []


def test_there_are_pods_to_judge() -> None:
    assert [pod.where for pod in _pods(list(built(JOB)))] == ["job"]
    assert [pod.where for pod in _pods(list(built(RAY)))] == ["submitter", "head", "worker gpu"]
    assert sum(pod.num_gpus * pod.count for pod in _pods(list(built(RAY)))) == 8


def _pods(all_resources: list[Resource]) -> list[Pod]:
    return [pod for resource in all_resources for pod in find_pods(resource)]


def _worker(job: dict[str, Any]) -> Any:
    return _workers(job)[0]


def _pod_spec(job: dict[str, Any]) -> Any:
    return _worker(job)["template"]["spec"]


def _limits(job: dict[str, Any]) -> Any:
    return _pod_spec(job)["containers"][0]["resources"]["limits"]


Change = Callable[[dict[str, Any], dict[str, Any]], object]


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        (identity, lambda spec, _: spec["securityContext"].pop("runAsNonRoot")),
        (identity, lambda spec, _: spec["securityContext"].update(runAsUser=0)),
        (identity, lambda spec, _: spec["securityContext"].pop("seccompProfile")),
        (privileges, lambda _, c: c["securityContext"].update(readOnlyRootFilesystem=False)),
        (privileges, lambda _, c: c["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])),
        (host, lambda spec, _: spec.update(hostIPC=True)),
        (host, lambda spec, _: spec["volumes"].append({"name": "h", "hostPath": {"path": "/"}})),
        (host, lambda _, c: c.update(ports=[{"containerPort": 80, "hostPort": 80}])),
        (credentials, lambda spec, _: spec.pop("automountServiceAccountToken")),
        (credentials, lambda spec, _: spec.pop("enableServiceLinks")),
        (credentials, lambda _, c: c["env"].append({"name": "HF_TOKEN", "value": "x"})),
        (credentials, lambda _, c: c["envFrom"].append({"secretRef": {"name": "s"}})),
        (resources, lambda _, c: c["resources"]["limits"].pop("memory")),
        (resources, lambda _, c: c["resources"]["requests"].pop("cpu")),
        (images, lambda _, c: c.update(image="longspan:latest")),
        (images, lambda _, c: c.update(image="longspan")),
        (volumes, lambda spec, _: spec["volumes"].pop()),
        (volumes, lambda spec, _: spec["volumes"][-1].update(emptyDir={})),
        (gpus, lambda _, c: c["volumeMounts"].pop(3)),
        (gpus, lambda spec, _: spec["volumes"][3]["emptyDir"].pop("medium")),
        (gpus, lambda _, c: c["env"].pop()),
    ],
)
def test_a_rule_finds_what_it_is_for(rule: PodRule, change: Change) -> None:
    [pod] = _pods(list(built(JOB)))
    changed = dataclasses.replace(pod, template=copy.deepcopy(pod.template))
    change(changed.spec, changed.spec["containers"][0])
    assert (list(rule(pod)), list(rule(changed)) != []) == ([], True)


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        (network, lambda spec, _: spec["podSelector"]["matchLabels"].update(other="label")),
        (network, lambda spec, _: spec["policyTypes"].remove("Egress")),
        (network, lambda spec, _: spec["ingress"].append({})),
        (network, lambda spec, _: spec["egress"].append({"to": [{"ipBlock": {"cidr": "0/0"}}]})),
        (ray, lambda _, job: job["rayClusterSpec"].update(rayVersion="2.50.0")),
        (ray, lambda _, job: job["rayClusterSpec"]["authOptions"].update(mode="disabled")),
        (ray, lambda _, job: job["rayClusterSpec"]["headGroupSpec"].update(serviceType="NodePort")),
        (ray, lambda _, job: job.update(shutdownAfterJobFinishes=False)),
        (ray, lambda _, job: job.update(entrypointNumGpus=1)),
        (ray, lambda _, job: job.pop("entrypointNumCpus")),
        (ray, lambda _, job: _worker(job)["rayStartParams"].update({"num-cpus": "0"})),
        (mesh, lambda _, job: _worker(job).update(replicas=3)),
        (mesh, lambda _, job: _pod_spec(job)["containers"][0]["env"][4].update(value="4")),
        (mesh, lambda _, job: _limits(job).update({"nvidia.com/gpu": 8})),
        (references, lambda _, job: _pod_spec(job).update(serviceAccountName="default")),
        (references, lambda _, job: _pod_spec(job)["volumes"][1]["configMap"].update(name="x")),
    ],
)
def test_a_rule_of_the_whole_finds_what_it_is_for(rule: WholeRule, change: Change) -> None:
    all_resources = copy.deepcopy(list(built(RAY)))
    policy, job = (find(all_resources, kind, "longspan") for kind in ("NetworkPolicy", "RayJob"))
    change(policy["spec"], job["spec"])
    assert list(rule(all_resources)) != []

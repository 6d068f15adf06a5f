"""A small kustomize: what `kubectl kustomize FOLDER` makes of the folders under deploy/.

Owns the features that deploy/ and its page use: resources, configMapGenerator, strategic-merge and
JSON 6902 patches, images, namespace. Refuses every other one by name, so that a manifest that needs
more fails here and is not built wrongly. `test_kustomize.py` compares it with the real one where
that is installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]

# Fields whose items Kubernetes merges by a key (patchMergeKey); all other lists are replaced.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
}
STRATEGIC_GROUPS = ("v1", "batch/v1", "networking.k8s.io/v1")


class Unsupported(Exception):
    """A feature of kustomize that is not built here."""


def build(folder: Path) -> list[Resource]:
    """All resources of a folder with a kustomization.yaml, patched."""
    spec = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    unknown = set(spec) - {"apiVersion", "kind", *_STEPS}
    if unknown:
        raise Unsupported(f"{folder}: {sorted(unknown)}")
    resources: list[Resource] = []
    for name, step in _STEPS.items():
        if name in spec:
            step(resources, spec[name], folder)
    options = spec.get("generatorOptions", {})
    created = [
        entry["name"]
        for entry in spec.get("configMapGenerator", [])
        if entry.get("behavior", "create") == "create"
    ]
    if created and options.get("disableNameSuffixHash") is not True:
        raise Unsupported(f"{folder}: names with a hash")
    for name in created:
        metadata = find(resources, "ConfigMap", name)["metadata"]
        metadata.setdefault("labels", {}).update(options.get("labels", {}))
    return resources


def find(resources: list[Resource], kind: str, name: str) -> Resource:
    """The only resource of that kind and name."""
    [found] = [
        resource
        for resource in resources
        if resource["kind"] == kind and resource["metadata"]["name"] == name
    ]
    return found


def strategic_merge(old: Any, patch: Any, field: str = "") -> Any:
    """`old`, patched: mappings merge, lists with a key merge by it, None deletes."""
    if isinstance(old, dict) and isinstance(patch, dict):
        if any(key.startswith("$") for key in patch):
            raise Unsupported(f"directive in a patch: {sorted(patch)}")
        merged = {key: value for key, value in old.items() if patch.get(key, value) is not None}
        for key, value in patch.items():
            if value is not None:
                merged[key] = strategic_merge(old.get(key), value, key)
        return merged
    if isinstance(old, list) and field in MERGE_KEYS:
        key = MERGE_KEYS[field]
        changes = {item[key]: item for item in patch}
        kept = [strategic_merge(item, changes.pop(item[key], {})) for item in old]
        return [*kept, *changes.values()]
    return copy.deepcopy(patch)


def json_patch(resource: Resource, operations: list[dict[str, Any]]) -> None:
    """Apply JSON 6902 operations in place."""
    for operation in operations:
        *parents, last = operation["path"].lstrip("/").split("/")
        place: Any = resource
        for part in parents:
            place = place[int(part) if isinstance(place, list) else _unescape(part)]
        key: Any = int(last) if isinstance(place, list) else _unescape(last)
        if operation["op"] not in ("add", "replace", "remove"):
            raise Unsupported(f"operation {operation['op']}")
        if operation["op"] != "add":
            place[key]  # as the standard asks: it must be there
        if operation["op"] == "remove":
            del place[key]
        elif operation["op"] == "add" and isinstance(place, list):
            place.insert(key, operation["value"])
        else:
            place[key] = operation["value"]


def _unescape(part: str) -> str:
    return part.replace("~1", "/").replace("~0", "~")


def _read_resources(resources: list[Resource], entries: list[str], folder: Path) -> None:
    for entry in entries:
        path = (folder / entry).resolve()
        if path.is_dir():
            resources += build(path)
        elif path.is_relative_to(folder.resolve()):
            documents = yaml.safe_load_all(path.read_text(encoding="utf-8"))
            # Anchors give one object several names; a patch of one must not change the others.
            resources += [_unshare(document) for document in documents]
        else:
            raise Unsupported(f"{folder}: file {entry} is outside")


def _unshare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshare(item) for key, item in value.items()}
    return [_unshare(item) for item in value] if isinstance(value, list) else value


def _generate(resources: list[Resource], entries: list[dict[str, Any]], folder: Path) -> None:
    for entry in entries:
        data = dict(_config_data(entry, folder))
        behavior = entry.get("behavior", "create")
        if behavior == "create":
            resources.append(
                {
                    "apiVersion": "v1",
                    "kind": "ConfigMap",
                    "metadata": {"name": entry["name"]},
                    "data": data,
                }
            )
            continue
        if behavior != "merge":
            raise Unsupported(f"{folder}: behavior {behavior}")
        find(resources, "ConfigMap", entry["name"])["data"].update(data)


def _config_data(entry: dict[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
    unknown = set(entry) - {"name", "files", "envs", "literals", "behavior"}
    if unknown:
        raise Unsupported(f"configMapGenerator {sorted(unknown)}")
    for file in entry.get("files", []):
        name, _, path = file.rpartition("=")
        yield name or Path(path).name, (folder / path).read_text(encoding="utf-8")
    lines = [
        line
        for file in entry.get("envs", [])
        for line in (folder / file).read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    for line in (*lines, *entry.get("literals", [])):
        name, _, value = line.partition("=")
        yield name, value


def _patch(resources: list[Resource], entries: list[dict[str, Any]], folder: Path) -> None:
    for entry in entries:
        text = (
            (folder / entry["path"]).read_text(encoding="utf-8")
            if "path" in entry
            else entry["patch"]
        )
        patch = yaml.safe_load(text)
        if isinstance(patch, list):
            target = entry["target"]
            json_patch(find(resources, target["kind"], target["name"]), patch)
            continue
        if patch["apiVersion"] not in STRATEGIC_GROUPS:
            raise Unsupported(f"{folder}: strategic merge of {patch['kind']}")
        resource = find(resources, patch["kind"], patch["metadata"]["name"])
        resource.update(strategic_merge(resource, patch))


def _set_images(resources: list[Resource], entries: list[dict[str, Any]], folder: Path) -> None:
    images = {entry["name"]: entry for entry in entries}
    for resource in resources:
        for container in _find_containers(resource):
            name, _, tag = container["image"].partition(":")
            if name in images:
                new = images[name]
                container["image"] = f"{new.get('newName', name)}:{new.get('newTag', tag)}"


def _find_containers(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("containers", "initContainers"):
                yield from item
            else:
                yield from _find_containers(item)
    elif isinstance(value, list):
        for item in value:
            yield from _find_containers(item)


def _set_namespace(resources: list[Resource], namespace: str, folder: Path) -> None:
    for resource in resources:
        resource["metadata"]["namespace"] = namespace


def _read_options(resources: list[Resource], options: dict[str, Any], folder: Path) -> None:
    unknown = set(options) - {"disableNameSuffixHash", "labels"}
    if unknown:
        raise Unsupported(f"{folder}: generatorOptions {sorted(unknown)}")


# In the order in which kustomize runs them.
_STEPS: dict[str, Callable[[list[Resource], Any, Path], None]] = {
    "resources": _read_resources,
    "generatorOptions": _read_options,
    "configMapGenerator": _generate,
    "patches": _patch,
    "images": _set_images,
    "namespace": _set_namespace,
}

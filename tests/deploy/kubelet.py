"""A small kubelet: starts the command of a pod's container on this machine, as a node would.

Owns the container's file system (every mount of the manifest, under one folder), its environment
(image, ConfigMaps, manifest, and what Kubernetes adds) and the command line. Paths in variables and
arguments that lie on a mount are moved under the folder; nothing else is changed. It isolates
nothing: `changed_elsewhere` tells afterwards what a read-only file system would have refused.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy.containerfile import image_environment
from tests.deploy.kustomization import Resource
from tests.deploy.manifests import Pod, environment

_RUN_S = 250.0
# What every pod gets from Kubernetes (Service `kubernetes` of the default namespace, and the name).
FROM_KUBERNETES = {
    "HOSTNAME": "longspan-x7k2q",
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "KUBERNETES_SERVICE_PORT": "443",
    "KUBERNETES_SERVICE_PORT_HTTPS": "443",
    "KUBERNETES_PORT": "tcp://10.96.0.1:443",
    "KUBERNETES_PORT_443_TCP": "tcp://10.96.0.1:443",
    "KUBERNETES_PORT_443_TCP_PROTO": "tcp",
    "KUBERNETES_PORT_443_TCP_PORT": "443",
    "KUBERNETES_PORT_443_TCP_ADDR": "10.96.0.1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container that can be started. writable: its mounts that are; fixed: the rest of it."""

    root: Path
    command: list[str]
    variables: dict[str, str]
    work_dir: Path
    writable: list[Path]
    fixed: dict[Path, bytes]

    def at(self, path: str) -> Path:
        """Where a path of the container is on this machine."""
        return self.root / path.lstrip("/")

    def start(self, **options: Any) -> subprocess.Popen[str]:
        """Start it."""
        return subprocess.Popen(
            self.command,
            env=self.variables,
            cwd=self.work_dir,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        with self.start() as process:
            try:
                stdout, stderr = process.communicate(timeout=_RUN_S)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(self.command, process.returncode, stdout, stderr)

    def changed_elsewhere(self) -> dict[Path, bytes]:
        """What was written outside the writable mounts since the container was prepared."""
        found = _read_outside(self.root, self.writable)
        return {path: data for path, data in found.items() if self.fixed.get(path) != data}


def prepare(
    pod: Pod,
    resources: tuple[Resource, ...],
    root: Path,
    *,
    changed: dict[str, str],
    command: list[str] | None = None,
    programs: Path | None = None,
) -> Container:
    """The pod's only container. changed: variables that the test sets otherwise; command: instead
    of the container's own; programs: a folder that comes first in PATH.
    """
    [container] = pod.spec["containers"]
    writable = _mount(pod, container, resources, root)
    inside = [mount["mountPath"] for mount in container["volumeMounts"]]
    variables = {
        **image_environment(),
        **FROM_KUBERNETES,
        **environment(container, resources),
        **changed,
    }
    folders = [*filter(None, [programs]), Path(sys.executable).parent, "/usr/bin", "/bin"]
    return Container(
        root=root,
        command=[_move(word, inside, root) for word in command or container["command"]],
        variables={name: _move(value, inside, root) for name, value in variables.items()}
        | {"PATH": ":".join(map(str, folders))},
        work_dir=root / container.get("workingDir", "/").lstrip("/"),
        writable=writable,
        fixed=_read_outside(root, writable),
    )


def _mount(
    pod: Pod, container: dict[str, Any], resources: tuple[Resource, ...], root: Path
) -> list[Path]:
    """Make the mounts; returns the writable ones."""
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    data = {r["metadata"]["name"]: r["data"] for r in resources if r["kind"] == "ConfigMap"}
    writable = []
    for mount in container["volumeMounts"]:
        path = root / mount["mountPath"].lstrip("/")
        path.mkdir(parents=True)
        if not mount.get("readOnly", False):
            writable.append(path)
        config = volumes[mount["name"]].get("configMap")
        for name, text in data[config["name"]].items() if config else ():
            (path / name).write_text(text, encoding="utf-8")
            # As mounted: a script cannot be started but by its interpreter.
            (path / name).chmod(0o444)
    return writable


def _read_outside(root: Path, writable: list[Path]) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() if path.is_file() else b""
        for path in root.rglob("*")
        if not any(path.is_relative_to(folder) for folder in writable)
    }


def _move(value: str, inside: list[str], root: Path) -> str:
    is_inside = any(value == path or value.startswith(f"{path}/") for path in inside)
    return f"{root}{value}" if is_inside else value

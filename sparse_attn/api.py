"""The backend that a caller named, checked once; nothing is ever substituted for it.

`find_backend` returns a `Backend`: the operations on parts as plain functions. A backend that does
not exist here is an error that lists those that do.
"""

from __future__ import annotations

from types import ModuleType
from typing import Protocol, cast

from torch import Tensor

from sparse_attn import reference, torch_backend
from sparse_attn.errors import BackendUnknown
from sparse_attn.state import Part

_MODULES: dict[str, ModuleType] = {"reference": reference, "torch": torch_backend}
BACKENDS = tuple(_MODULES)


class Backend(Protocol):
    """Operations that return parts; shapes are those of `reference.py`, where each is defined."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None
    ) -> Part: ...

    def attend_causal(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Part: ...

    def attend_shared(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float
    ) -> tuple[Part, Tensor]: ...

    def key_mass(self, q: Tensor, k: Tensor, lse: Tensor, *, scale: float) -> Tensor: ...

    def attend_slots(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        *,
        visible: Tensor | None,
        scale: float,
    ) -> tuple[Part, Tensor]: ...

    def attend_estimated(self, log_mass: Tensor, value_sums: Tensor, sizes: Tensor) -> Part: ...


def find_backend(name: str) -> Backend:
    """The backend of that name; raises BackendUnknown otherwise."""
    if name not in _MODULES:
        raise BackendUnknown(
            f"backend {name!r} does not exist here; choose one of {', '.join(BACKENDS)}"
        )
    return cast(Backend, _MODULES[name])

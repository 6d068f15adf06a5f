"""Longspan's root package: decides and runs; the only package that knows the other three.

`from orchestrator import Engine` is the embedded API, `Client` the same verbs over HTTP, without
torch. Both are found on first use, so that importing the package stays free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.client import Client
    from orchestrator.engine import Engine

__all__ = ["Engine", "Client"]


def __getattr__(name: str) -> object:
    if name == "Engine":
        from orchestrator.engine import Engine

        return Engine
    if name == "Client":
        from orchestrator.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

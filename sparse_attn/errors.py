"""Faults that a caller of sparse_attn can cause.

AttentionError
|- ShapeMismatch      tensors whose shapes do not fit each other
|- InvalidBudget      a budget or mass outside its range
|- BackendUnknown     a backend that does not exist here
"""

from __future__ import annotations


class AttentionError(Exception):
    """Base of every fault raised by sparse_attn; the message is one line."""

    exit_code = 1


class ShapeMismatch(AttentionError):
    """Tensors whose shapes do not fit each other."""


class InvalidBudget(AttentionError):
    """A budget or mass outside its range."""

    exit_code = 2


class BackendUnknown(AttentionError):
    """A backend that does not exist here; nothing is substituted for it."""

    exit_code = 2

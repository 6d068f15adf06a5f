"""Attention as parts that merge: dense, over a selection, estimated; and the selectors.

Knows tensors only: no ranks, no files, no documents. Start at `state.py`, then `reference.py`.
"""

"""Models: configuration, weights, tokenizer and the one decoder definition that all of them share.

Owns what a model file says and the mathematics it asks for. Refuses to know documents, selection,
ranks and where KV is kept: attention is a callable that the caller brings (`decoder.py`).

Reading order: `config.py`, `rope.py`, `layers.py`, `decoder.py`, `weights.py`, `load.py`.
"""

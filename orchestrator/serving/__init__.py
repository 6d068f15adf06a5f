"""Longspan over HTTP: an OpenAI-compatible service around one engine.

Knows the engine through `protocols.ServedEngine` alone; `app.py` puts the parts together and
`server.py` listens. Nothing here unpickles, fetches a URL, or writes a file.
"""

"""Longspan's root package: decides and runs; the only package that knows the other three."""

"""Evaluation: made-up documents with known answers, and whether the reported recall is true.

Owns the generators, the runs and the statistics; refuses to know how an engine answers.
"""

"""Measures this machine for the planner, without any model.

Owns the order of the measurements and the topology that they become. `arithmetic.py` times plain
operations through the backend, `questions.py` what a question costs beside them, `links.py` starts
ranks beside each other, `storage.py` writes and reads a file. Refuses to predict anything.
"""

from orchestrator.calibration.machine import Effort, calibrate

__all__ = ["Effort", "calibrate"]

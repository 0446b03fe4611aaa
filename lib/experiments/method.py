"""Version of the method, a part of the key of every run.

A change of the results of trainings adds a line to `METHODS`; other changes keep the version and all stored
runs. `tests/experiments/test_method.py` fails if the results of tiny trainings change without the version.
"""

from __future__ import annotations

METHODS = {1: "The method that trained the evidence in results/reference."}
"""Change of the results of trainings by version."""

METHOD_VERSION = max(METHODS)

"""The version of the method, a part of every run's key.

Whoever changes what a training results in adds a line to `METHODS`; a change that keeps the results keeps the
version, and with it all stored runs. `tests/experiments/test_method.py` trains a few tiny configurations and
fails where results change and the version does not.
"""

from __future__ import annotations

METHODS = {1: "The method that trained the evidence in results/reference."}
"""What changed in the results of trainings with each version."""

METHOD_VERSION = max(METHODS)

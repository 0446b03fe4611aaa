"""What the benchmarks of `make bench` share: a table and where it comes from, in `results/bench/`."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import torch

from lib.experiments.runs import code_version, environment
from lib.experiments.store import RESULTS, write_atomic


def save(
    name: str, table: pd.DataFrame, device: torch.device | str = "cpu", digits: int = 3, **provenance: Any
) -> None:
    """Print a table, and write it as CSV with its provenance beside it.

    Args:
        name: of the files.
        table: what was measured.
        device: where it was measured.
        digits: significant digits of its numbers.
        provenance: what to say beyond the code and the machine.
    """
    print(table.to_string(float_format=f"{{:.{digits}g}}".format))
    folder = RESULTS / "bench"
    write_atomic(folder / f"{name}.csv", table.to_csv(float_format=f"%.{digits}g").encode())
    provenance |= {"code": code_version(), "environment": environment(device)}
    write_atomic(folder / f"{name}_provenance.json", json.dumps(provenance, indent=1).encode())

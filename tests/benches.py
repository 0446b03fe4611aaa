"""What the benchmarks of `make bench` share: a table and where it comes from, in `results/bench/`."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

from lib.experiments.provenance import write_with_provenance
from lib.experiments.store import RESULTS


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
    files = {f"{name}.csv": table.to_csv(float_format=f"%.{digits}g").encode()}
    write_with_provenance(RESULTS / "bench", files, provenance, f"{name}_provenance.json", device)

"""`make gpu` on a CPU: tables, and runs for another machine."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

import bench_gpu as gpu
import pandas as pd
import pytest
import torch

from lib.experiments.profiles import grid
from lib.experiments.records import is_stored


def test_gpu_measures_and_trains_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is the CPU, which agrees with itself."""
    device = torch.device("cpu")
    monkeypatch.setattr(gpu, "CASES", [("denoising", "deq"), ("inpainting", "bilevel")])
    gpu.measure(device, tmp_path, (1, 2), size=7, batch_size=4)
    timed, agreed = (pd.read_csv(tmp_path / f"{name}_gpu.csv") for name in ("stacks", "agreement"))
    assert len(timed) == 2 * len(agreed) == 4
    assert (timed["ms"] > 0).all()
    assert (agreed.filter(like="loss") == 0).all(axis=None)
    assert gpu.sweep("smoke", 0.0, device, tmp_path).startswith("0 of 18 runs of smoke are trained: ")
    assert gpu.sweep("smoke", 60.0, device, tmp_path).startswith("18 of 18 runs of smoke are trained: ")
    ZipFile(tmp_path / "smoke.zip").extractall(tmp_path / "here" / "runs")
    assert all(is_stored(config, tmp_path / "here") for config in grid("smoke"))

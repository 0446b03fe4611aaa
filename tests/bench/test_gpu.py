"""`make gpu` on a CPU: tables, and runs that another machine takes."""

from __future__ import annotations

from pathlib import Path

import bench_gpu as gpu
import pandas as pd
import pytest
import torch

from lib.experiments.records import take_runs


def test_a_device_is_measured_and_trains_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the device is the CPU, which agrees with itself."""
    device = torch.device("cpu")
    monkeypatch.setattr(gpu, "CASES", [("denoising", "deq"), ("inpainting", "bilevel")])
    gpu.measure(device, tmp_path, (1, 2), size=7, batch_size=4)
    timed, agreed = (pd.read_csv(tmp_path / f"{name}_gpu.csv") for name in ("stacks", "agreement"))
    assert len(timed) == 2 * len(agreed) == 4
    assert (timed["ms"] > 0).all()
    assert (agreed.filter(like="loss") == 0).all(axis=None)
    assert gpu.sweep("smoke", 0.0, device, tmp_path).startswith("0 of 18 runs of smoke are trained: ")
    assert gpu.sweep("smoke", 60.0, device, tmp_path).startswith("18 of 18 runs of smoke are trained: ")
    assert take_runs(tmp_path / "smoke.zip", tmp_path / "here").startswith("18 runs of ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "bogus"], "unrecognized arguments: --device bogus"),
        (["--sweep", "-1"], "`sweep` must be a number of at least 0, got -1.0."),
        (["--profile", "tiny"], "`profile` must be one of smoke, quick, overnight, paper, got 'tiny'."),
        (["--out", "/proc/gpu"], "[Errno 2] No such file or directory: '/proc/gpu'"),
    ],
)
def test_options_are_refused_before_any_work(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "default_device", lambda: torch.device("cuda"))
    assert gpu.main(arguments) in (1, 2)
    assert capsys.readouterr().err == f"{said}\n"

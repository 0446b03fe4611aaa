"""The explorer: its table has the stored runs, and its page shows a selection of them."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch

from lib.experiments import records, runs
from lib.experiments import sweep as sweeps
from lib.experiments.config import ConfigError
from lib.experiments.data import DataError
from lib.experiments.profiles import grid
from lib.experiments.records import run_key
from lib.experiments.runs import get_run
from lib.experiments.store import REPOSITORY, DamagedFile
from lib.experiments.sweep import get_sweep, load_sweep, load_table, table_folder
from lib.figures import reconstructions
from lib.pages import notebooks

COLLECT = runpy.run_path(str(REPOSITORY / ".ci" / "collect.py"))
collect, main = COLLECT["collect"], COLLECT["main"]

TINY: dict[str, Any] = {"task": ["inpainting", "denoising"], "solver": "plain", "time_budget": [3600.0, 1e-6]}
TINY |= {"initial": "independent", "train_images": 20, "test_images": 10, "batch_size": 10}
"""Some of these runs diverge, and some run out of time."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with a tiny sweep and its table."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "workers", lambda device: 1)
        get_sweep("smoke", folder, **TINY)
        collect("smoke", folder, **TINY)
    return folder


@pytest.fixture
def store(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these results in place of the repository's."""
    folder: Path = shutil.copytree(trained, tmp_path / "store")
    for module in (records, sweeps):
        monkeypatch.setattr(module, "RESULTS", folder)
    return folder


def assert_shown(strip: bytes, images: torch.Tensor) -> None:
    """Assert that the bytes are the first four images of `(N, H, W)`, to one of 32 grey levels."""
    height, width = images.shape[1:]
    pixels = torch.frombuffer(bytearray(strip), dtype=torch.uint8).reshape(height, 4, width).movedim(1, 0)
    assert (pixels / 255 * 2 - 1 - images[:4].clamp(-1, 1)).abs().max() <= 1.001 / 31 + 1 / 255


def test_table_has_stored_runs(trained: Path) -> None:
    """Both tables, and truth, data and fixed points of the first test digits."""
    table, configs = load_table("smoke", trained), grid("smoke", **TINY)
    sweep = load_sweep("smoke", configs, trained)
    pd.testing.assert_frame_equal(table.runs[list(sweep.runs)], sweep.runs, check_dtype=False)
    pd.testing.assert_frame_equal(table.epochs, sweep.epochs)
    assert set(table.runs["status"]) == {"completed", "diverged", "out of time"}
    assert ((table.runs["status"] == "completed") == table.runs["output"].notna()).all()
    rows = table.runs.set_index("key")
    for config in configs:
        (truth, f), row = reconstructions.test_data(config), rows.loc[run_key(config)]
        assert_shown(row["truth"], truth[:, 0])
        assert_shown(row["input"], f[:, 0])
        if row["status"] == "completed":
            assert_shown(
                row["output"], reconstructions.reconstruct({"": get_run(config, trained)}).outputs[""]
            )


@pytest.mark.parametrize("name", ["provenance.json", *sweeps.TABLES])
def test_damaged_and_missing_files_are_reported(name: str, store: Path) -> None:
    path = table_folder("smoke", store) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 128
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=f"^{path}: "):
        load_table("smoke", store)
    path.unlink()
    with pytest.raises(DataError, match=f"^{path} is missing; .*collect.py --profile smoke"):
        load_table("smoke", store)


def test_command_writes_table(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [text for name, value in TINY.items() for text in ("-p", name, str(value))]
    assert main(["--profile", "smoke", *arguments]) == 0
    assert capsys.readouterr().out == f"{store / 'smoke' / 'sweep'}\n"
    assert main(["-p", "tau", "-1.0"]) == 2
    assert main([]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "`tau` must be a number above 0, got -1.0."
    assert err[1] == "no quick run is stored or committed; run `make sweep PROFILE=quick`"


def test_page_shows_selection(trained: Path) -> None:
    """The page has controls that start at the selection, a picture, and the levels."""
    chosen = {"task": "inpainting", "tau": 0.5, "noise": None, "sigma": None, "gamma": None}
    folder = notebooks.run("explore", "smoke", chosen, trained)
    book = nbformat.read(folder / "explore.ipynb", as_version=4)
    outputs = [out.get("data", {}) for cell in book.cells for out in cell.get("outputs", [])]
    assert sum("image/png" in data for data in outputs) == 1
    assert sum("application/vnd.jupyter.widget-view+json" in data for data in outputs) == 1
    assert any("'time_budget': [1e-06, 3600.0]" in data.get("text/plain", "") for data in outputs)
    state = book.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    controls = [widget["state"] for widget in state if "index" in widget["state"]]
    shown = {control["description"]: control["_options_labels"][control["index"]] for control in controls}
    expected = {"task": "inpainting", "noise": "0.1", "sigma": "identity", "gamma": "1.0"}
    assert shown == expected | {"tau": "0.5", "time_budget": "1e-06"}
    with pytest.raises(
        ConfigError, match=r"^`task` must be one of denoising, inpainting, got 'sharpening'\.$"
    ):
        notebooks.run("explore", "smoke", {"task": "sharpening"}, trained)

"""Files of a figure and their provenance."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from PIL import Image

from lib.experiments.config import RunConfig
from lib.experiments.method import METHOD_VERSION
from lib.experiments.profiles import grid
from lib.experiments.sweep import load_sweep
from lib.figures.comparison import YES, Question
from lib.figures.style import note, save, sweep_budget

pytestmark = pytest.mark.usefixtures("drawing")

CONFIGS = grid("smoke", task="denoising", epochs=[2, 5])
SWEEP = load_sweep("smoke", CONFIGS, "no results")


def test_budget_line_states_configurations_images_and_epochs() -> None:
    line = sweep_budget("smoke", SWEEP.provenance)
    side, images = CONFIGS[0].size, CONFIGS[0].train_images
    assert line.startswith(f"MNIST {side}x{side}; profile smoke: {len(CONFIGS)} configurations, {images:,} ")
    assert "2 or 5 epochs" in line
    assert line.endswith(f"{len(CONFIGS)} configurations not run")


def test_saved_files_have_digests_and_are_reproducible(tmp_path: Path) -> None:
    fig, axes = plt.subplots()
    axes.plot([1, 3, 2])
    note(fig, "a note")
    table = pd.DataFrame({"psnr": [20.5]}, index=pd.Index(["deq"], name="image"))
    questions = [Question("is it so?", YES, "3 pairs", "count them")]
    parts: dict[str, Any] = {"questions": questions, "tables": {"other": table}, "settings": {"noise": 0.1}}
    folders = [
        save("fig", fig, table, SWEEP, "smoke", tmp_path / name, **parts) for name in ("first", "again")
    ]
    assert folders[0] == tmp_path / "first" / "smoke" / "fig"
    files = {"fig.png", "fig.pdf", "fig.csv", "other.csv", "questions.json"}
    assert {path.name for path in folders[0].iterdir()} == files | {"provenance.json"}
    provenance = json.loads((folders[0] / "provenance.json").read_text())
    assert provenance["sha256"] == {
        name: hashlib.sha256((folders[0] / name).read_bytes()).hexdigest() for name in files
    }
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in files)
    with Image.open(folders[0] / "fig.png") as image:
        assert (image.mode, round(image.info["dpi"][0])) == ("P", 300)
    assert (provenance["figure"], provenance["profile"]) == ("fig", "smoke")
    assert provenance["method"] == METHOD_VERSION
    assert (provenance["statuses"], provenance["settings"]) == ({"not run": len(CONFIGS)}, {"noise": 0.1})
    assert (folders[0] / "fig.csv").read_text() == "image,psnr\ndeq,20.5\n"
    assert json.loads((folders[0] / "questions.json").read_text())[0]["answer"] == "yes"
    assert RunConfig.model_fields.keys() >= set(provenance["axes"])

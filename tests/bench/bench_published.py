"""Test losses of ours and of the paper's published code on a current PyTorch (`make bench`)."""

from __future__ import annotations

import pandas as pd
from benches import save

from lib.experiments.config import RunConfig
from lib.experiments.runs import get_runs

PUBLISHED = {
    "bilevel": (0.2200, 0.2008, 0.1889, 0.1839, 0.1830),
    "deq": (0.2458, 0.2406, 0.2372, 0.2359, 0.2354),
}
"""Test losses of the published code after each epoch, in one run of each model."""

SETTING = {"task": "denoising", "noise": 0.5, "tau": 0.5, "gamma": 0.1, "sigma": "relu"}
SETTING |= {"train_images": 10_000, "test_images": 1_000, "epochs": 5}
SEEDS = (0, 1, 2)


def main() -> None:
    rows = []
    for model, published in PUBLISHED.items():
        runs = get_runs([RunConfig(**SETTING, model=model, seed=seed) for seed in SEEDS])
        losses = pd.DataFrame([run.history["test_loss"].iloc[1:].to_numpy() for run in runs])
        for epoch, theirs in enumerate(published, 1):
            low, ours, high = losses[epoch - 1].quantile([0, 0.5, 1])
            row = {"model": model, "epoch": epoch, "published": theirs, "ours": ours, "low": low}
            rows.append(row | {"high": high, "difference": ours - theirs})
    table = pd.DataFrame(rows).set_index(["model", "epoch"])
    save("published", table, digits=4, setting=SETTING, seeds=SEEDS)


if __name__ == "__main__":
    main()

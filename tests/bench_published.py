"""Our test losses beside those of the paper's published code, made to run on today's PyTorch (`make bench`).

Denoising of MNIST with noise 0.5, step 0.5, weight 0.1 and ReLU: five epochs of 10,000 images in batches
of 100, and after each the loss on 1,000 test images.
"""

from __future__ import annotations

import pandas as pd
from benches import save

from lib.experiments.config import RunConfig
from lib.experiments.runs import get_runs

PUBLISHED = {
    "bilevel": (0.2200, 0.2008, 0.1889, 0.1839, 0.1830),
    "deq": (0.2458, 0.2406, 0.2372, 0.2359, 0.2354),
}
"""What the published code came to, in one run of each model."""

SEEDS = (0, 1, 2)


def main() -> int:
    setting = {"task": "denoising", "noise": 0.5, "tau": 0.5, "gamma": 0.1, "sigma": "relu"}
    setting |= {"train_images": 10_000, "test_images": 1_000, "epochs": 5}
    rows = []
    for model, published in PUBLISHED.items():
        runs = get_runs([RunConfig(**setting, model=model, seed=seed) for seed in SEEDS])
        losses = pd.DataFrame([run.history["test_loss"].iloc[1:].to_numpy() for run in runs])
        for epoch, (theirs, ours) in enumerate(zip(published, losses.T.to_numpy(), strict=True), 1):
            own = pd.Series(ours).quantile([0, 0.5, 1]).tolist()
            row = {"model": model, "epoch": epoch, "published": theirs, "ours": own[1], "low": own[0]}
            rows.append(row | {"high": own[2], "difference": own[1] - theirs})
    save(
        "published", pd.DataFrame(rows).set_index(["model", "epoch"]), digits=4, setting=setting, seeds=SEEDS
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Figures: reconstructions beside each other, their numbers, and their files with provenance."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from skimage.metrics import structural_similarity
from torch import Tensor

from lib import data
from lib.runs import DATA_DIGESTS, Run, code_version, default_device, environment
from lib.solvers import Status
from lib.store import RESULTS, write_atomic
from lib.training import COMPLETED, make_operator, observe, one_thread, psnr, solve, test_noise

MODEL_NAMES = {"bilevel": "bilevel", "deq": "DEQ"}
DATA_NAMES = {"mnist": "MNIST"}

STYLE: Any = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}
"""Fonts that fit a column, and text that stays text in the PDF."""

TEXT_WIDTH = 6.9
"""Width in inches of a page of two columns."""


@dataclass(frozen=True)
class Reconstructions:
    """Test images, their data and what each model makes of them; images are `(N, H, W)` in [-1, 1].

    Attributes:
        runs: the run of each model.
        truth: `u`.
        observed: `f = K u + noise`.
        outputs: the fixed point `u*` of each model.
        forwarded: `K u*` of each model.
        table: a row for the input and for each model, means over the test images: `psnr` (dB), `ssim`,
            `mse`, and of the solves `steps`, `residual` and the share `unconverged`.
    """

    runs: Mapping[str, Run]
    truth: Tensor
    observed: Tensor
    outputs: dict[str, Tensor]
    forwarded: dict[str, Tensor]
    table: pd.DataFrame


@torch.no_grad()
@one_thread()
def reconstruct(runs: Mapping[str, Run]) -> Reconstructions:
    """Reconstruct the whole test set with each model from the same data, and measure.

    Args:
        runs: the run of each model; all of one task, noise level and test set.
    """
    config = next(iter(runs.values())).config
    device = default_device()
    operator = make_operator(config)
    truth = data.mnist("test", config.test_images, config.size)
    observed = observe(operator, truth, torch.tensor(config.noise), test_noise(config))
    rows = {"input": _quality(observed, truth)}
    outputs, forwarded = {}, {}
    for name, run in runs.items():
        # In the batches of the training's evaluation, so that the numbers are its numbers to the bit.
        batches = [f[None].to(device) for f in observed.split(run.config.batch_size)]
        model = run.model(stacked=True).to(device)
        solutions = [solve(model, f, run.config) for f in batches]
        u = torch.cat([solution.value[0] for solution in solutions]).cpu()
        outputs[name], forwarded[name] = u.squeeze(1), operator.forward(u).squeeze(1)
        rows[name] = _quality(u, truth) | {
            field: torch.cat([getattr(s, field)[0] for s in solutions]).double().mean().item()
            for field in ("steps", "residual")
        }
        status = torch.cat([solution.status[0] for solution in solutions])
        rows[name]["unconverged"] = (status != Status.CONVERGED).double().mean().item()
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("image")
    return Reconstructions(runs, truth.squeeze(1), observed.squeeze(1), outputs, forwarded, table)


def _quality(images: Tensor, truth: Tensor) -> dict[str, float]:
    """Means over the images of PSNR, SSIM and mean squared error; `(N, 1, H, W)` both."""
    mse = (images - truth).square().mean((-3, -2, -1))
    pairs = zip(images.squeeze(1).numpy(), truth.squeeze(1).numpy(), strict=True)
    ssim = [structural_similarity(image, reference, data_range=2) for image, reference in pairs]
    return {
        "psnr": psnr(mse).mean().item(),
        "ssim": float(np.mean(ssim)),
        "mse": mse.mean().item(),
    }


def training_table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """How the training of each run ended: its status and the last row of its history."""
    rows = {
        name: {"status": run.status, "reason": run.reason}
        | (run.history.iloc[-1].to_dict() if len(run.history) else {})
        for name, run in runs.items()
    }
    return pd.DataFrame(rows)


def check_reconstructions(result: Reconstructions) -> None:
    """Recompute what must hold whatever the parameters are, and print it.

    Raises:
        AssertionError: the figure does not show what its caption says.
    """
    config = next(iter(result.runs.values())).config
    operator = make_operator(config)
    noise = (result.observed[:, None] - operator.forward(result.truth[:, None])).std().item()
    assert abs(noise - config.noise) <= 0.01 * config.noise, f"noise in the input: {noise}"
    print(f"the input is K u + noise, standard deviation {noise:.2f}")
    for name, run in result.runs.items():
        assert (run.weights.get("C") is None) == (run.config.model == "bilevel"), f"{name}: weights"
        print(f"{name}: C is {'a parameter of its own' if 'C' in run.weights else 'tied to A'}")
        if run.status == COMPLETED:
            stored, mse = run.history.test_loss.iloc[-1], result.table.mse[name]
            assert abs(mse - stored) <= 1e-6 * stored, f"{name}: loss {mse}, in training {stored}"
            print(f"{name}: the picture has the test loss that the training ended with")


def print_findings(result: Reconstructions, margin: float = 0.5) -> None:
    """Print what the figure shows about each model: findings, not requirements.

    Args:
        result: what was measured.
        margin: dB of PSNR from which a reconstruction counts as clearly better than its input.
    """
    before = result.table.loc["input"]
    for name, run in result.runs.items():
        row = result.table.loc[name]
        clearly = "clearly better" if row.psnr - before.psnr >= margin else "not clearly better"
        print(f"{name}: training {run.status}")
        print(f"{name}: {clearly} than the input in PSNR (by at least {margin} dB)")
        solved = "all" if row.unconverged == 0 else "none" if row.unconverged == 1 else "some"
        print(f"{name}: {solved} of the test images reach the tolerance {run.config.tol:g}")


def budget(run: Run, profile: str) -> str:
    """One line that says which data, parameters, profile and budget a run was made with."""
    c = run.config
    return (
        f"{DATA_NAMES[c.dataset]} {c.size}x{c.size}, {c.task}, noise {c.noise:g}, "
        rf"$\tau$ = {c.tau:g}, $\gamma$ = {c.gamma:g}, {c.sigma}; profile {profile}: "
        f"{c.train_images:,} training images, {c.epochs} epochs; {c.test_images:,} test images"
    )


def reconstruction_figure(
    result: Reconstructions, rows: Sequence[str], profile: str, count: int = 8
) -> Figure:
    """Test images in rows, one block of columns per model.

    Args:
        result: what to show.
        rows: from `truth`, `input`, `K output` and `output`.
        profile: name of the profile, for the line below.
        count: how many of the first test images.
    """
    with plt.rc_context(STYLE):
        models = list(result.runs)
        fig, axes = plt.subplots(
            len(rows),
            len(models),
            figsize=(TEXT_WIDTH, 0.42 * len(rows) + 0.7),
            squeeze=False,
            gridspec_kw={"wspace": 0.03, "hspace": 0.06, "left": 0.09, "right": 0.995},
        )
        fig.subplots_adjust(top=1 - 0.36 / fig.get_figheight(), bottom=0.3 / fig.get_figheight())
        before = result.table.loc["input"]
        for column, model in zip(axes.T, models, strict=True):
            images = {
                "truth": result.truth,
                "input": result.observed,
                "K output": result.forwarded[model],
                "output": result.outputs[model],
            }
            for axis, row in zip(column, rows, strict=True):
                strip = torch.cat(list(images[row][:count]), dim=-1)
                axis.imshow(strip, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
            after = result.table.loc[model]
            column[0].set_title(
                f"{MODEL_NAMES[model]}: {after.psnr:.1f} dB, SSIM {after.ssim:.2f} "
                f"(input {before.psnr:.1f} dB, {before.ssim:.2f})"
            )
        for axis, row in zip(axes[:, 0], rows, strict=True):
            axis.set_ylabel(row.replace("K", "$K$"), rotation=0, ha="right", va="center")
        note = budget(next(iter(result.runs.values())), profile)
        fig.text(0.5, 0.08 / fig.get_figheight(), note, ha="center", va="bottom", size=7)
    return fig


def save(
    name: str,
    fig: Figure,
    table: pd.DataFrame,
    runs: Sequence[Run],
    profile: str,
    results: Path | str | None = None,
) -> Path:
    """Write `results/<profile>/<name>/` with the figure, its numbers and where they come from.

    Args:
        name: of the figure, such as `fig02`.
        fig: written as PNG (300 dpi) and PDF.
        table: the numbers behind the figure, written as CSV.
        runs: the runs that it was made from.
        profile: name of the profile.
        results: folder of the results; the repository's when None.

    Returns:
        The figure's folder.
    """
    folder = Path(results or RESULTS) / profile / name
    files = {f"{name}.csv": table.to_csv().encode()}
    # Without dates and versions in them the files are the same whenever they are made.
    silent = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}
    for suffix, metadata in silent.items():
        buffer = io.BytesIO()
        with plt.rc_context(STYLE):
            fig.savefig(buffer, format=suffix, metadata=metadata)
        files[f"{name}.{suffix}"] = buffer.getvalue()
    provenance = {
        "figure": name,
        "profile": profile,
        "runs": {run.key: run.config.model_dump() | {"status": run.status} for run in runs},
        "data": {run.config.dataset: DATA_DIGESTS[run.config.dataset] for run in runs},
        "code": code_version(),
        "environment": environment(default_device()),
        "training_seconds": sum(run.provenance["seconds"] for run in runs),
        "trained_on": {run.key: run.provenance["environment"] for run in runs},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sha256": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
    }
    files["provenance.json"] = json.dumps(provenance, indent=1).encode()
    for file, content in files.items():
        write_atomic(folder / file, content)
    return folder

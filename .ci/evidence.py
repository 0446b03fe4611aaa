"""Write the generated parts of results/reference/README.md and README.md: `python .ci/evidence.py`.

A part stands between `<!-- NAME -->` and `<!-- /NAME -->`. It is made from committed tables and notebooks.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import scipy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.experiments.config import TASKS
from lib.experiments.method import METHODS
from lib.experiments.profiles import FILTERS, PROFILES, faces_config, grid, profile_config, profile_seeds
from lib.experiments.provenance import PROVENANCE
from lib.experiments.records import COMMITTED, REFERENCE
from lib.experiments.store import REPOSITORY, RESULTS, write_atomic
from lib.experiments.sweep import load_table
from lib.figures.comparison import CONFIDENCE, kept_runs
from lib.pages.notebooks import PAGES, notebook_path
from lib.training import DIVERGED

PAGES_WITH_PARTS = (REFERENCE / "README.md", REPOSITORY / "README.md")

OVERNIGHT = RESULTS / COMMITTED["overnight"]

DIGITS = {"denoising": "fig02", "inpainting": "fig03", "deblurring": "fig04"}
PHOTOGRAPHS = {"denoising": "fig08", "deblurring": "fig13"}
"""The figure of each task."""

HOLDS, IN_PART, FAILS, NOT_TESTED = "reproduced", "in part", "not at this budget", "not tested"

Row = Sequence[object]


def table(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """Return a table in Markdown with typographic minus signs and no sign for zero."""
    lines = [columns, ["---"] * len(columns), *rows]
    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return re.sub(r"(?<![\w.-])-(?=\d)", "−", re.sub(r"[+-](?=0(\.0+)?\b(?!\.))", "", text))


def origin(folder: Path) -> dict[str, Any]:
    """Return the provenance of a folder of evidence."""
    content: dict[str, Any] = json.loads((folder / PROVENANCE).read_bytes())
    return content


def budget(folder: Path) -> str:
    """Return the training images, their size and the epochs of a folder of evidence."""
    record = origin(folder)
    if "axes" in record:
        first, count = record["shared"], f"{sum(record['statuses'].values()):,} configurations, "
    else:
        trainings = record.get("settings", {}).get("trainings", {})
        first, count = next(iter([*record["runs"].values(), *trainings.values()])), ""
    size = f" of {first['size']}x{first['size']}" if "size" in first else ""
    epochs = first["epochs"]
    return f"{count}{first['train_images']:,} images{size}, {epochs} epoch{'s' * (epochs > 1)}"


def source(folder: Path) -> str:
    """Return the figure or notebook of a folder of evidence, and its budget."""
    name = f"figure {int(folder.name[3:])}" if folder.name.startswith("fig") else folder.name
    return f"{name}: {budget(folder)}"


def signed(value: float) -> str:
    return f"{value:+.2f}"


def interval(mean: float, low: float, high: float) -> str:
    """Return a mean with an interval, in which unbreakable spaces prevent line breaks."""
    return f"{signed(mean)} ({signed(low)}\u00a0to\u00a0{signed(high)})"


def difference(values: Sequence[float]) -> str:
    """Return the mean of differences with its 95 % interval by Student's t."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{signed(mean)} (no interval)"
    return interval(mean, *scipy.stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE))


def of_seeds(seeds: pd.DataFrame, arm: str = "deq") -> tuple[str, str]:
    """Return the difference between an arm and bilevel learning in a `seeds.csv`, and its seeds."""
    columns = [name for name in ("bilevel", arm, "reason") if name in seeds]
    psnr = seeds[["bilevel", arm]].apply(pd.to_numeric, errors="coerce")
    lost = psnr.isna().any(axis="columns")
    ends: Counter[str] = Counter()
    for _, row in seeds.loc[lost, columns].iterrows():
        text = " ".join(map(str, row))
        status = re.findall(r"diverged|not run|out of time", text)[0]
        ends[" in ".join([status, *re.findall(r"epoch \d+", text)])] += 1
    lines = [f"{end}" if number == 1 else f"{number} {end}" for end, number in ends.items()]
    count = f"{(~lost).sum()} of {len(seeds)}; {', '.join(lines)}" if lines else str(len(seeds))
    return difference((psnr[arm] - psnr["bilevel"])[~lost].tolist()), count


def result_rows() -> list[Row]:
    """Return the lead of the DEQ over bilevel learning in each setting."""
    rows: list[Row] = []
    seeds = {task: pd.read_csv(OVERNIGHT / name / "seeds.csv") for task, name in DIGITS.items()}
    for task, own in seeds.items():
        trained = source(OVERNIGHT / DIGITS[task])
        rows.append((f"digits, {task}", "C independent, the paper's start", *of_seeds(own), trained))
    for task, own in seeds.items():
        trained = source(OVERNIGHT / DIGITS[task])
        rows.append((f"digits, {task}", "C = A, ours", *of_seeds(own, "deq tied"), trained))
    free = OVERNIGHT / "free_c"
    stop = pd.read_csv(free / "stop.csv", index_col=["task", "arm"])
    sizes = origin(free)["settings"]["sizes"]["until they stop improving"]
    images, count = re.findall(r"([\d,]+) images to train.* (\d+) seeds", sizes)[0]
    for task in DIGITS:
        ahead = interval(*stop.loc[(task, "DEQ, tied on the kernel"), ["ahead", "low", "high"]])
        trained = f"free_c: {images} images, until the stop"
        rows.append((f"digits of 14x14, {task}", "C tied on the kernel of K, ours", ahead, count, trained))
    for task, name in PHOTOGRAPHS.items():
        own = pd.read_csv(OVERNIGHT / name / "seeds.csv", index_col="kernels")
        trained = source(OVERNIGHT / name)
        for size, (number, _) in FILTERS.items():
            start = f"fixed weight, {number} kernels of {size}"
            rows.append((f"photographs, {task}", start, *of_seeds(own.loc[size]), trained))
        psnr = pd.read_csv(OVERNIGHT / name / "photographs.csv", index_col="seed").groupby("seed").mean()
        ahead = difference((psnr["psnr DEQ, ours"] - psnr["psnr bilevel, ours"]).tolist())
        iterations = next(r["epochs"] for r in origin(OVERNIGHT / name)["runs"].values() if r["learn_weight"])
        trained = f"figure {int(name[3:])}: 10 images, {iterations} iterations"
        rows.append(
            (f"photographs, {task}", "learned weight, 8 kernels of 3x3, ours", ahead, len(psnr), trained)
        )
    return rows


COLUMNS = ["setting", "start or weight", "DEQ − bilevel, dB (95 % interval)", "seeds", "trained on"]


def results() -> str:
    """Return the main table."""
    return table(COLUMNS, result_rows())


def headline() -> str:
    """Return the main table without the kernels of 11x11, small digits and budgets."""
    rows = [row[:4] for row in result_rows() if "11x11" not in row[1] and "14x14" not in row[0]]
    return table(COLUMNS[:4], [(*row[:3], str(row[3]).partition(";")[0]) for row in rows])


def bsd68() -> str:
    """Return the mean PSNR of our models and of published methods on Set68."""
    means = pd.read_csv(REFERENCE / "bsd68" / "means.csv", index_col=0)
    chosen = means[~means.index.str.contains("noisy")].sort_values("25")
    rows = [
        (
            f"**{name}, ours**" if row["source"] == "this page" and name != "total variation" else name,
            f"{row['parameters']:,.0f}" if row["parameters"] > 0 else "–",
            *(f"{row[sigma]:.2f}" if row[sigma] > 0 else "–" for sigma in ("15", "25", "50")),
        )
        for name, row in chosen.iterrows()
    ]
    return table(["method", "parameters", "noise 15", "25", "50"], rows)


def verdict(cases: Sequence[bool]) -> str:
    """Return the verdict on a statement that holds in some cases."""
    return HOLDS if all(cases) else IN_PART if any(cases) else FAILS


def printed(name: str, pattern: str) -> list[Any]:
    """Return all matches of a pattern in the outputs of a committed notebook."""
    cells = nbformat.read(notebook_path(name), as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return re.findall(pattern, "\n".join(texts), re.MULTILINE)


def claims() -> str:
    """Return the statements of the paper with their outcomes."""
    rows: list[Row] = []
    distance = float(printed("theory", r"A and C summed +([\d.e+-]+)$")[0])
    number = f"relative distance of the hypergradients {distance:.0e}"
    text = "Bilevel learning by a fixed-point iteration is a DEQ with C = A (title, abstract)"
    rows.append((text, "theory", verdict([distance < 1e-10]), number, "one batch, float64"))
    skew = {(m, s): float(v) for m, s, v in printed("theory", r"^(bilevel|DEQ) (11x11|3x3) +([\d.]+)$")}
    number = ", ".join(f"{model} {size} {share:.2f}" for (model, size), share in skew.items())
    cases = [(share > 1e-3) == (model == "DEQ") for (model, _), share in skew.items()]
    text = "With a free C the field is not the gradient of an energy"
    rows.append(
        (
            text,
            "theory",
            verdict(cases),
            f"skew part after training: {number}",
            "the kernels of figures 9 to 12",
        )
    )
    memory = np.array(printed("scaling", r"^(\d+) +(\d+\.\d+) +(\d+\.\d+)$"), dtype=float)
    number = f"{memory[-1, 1]:.1f} MB for 1 to {memory[-1, 0]:.0f} steps, {memory[-1, 2]:.0f} MB by unrolling"
    text = "The implicit gradient needs the same memory for any number of iterations"
    rows.append((text, "scaling", verdict([memory[:, 1].std() == 0]), number, "one training step"))

    sweep = load_table("overnight").runs
    sweep = sweep[sweep["arm"] != "deq tied"]
    kept = kept_runs(sweep).groupby(["task", "model"])["test_loss"].agg(["median", "size"])
    grid_budget, whole = budget(OVERNIGHT / "fig01"), len(sweep) == len(grid("paper", initial="independent"))
    number = "median loss of the runs up to 0.5, bilevel / DEQ: " + ", ".join(
        f"{task} {kept.loc[(task, 'bilevel'), 'median']:.3f} / {kept.loc[(task, 'deq'), 'median']:.3f}"
        for task in TASKS
    )
    text = "Figure 1: boxplots of the final test loss over the grid"
    rows.append((text, "fig01", HOLDS if whole else IN_PART, number, grid_budget))
    lost = sweep[sweep["status"] == DIVERGED]
    by_step = lost.groupby("tau").size()
    number = f"{len(lost)} of {len(sweep)} runs of the paper's models diverged: " + ", ".join(
        f"{n} at tau {tau:g}" for tau, n in by_step.items()
    )
    text = "A long step tau makes the iteration diverge for some configurations, also late in training"
    rows.append(
        (
            text,
            "fig01",
            HOLDS if whole else IN_PART,
            number,
            f"{grid_budget}; tau up to {sweep['tau'].max():g}",
        )
    )
    for name, verb in zip(DIGITS.values(), ("denoise", "inpaint", "deblur"), strict=True):
        psnr = pd.read_csv(OVERNIGHT / name / f"{name}.csv", index_col="image")["psnr"]
        seeds = pd.read_csv(OVERNIGHT / name / "seeds.csv")[["bilevel", "deq"]].apply(
            pd.to_numeric, errors="coerce"
        )
        means = seeds.mean()
        number = f"{psnr['input']:.1f} dB; bilevel {means['bilevel']:.1f}, DEQ {means['deq']:.1f} dB"
        number += f"; {seeds.isna().sum().sum()} of {seeds.size} trainings diverged"
        cases = (seeds > psnr["input"]).to_numpy().ravel().tolist()
        text = f"Figure {int(name[3:])}: both models {verb} digits"
        rows.append((text, name, verdict(cases), number, f"{budget(OVERNIGHT / name)}, {len(seeds)} seeds"))
    best = pd.read_csv(OVERNIGHT / "fig05" / "fig05.csv")
    losses = best.pivot_table(index=["task", "noise"], columns="arm", values="test_loss")
    ahead = (losses["deq"] < losses["bilevel"]).sum()
    number = f"all {len(losses)} panels; the best DEQ has the lower loss in {ahead}"
    text = "Figure 5: test loss of the best configurations after each epoch, for each noise and task"
    rows.append((text, "fig05", HOLDS if whole else IN_PART, number, grid_budget))
    steps = pd.read_csv(OVERNIGHT / "fig06" / "fig06.csv").set_index(["task", "arm"])
    within = steps["epochs_within"].unstack()
    number = "median epochs, bilevel / DEQ: " + ", ".join(
        f"{task} {within.loc[task, 'bilevel']:g} / {within.loc[task, 'deq']:g}" for task in TASKS
    )
    text = "Figure 6: epochs that runs finish in the same time"
    rows.append((text, "fig06", HOLDS if whole else IN_PART, number, grid_budget))

    inside = pd.read_csv(OVERNIGHT / "fig07" / "fig07.csv", index_col="image")["psnr inside"]
    number = f"in the mask {inside['naive']:.1f} dB; our training {inside['ours']:.1f} dB"
    text = "Figure 7: naive training of a bilevel model does not fill the masked area"
    rows.append(
        (text, "fig07", verdict([inside["naive"] < inside["ours"]]), number, budget(OVERNIGHT / "fig07"))
    )
    names = [f"{model} {size}" for size in FILTERS for model in ("bilevel", "DEQ")]
    psnr = pd.read_csv(OVERNIGHT / "fig08" / "fig08.csv", index_col="image")["psnr"]
    number = f"{psnr['input']:.1f} dB; " + ", ".join(f"{name} {psnr[name]:.1f}" for name in names) + " dB"
    text = "Figure 8: both models denoise photographs from random kernels of 11x11 and 3x3"
    cases = [psnr[name] > max(psnr["input"], psnr[f"untrained {name.split()[1]}"]) for name in names]
    rows.append((text, "fig08", verdict(cases), number, f"{budget(OVERNIGHT / 'fig08')}, the paper's"))
    for first, task in ((9, "denoising"), (14, "deblurring")):
        number, cases = [], []
        for figure in range(first, first + 4):
            kernels = pd.read_csv(OVERNIGHT / f"fig{figure:02}" / f"fig{figure:02}.csv", index_col="kernels")
            apart = kernels.loc["after", "||A - C|| / ||A||"]
            number += [f"{apart:.2f}"]
            cases += [(apart > 0) == (figure in (first + 1, first + 3))]
        text = f"Figures {first} to {first + 3}: kernels of A and C before and after training on {task}"
        number = f"relative distance of C from A after training: {', '.join(number)}"
        rows.append(
            (
                text,
                f"fig{first:02}",
                verdict(cases),
                number,
                f"{budget(OVERNIGHT / f'fig{first:02}')}, the paper's",
            )
        )
    psnr = pd.read_csv(OVERNIGHT / "fig13" / "fig13.csv", index_col="image")["psnr"]
    gains = {name: psnr[name] - psnr[f"{name}, denoising"] for name in names}
    number = (
        "gain of training on deblurring: "
        + ", ".join(f"{name} {gain:+.1f}" for name, gain in gains.items())
        + " dB"
    )
    text = "Figure 13: kernels trained on deblurring compared with those learned on denoising"
    cases = [gain > 0 for gain in gains.values()]
    rows.insert(-1, (text, "fig13", verdict(cases), number, f"{budget(OVERNIGHT / 'fig13')}, the paper's"))
    text = "Figures 1 to 6 after 100 epochs on 60,000 digits, over the whole grid"
    rows.append(
        (text, "figures PROFILE=paper", NOT_TESTED, "–", "`make sweep-plan PROFILE=paper` estimates it")
    )
    text = "Figures 7 to 17 on CelebA photographs of 218x178"
    rows.append((text, 'fig08 ARGS="-p dataset celeba"', NOT_TESTED, "–", "AT&T faces of 112x92 instead"))
    shown = [
        (text, f"`make {name}`", answer, number, trained) for text, name, answer, number, trained in rows
    ]
    return table(["statement", "command", "outcome", "number", "budget"], shown)


def questions() -> str:
    """Return our questions with their answers in the profiles."""
    parts = []
    for name in PAGES:
        folders = {profile: RESULTS / where / name for profile, where in COMMITTED.items()}
        made = {p: f for p, f in folders.items() if (f / "questions.json").exists()}
        answers: dict[str, dict[str, str]] = {}
        for profile, folder in made.items():
            for question in json.loads((folder / "questions.json").read_bytes()):
                answer = question["answer"].removesuffix(" at this budget")
                own = f"{answer}: {question['numbers'].partition(';')[0]}"
                answers.setdefault(question["question"], {})[profile] = own
        if made:
            trained = "; ".join(f"{profile}, {budget(folder)}" for profile, folder in made.items())
            rows = [(text, *(own.get(p, NOT_TESTED) for p in COMMITTED)) for text, own in answers.items()]
            parts.append(f"`make {name}` ({trained})\n\n{table(['question', *COMMITTED], rows)}")
    return "\n\n".join(parts)


def sizes() -> str:
    """Return the images, epochs and seeds of each profile."""

    def digits(profile: str, task: str) -> str:
        c, seeds = profile_config(profile, task), profile_seeds(profile)
        return f"{c.train_images:,} of {c.size}x{c.size}, {c.epochs} epochs, {seeds} seed{'s' * (seeds > 1)}"

    def photographs(profile: str, task: str) -> str:
        c, seeds = faces_config(profile, task), profile_seeds(profile)
        return f"{c.train_images}, {c.epochs} epochs, {seeds} seed{'s' * (seeds > 1)}"

    def whole(profile: str) -> str:
        configs = grid(profile)
        c = configs[0]
        return f"{len(configs):,} runs: {c.train_images:,} of {c.size}x{c.size}, {c.epochs} epochs"

    profiles = [profile for profile in PROFILES if profile != "smoke"]
    rows: list[Row] = [(f"digits, {task}", *(digits(p, task) for p in profiles)) for task in TASKS]
    rows.append(("digits, the grid", *map(whole, profiles)))
    rows += [(f"photographs, {task}", *(photographs(p, task) for p in profiles)) for task in PHOTOGRAPHS]
    return table(["images and epochs", *profiles], rows)


def hours() -> str:
    """Return the hours of training for the committed evidence."""
    records = [json.loads(path.read_bytes()) for path in OVERNIGHT.glob("runs/*.json")]
    records += [json.loads(zipfile.ZipFile(path).read("run.json")) for path in OVERNIGHT.glob("runs/*.zip")]
    seconds = sum(record["run"]["provenance"]["seconds"] for record in records)
    rows: list[Row] = [("overnight, figures 2 to 4 and 7 to 17", len(records), f"{seconds / 3600:.1f}")]
    for profile in COMMITTED:
        for accelerator, runs in load_table(profile).runs.groupby("accelerator"):
            machine = f" on {accelerator}" * (accelerator != "none")
            spent = f"{runs['seconds'].sum() / 3600:.1f}"
            rows.append((f"{profile}, the grid{machine}", f"{len(runs)}", spent))
    others = ("fig02", "fig03", "fig04", "fig07", "fig08", "fig13", "free_c", "weight", "hypergradients")
    origins = [origin(REFERENCE / name) for name in others]
    total = sum(record["training_seconds"] for record in origins)
    keys = {key for record in origins for key in record["runs"]}
    rows.append(
        (
            "quick, figures 2 to 4, 7, 8 and 13, free_c, weight and hypergradients",
            len(keys),
            f"{total / 3600:.1f}",
        )
    )
    return table(["trainings", "runs", "hours"], rows)


def versions() -> str:
    """Return the versions of the method."""
    return table(["version", "change of results"], METHODS.items())


PARTS = {
    part.__name__: part for part in (headline, bsd68, results, claims, questions, sizes, hours, versions)
}


def updated(text: str) -> str:
    """Return a page with its generated parts updated."""
    for name, part in PARTS.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        if mark:
            _, end, after = rest.partition(f"<!-- /{name} -->")
            if not end:
                raise ValueError(f"the part {name} has no end, <!-- /{name} -->")
            text = f"{before}{mark}{part()}\n{end}{after}"
    return text


def main() -> None:
    """Write all generated parts."""
    for path in PAGES_WITH_PARTS:
        write_atomic(path, updated(path.read_text(encoding="utf-8")).encode())


if __name__ == "__main__":
    main()

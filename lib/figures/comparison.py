"""Comparison of the arms of a sweep: outcomes, pairs, statistics and answers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
import scipy
from numpy.typing import NDArray

from lib.experiments.config import TASKS, RunConfig
from lib.experiments.sweep import NOT_RUN, Sweep
from lib.training import DIVERGED, OUT_OF_TIME

LOSS_THRESHOLD = 0.5
"""Largest final test loss in the comparison, as in the paper."""

CONFIDENCE, RESAMPLES, LEVEL = 0.95, 9999, 0.05

KEPT, DROPPED, NO_EPOCH = "kept", "dropped", "no epoch"
OUTCOMES = (KEPT, DROPPED, DIVERGED, NO_EPOCH, NOT_RUN)

PAIRED = tuple(name for name in RunConfig.model_fields if name not in ("model", "initial"))
"""Parameters that the two runs of a pair share."""

PAIRS = (("bilevel", "deq"), ("bilevel", "deq tied"), ("deq", "deq tied"))
"""Pairs of arms for the comparison of each configuration."""

YES, NO, NOT_DECIDED = "yes", "no", "not decided at this budget"
ANSWERS = (YES, NO, NOT_DECIDED)


def outcome(runs: pd.DataFrame, threshold: float = LOSS_THRESHOLD) -> pd.Series:
    """Return the outcome of each run of `Sweep.runs`.

    A run is `kept`, `dropped` (its final test loss is above the threshold), `diverged`, `no epoch` (out of
    time in the first epoch) or `not run`.
    """
    conditions = {
        NOT_RUN: runs["status"] == NOT_RUN,
        DIVERGED: runs["status"] == DIVERGED,
        NO_EPOCH: (runs["status"] == OUT_OF_TIME) & (runs["epochs_finished"] == 0),
        KEPT: runs["test_loss"] <= threshold,
    }
    chosen = np.select([c.to_numpy(bool) for c in conditions.values()], list(conditions), DROPPED)
    return pd.Series(chosen, index=runs.index, name="outcome")


def outcome_table(runs: pd.DataFrame, threshold: float = LOSS_THRESHOLD) -> pd.DataFrame:
    """Count the runs of each task and arm with each outcome."""
    counts = pd.crosstab([runs["task"], runs["arm"]], outcome(runs, threshold))
    return counts.reindex(columns=list(OUTCOMES), fill_value=0).rename_axis(columns=None)


def paired(runs: pd.DataFrame, column: str, first: str = "bilevel", second: str = "deq") -> pd.DataFrame:
    """Return a quantity of two arms for each configuration with both runs: a pair.

    Each configuration counts once, with medians over the seeds.

    Returns:
        A row per pair: the shared parameters, a column for each arm, and `difference`, first minus second.
    """
    index = [name for name in PAIRED if name in runs]
    pairs = runs.pivot(index=index, columns="arm", values=column)
    pairs = pairs.reindex(columns=[first, second]).dropna().rename_axis(columns=None).reset_index()
    pairs = pairs.assign(difference=pairs[first] - pairs[second])
    if "seed" not in pairs or pairs["seed"].nunique() <= 1:
        return pairs
    shared = [name for name in index if name != "seed"]
    return pairs.drop(columns="seed").groupby(shared, as_index=False, dropna=False).median()


def kept_runs(runs: pd.DataFrame, threshold: float = LOSS_THRESHOLD) -> pd.DataFrame:
    return runs[outcome(runs, threshold) == KEPT]


def paired_test(differences: NDArray[np.float64]) -> dict[str, float]:
    """Return the median of paired differences with its bootstrap interval, and Wilcoxon's signed-rank test.

    Returns:
        `pairs`, `median`, the ends `low` and `high` of the 95 % interval, and the two-sided `p` for symmetry
        about zero; NaN for fewer than two pairs, or if none differs.
    """
    median = float(np.median(differences)) if len(differences) else math.nan
    result = {"pairs": float(len(differences)), "median": median}
    if len(differences) < 2 or not differences.any():
        return result | dict.fromkeys(("low", "high", "p"), math.nan)
    options: Any = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "method": "percentile"}
    bootstrap = scipy.stats.bootstrap((differences,), np.median, **options, rng=np.random.default_rng(0))
    low, high = bootstrap.confidence_interval
    p = scipy.stats.wilcoxon(differences).pvalue
    return result | {"low": float(low), "high": float(high), "p": float(p)}


@dataclass(frozen=True)
class Question:
    """Question about two arms, with one of `ANSWERS` by a rule from numbers, decisive ones first."""

    question: str
    answer: str
    numbers: str
    rule: str


def decide(supported: bool, refuted: bool) -> str:
    """Return the answer: not decided if the numbers support neither or both."""
    if supported == refuted:
        return NOT_DECIDED
    return YES if supported else NO


def questions_per_task(pairs: pd.DataFrame, question: str) -> list[Question]:
    """Answer for each task whether a paired `difference` is positive."""
    rule = (
        "Over the pairs (one configuration, both models, both kept), whose difference is positive where it "
        "speaks for yes: yes when the 95 % interval of the median difference lies above zero and Wilcoxon's "
        f"p is below {LEVEL:g}, no when it lies below zero with p below {LEVEL:g}, else not decided at this "
        "budget."
    )
    questions = []
    for task in TASKS:
        test = paired_test(pairs.loc[pairs["task"] == task, "difference"].to_numpy(float))
        significant = test["p"] < LEVEL
        answer = decide(significant and test["low"] > 0, significant and test["high"] < 0)
        numbers, count = f"median {test['median']:+.2g}", f"{test['pairs']:.0f} pairs"
        if math.isnan(test["p"]):
            numbers = f"{numbers}; {count}, too few or none that differs" if test["pairs"] else "no pairs"
        else:
            numbers += f" [{test['low']:+.2g}, {test['high']:+.2g}]; {count}, p = {test['p']:.1g}"
        questions.append(Question(f"{task}: {question}", answer, numbers, rule))
    return questions


def print_answers(questions: Sequence[Question]) -> None:
    """Print each answer with its question and numbers, and each rule after its questions."""
    for rule, decided in groupby(questions, lambda question: question.rule):
        for question in decided:
            print(f"{question.answer.upper()}: {question.question} {question.numbers}")
        print(textwrap.fill(f"Rule: {rule}", 95))


def has_converged(rows: pd.DataFrame) -> bool:
    """Return whether 95 % of the solves of some rows converged; a Neumann series counts as converged.

    Otherwise fewer digits are reproducible on other machines.
    """
    return bool((rows.filter(like="_unconverged").mean().fillna(0) < 0.05).all())


def check_sweep(sweep: Sweep, threshold: float = LOSS_THRESHOLD) -> None:
    """Check that the tables of a sweep are consistent, and print the results."""
    counts = outcome_table(sweep.runs, threshold).to_numpy().sum()
    assert counts == len(sweep.runs) == sweep.runs["key"].nunique(), f"{counts} outcomes"
    print("every configuration is there once and has one outcome")
    last = sweep.epochs.sort_values("epoch").groupby("key").last()
    trained = sweep.runs[sweep.runs["key"].isin(last.index)].set_index("key")
    assert (trained["test_loss"] == last.loc[trained.index, "test_loss"]).all(), "final test loss"
    print("each final test loss is that of the run's last finished epoch")
    for both in PAIRS:
        pairs = paired(kept_runs(sweep.runs, threshold), "test_loss", *both)
        shared = pairs.columns.difference([*both, "difference"])
        assert not pairs.duplicated(list(shared)).any(), "a pair is counted twice"
        assert (pairs[list(both)] <= threshold).all(axis=None), "a pair has a run that was dropped"
    print("each pair is one configuration of two arms, both kept")

"""Comparison of models: outcomes of runs, pairs, statistics and answers."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from lib.experiments.config import TASKS
from lib.experiments.profiles import ARMS
from lib.experiments.records import REFERENCE
from lib.experiments.sweep import Sweep, load_table
from lib.figures.comparison import (
    NO,
    NOT_DECIDED,
    OUTCOMES,
    YES,
    Question,
    check_sweep,
    has_converged,
    kept_runs,
    outcome,
    outcome_table,
    paired,
    paired_test,
    print_answers,
    questions_per_task,
)

RUN: dict[str, Any] = {
    "model": "bilevel",
    "initial": "independent",
    "task": "denoising",
    "noise": 0.1,
    "tau": 0.5,
    "gamma": 0.1,
    "sigma": "relu",
    "seed": 0,
    "time_budget": 60.0,
    "status": "completed",
    "epochs_finished": 2,
    "seconds": 3.0,
    "test_loss": 0.2,
}
"""A run as a row of the table of runs."""

OPPOSITE = {YES: NO, NO: YES, NOT_DECIDED: NOT_DECIDED}

SHARED = ("task", "noise", "tau", "seed")
CONFIGURATIONS = st.tuples(
    st.sampled_from(TASKS), st.sampled_from([0.0, 0.1]), st.sampled_from([0.5, 0.9]), st.integers(0, 1)
)
LOSSES = st.floats(0, 1)


def runs_table(*rows: dict[str, Any]) -> pd.DataFrame:
    """A table of runs, `RUN` with some values replaced in each row."""
    runs = pd.DataFrame([{"key": f"run {i}"} | RUN | row for i, row in enumerate(rows)])
    return runs.assign(arm=runs["model"].mask(runs["initial"] == "tied", "deq tied"))


def make_sweep(runs: pd.DataFrame, epochs: pd.DataFrame | None = None) -> Sweep:
    return Sweep("smoke", runs, pd.DataFrame() if epochs is None else epochs, {})


def pairs_table(**differences: NDArray[np.float64]) -> pd.DataFrame:
    """Pairs of some tasks with these differences."""
    rows = [(task, difference) for task in differences for difference in differences[task]]
    return pd.DataFrame(rows, columns=["task", "difference"])


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"test_loss": 0.5}, "kept"),
        ({"test_loss": math.nextafter(0.5, 1)}, "dropped"),
        ({"test_loss": math.nan}, "dropped"),
        ({"status": "diverged", "test_loss": 0.2}, "diverged"),
        ({"status": "out of time", "epochs_finished": 1}, "kept"),
        ({"status": "out of time", "epochs_finished": 0}, "no epoch"),
        ({"status": "not run", "epochs_finished": 0, "test_loss": math.nan}, "not run"),
    ],
)
def test_outcome_follows_status_and_loss(run: dict[str, Any], expected: str) -> None:
    runs = runs_table({"test_loss": 0.1}, run)
    assert outcome(runs).tolist() == ["kept", expected]
    assert kept_runs(runs)["key"].tolist() == ["run 0", "run 1"][: 1 + (expected == "kept")]
    table = outcome_table(runs)
    assert table.columns.tolist() == list(OUTCOMES)
    assert table[expected].sum() == 1 + (expected == "kept")


@given(
    losses=st.dictionaries(
        CONFIGURATIONS, st.tuples(st.none() | LOSSES, st.none() | st.just(math.nan) | LOSSES), max_size=12
    )
)
def test_pairs_share_their_configuration(losses: dict[Any, Any]) -> None:
    """Pairs are configurations with both losses, with medians over several seeds."""
    arms = (ARMS["bilevel"], ARMS["deq tied"])
    rows = [
        dict(zip(SHARED, configuration, strict=True)) | arm | {"test_loss": loss}
        for configuration, both in losses.items()
        for arm, loss in zip(arms, both, strict=True)
        if loss is not None
    ]
    complete = {
        configuration: (bilevel, deq, bilevel - deq)
        for configuration, (bilevel, deq) in losses.items()
        if bilevel is not None and deq is not None and not math.isnan(deq)
    }
    several = len({seed for *_, seed in complete}) > 1
    groups: dict[Any, list[Any]] = {}
    for configuration, both in complete.items():
        groups.setdefault(configuration[:-1] if several else configuration, []).append(both)
    expected = {name: tuple(np.median(both, axis=0).tolist()) for name, both in groups.items()}
    pairs = paired(runs_table({"tau": 7.0}, *rows), "test_loss", second="deq tied")
    shared = SHARED[:-1] if several else SHARED
    assert len(pairs) == len(expected)
    assert expected == {
        tuple(pair[name] for name in shared): (pair["bilevel"], pair["deq tied"], pair["difference"])
        for pair in pairs.to_dict("records")
    }


def normal(count: int, median: float = 0.0, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(median, 1.0, count)


@pytest.mark.parametrize("count", [2, 5, 40, 301])
def test_median_and_p_value_match_scipy(count: int) -> None:
    differences = normal(count, 0.3)
    result = paired_test(differences)
    assert (result["pairs"], result["median"]) == (count, np.median(differences))
    assert result["p"] == pytest.approx(stats.wilcoxon(differences, alternative="two-sided").pvalue)
    assert result["low"] <= result["median"] <= result["high"]


def test_interval_is_percentile_bootstrap() -> None:
    """Compare with quantiles of medians of resampled differences, to Monte Carlo accuracy."""
    differences = np.exp(normal(1001))
    result = paired_test(differences)
    rng = np.random.default_rng(5)
    draws = (differences[rng.integers(0, 1001, (1000, 1001))] for _ in range(8))
    low, high = np.quantile(np.concatenate([np.median(draw, axis=1) for draw in draws]), [0.025, 0.975])
    assert result["low"] == pytest.approx(low, abs=0.04 * (high - low))
    assert result["high"] == pytest.approx(high, abs=0.04 * (high - low))


@pytest.mark.parametrize(
    ("differences", "median"), [([], math.nan), ([0.3], 0.3), ([0.0], 0.0), ([0.0] * 20, 0.0)]
)
def test_statistics_of_too_few_differences_are_nan(differences: list[float], median: float) -> None:
    result = paired_test(np.array(differences))
    assert result["pairs"] == len(differences)
    assert result["median"] == pytest.approx(median, nan_ok=True)
    assert all(math.isnan(result[name]) for name in ("low", "high", "p"))


CLEAR = np.linspace(0.1, 1.0, 30)

DIFFERENCES = {
    "all positive": (CLEAR, YES),
    "mostly positive": (np.concatenate([CLEAR, -CLEAR[:3] / 10]), YES),
    "balanced": (np.concatenate([CLEAR, -CLEAR]), NOT_DECIDED),
    "few": (CLEAR[:4], NOT_DECIDED),
    "none": (CLEAR[:0], NOT_DECIDED),
    "zeros": (np.zeros(30), NOT_DECIDED),
    "median zero": (np.concatenate([CLEAR, np.zeros(40)]), NOT_DECIDED),
}


@pytest.mark.parametrize(("differences", "answer"), list(DIFFERENCES.values()), ids=list(DIFFERENCES))
def test_answer_follows_sign_of_differences(differences: NDArray[np.float64], answer: str) -> None:
    """Clearly positive differences give yes, and the opposite with the models exchanged."""
    for sign, expected in ((1, answer), (-1, OPPOSITE[answer])):
        questions = questions_per_task(pairs_table(inpainting=sign * differences), "is it so?")
        answers = {question.question.partition(":")[0]: question.answer for question in questions}
        assert answers == dict.fromkeys(TASKS, NOT_DECIDED) | {"inpainting": expected}


def test_answers_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    questions = [
        Question("is it so?", YES, "3 pairs", "count"),
        Question("is it not?", NOT_DECIDED, "0 pairs", "count"),
        Question("was it?", NO, "1 pair", "weigh"),
    ]
    print_answers(questions)
    assert capsys.readouterr().out.splitlines() == [
        "YES: is it so? 3 pairs",
        "NOT DECIDED AT THIS BUDGET: is it not? 0 pairs",
        "Rule: count",
        "NO: was it? 1 pair",
        "Rule: weigh",
    ]


def test_committed_answers_follow_from_committed_runs() -> None:
    runs = kept_runs(load_table().runs)
    arms = ("deq", "deq tied")
    questions = [q for arm in arms for q in questions_per_task(paired(runs, "test_loss", second=arm), "so?")]
    committed = json.loads((REFERENCE / "fig01" / "questions.json").read_bytes())
    assert [(question.answer, question.numbers, question.rule) for question in questions] == [
        (question["answer"], question["numbers"], question["rule"]) for question in committed
    ]


def test_check_sweep_detects_duplicates_and_wrong_losses(capsys: pytest.CaptureFixture[str]) -> None:
    """The final loss must be that of the last epoch."""
    runs = runs_table(
        {}, {"model": "deq", "test_loss": 0.1}, {"tau": 0.9, "status": "not run", "test_loss": math.nan}
    )
    rows = [("run 0", 0, 0.9), ("run 1", 2, 0.1), ("run 0", 2, 0.2), ("run 0", 1, 0.3)]
    epochs = pd.DataFrame(rows, columns=["key", "epoch", "test_loss"])
    check_sweep(make_sweep(runs, epochs))
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(AssertionError, match="outcomes"):
        check_sweep(make_sweep(pd.concat([runs, runs.iloc[:1]], ignore_index=True), epochs))
    with pytest.raises(AssertionError, match="final test loss"):
        check_sweep(make_sweep(runs.assign(test_loss=[0.3, 0.1, math.nan]), epochs))


def test_convergence_allows_few_failed_solves() -> None:
    """Less than one in twenty may fail in each kind of solve; missing values do not count as failures."""
    solved = dict.fromkeys([f"{kind}_unconverged" for kind in ("forward", "backward", "test")], 0.0)
    assert has_converged(runs_table(solved, solved | {"forward_unconverged": math.nan}))
    assert has_converged(runs_table(solved, solved | {"backward_unconverged": 0.09}))
    assert not has_converged(runs_table(solved, solved | {"backward_unconverged": 0.1}))

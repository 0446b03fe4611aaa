"""The comparison: outcomes, pairs, their statistics, and answers that follow from the numbers alone."""

from __future__ import annotations

import json
import math
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from lib.experiments.runs import REFERENCE
from lib.experiments.sweep import Sweep
from lib.figures.comparison import (
    NO,
    NOT_DECIDED,
    OUTCOMES,
    YES,
    Question,
    best_runs,
    check_sweep,
    decide,
    epoch_budget,
    epochs_within,
    has_converged,
    kept_runs,
    outcome,
    outcome_table,
    paired,
    paired_table,
    paired_test,
    print_answers,
    questions_of_best_runs,
    questions_per_task,
)
from lib.operators import TASKS

RUN: dict[str, Any] = {
    "model": "bilevel",
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

LOSSES = st.floats(0, 1)
CONFIGURATIONS = st.tuples(
    st.sampled_from(TASKS),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.5, 0.9]),
    st.sampled_from([0.1, 1.0]),
    st.sampled_from(["relu", "identity"]),
    st.integers(0, 1),
)
"""What the two runs of a pair share, in the order of `SHARED`."""
SHARED = ("task", "noise", "tau", "gamma", "sigma", "seed")


def runs_table(*rows: dict[str, Any]) -> pd.DataFrame:
    """A table of runs, `RUN` with some values replaced in each row."""
    return pd.DataFrame([{"key": f"run {i}"} | RUN | row for i, row in enumerate(rows)])


def make_sweep(runs: pd.DataFrame, epochs: pd.DataFrame) -> Sweep:
    return Sweep("smoke", runs, epochs, {})


def pairs_table(**differences: NDArray[np.float64]) -> pd.DataFrame:
    """Pairs of some tasks with these differences."""
    rows = [(task, difference) for task in differences for difference in differences[task]]
    return pd.DataFrame(rows, columns=["task", "difference"])


def best_table(losses: dict[tuple[str, float, str], float]) -> pd.DataFrame:
    """Best runs from their losses by task, noise and model."""
    return pd.DataFrame([(*place, loss) for place, loss in losses.items()]).set_axis(
        ["task", "noise", "model", "test_loss"], axis="columns"
    )


def swapped(runs: pd.DataFrame) -> pd.DataFrame:
    """The same table with the names of the models exchanged."""
    return runs.assign(model=runs["model"].map({"deq": "bilevel", "bilevel": "deq"}))


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({}, "kept"),
        ({"test_loss": 0.5}, "kept"),
        ({"test_loss": math.nextafter(0.5, 1)}, "dropped"),
        ({"test_loss": 900.0}, "dropped"),
        ({"test_loss": math.nan}, "dropped"),
        ({"status": "diverged", "test_loss": 0.2}, "diverged"),
        ({"status": "diverged", "test_loss": math.nan, "epochs_finished": 0}, "diverged"),
        ({"status": "out of time", "epochs_finished": 1}, "kept"),
        ({"status": "out of time", "epochs_finished": 1, "test_loss": 0.6}, "dropped"),
        ({"status": "out of time", "epochs_finished": 0}, "no epoch"),
        ({"status": "out of time", "epochs_finished": 0, "test_loss": 0.6}, "no epoch"),
        ({"status": "not run", "epochs_finished": 0, "test_loss": math.nan}, "not run"),
    ],
)
def test_the_outcome_of_a_run(run: dict[str, Any], expected: str) -> None:
    """A loss at the threshold is kept; a run that has no loss of its own training never is."""
    runs = runs_table({"test_loss": 0.1}, run)
    assert outcome(runs).tolist() == ["kept", expected]
    assert kept_runs(runs)["key"].tolist() == ["run 0", "run 1"][: 1 + (expected == "kept")]


def test_the_threshold_is_a_parameter() -> None:
    """Another threshold keeps other runs."""
    runs = runs_table(*({"test_loss": loss} for loss in (0.1, 0.3, 0.7)))
    assert [len(kept_runs(runs, at)) for at in (0.05, 0.1, 0.5, 0.7)] == [0, 1, 2, 3]


def test_the_outcomes_are_counted_per_task_and_model() -> None:
    """Each run is counted once, in its place; outcomes that did not occur are zeros."""
    lost = {"status": "diverged", "test_loss": math.nan}
    runs = runs_table(
        *[{"model": "deq"}] * 3,
        *[{"model": "deq", "test_loss": 0.9}] * 2,
        *[{"model": "deq"} | lost] * 4,
        {"status": "not run", "test_loss": math.nan},
        {"task": "inpainting", "status": "out of time", "epochs_finished": 0},
    )
    table = outcome_table(runs)
    assert table.columns.tolist() == list(OUTCOMES) == ["kept", "dropped", "diverged", "no epoch", "not run"]
    assert table.loc[("denoising", "deq")].tolist() == [3, 2, 4, 0, 0]
    assert table.loc[("denoising", "bilevel")].tolist() == [0, 0, 0, 0, 1]
    assert table.loc[("inpainting", "bilevel")].tolist() == [0, 0, 0, 1, 0]
    assert table.to_numpy().sum() == len(runs)
    assert outcome_table(runs, 1.0).loc[("denoising", "deq")].tolist() == [5, 0, 4, 0, 0]


def test_pairs_differ_in_no_other_parameter() -> None:
    """Runs that differ in more than the model are no pair, whichever parameter it is."""
    rows = [{"model": model, "lam": lam} for model in ("bilevel", "deq") for lam in (0.5, 1.0)]
    pairs = paired(runs_table(*rows[1:]), "test_loss")
    assert pairs["lam"].tolist() == [1.0]
    assert len(paired(runs_table(*rows), "test_loss")) == 2


@given(
    losses=st.dictionaries(
        CONFIGURATIONS, st.tuples(st.none() | LOSSES, st.none() | st.just(math.nan) | LOSSES), max_size=12
    ),
    random=st.randoms(use_true_random=False),
)
def test_pairs_are_one_configuration_of_both_models(losses: dict[Any, Any], random: Any) -> None:
    """A pair where both losses are there, and no other, with their difference, whatever the rows' order.

    Of two seeds it has the medians of both losses and of their difference.
    """
    rows = [
        dict(zip(SHARED, configuration, strict=True)) | {"model": model, "test_loss": loss}
        for configuration, both in losses.items()
        for model, loss in zip(("bilevel", "deq"), both, strict=True)
        if loss is not None
    ]
    runs = runs_table({"tau": 7.0}, *rows)
    shuffled = runs.sample(frac=1, random_state=random.randrange(2**32))
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
    pairs = paired(shuffled, "test_loss")
    shared = SHARED[:-1] if several else SHARED
    found = {
        tuple(pair[name] for name in shared): (pair["bilevel"], pair["deq"], pair["difference"])
        for pair in pairs.to_dict("records")
    }
    assert len(pairs) == len(found)
    assert found == expected
    pd.testing.assert_frame_equal(pairs, paired(runs, "test_loss"))


def test_one_models_runs_make_no_pairs() -> None:
    """Without the other model there are no pairs, and no error."""
    pairs = paired(runs_table({}, {"tau": 0.9}), "test_loss")
    assert pairs.empty
    assert {"task", "bilevel", "deq", "difference"} <= set(pairs.columns)


def normal(count: int, median: float = 0.0, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(median, 1.0, count)


@pytest.mark.parametrize("count", [2, 5, 40, 301])
def test_the_median_and_the_p_value(count: int) -> None:
    """The median is the sample's, and p is that of scipy's signed-rank test, two-sided."""
    differences = normal(count, 0.3)
    result = paired_test(differences)
    assert result["pairs"] == count
    assert result["median"] == np.median(differences)
    assert result["p"] == pytest.approx(stats.wilcoxon(differences, alternative="two-sided").pvalue)
    assert result["low"] <= result["median"] <= result["high"]


def test_the_interval_is_the_percentile_bootstraps() -> None:
    """Its ends are quantiles of medians of samples drawn with replacement, to Monte Carlo accuracy."""
    differences = np.exp(normal(1001))
    result = paired_test(differences)
    rng = np.random.default_rng(5)
    draws = (differences[rng.integers(0, 1001, (1000, 1001))] for _ in range(8))
    low, high = np.quantile(np.concatenate([np.median(draw, axis=1) for draw in draws]), [0.025, 0.975])
    assert result["low"] == pytest.approx(low, abs=0.04 * (high - low))
    assert result["high"] == pytest.approx(high, abs=0.04 * (high - low))


def test_the_interval_covers_the_median() -> None:
    """Of samples whose true median is known, about 95 % have an interval that contains it."""
    results = [paired_test(normal(30, 0.3, seed)) for seed in range(120)]
    covered = np.mean([result["low"] <= 0.3 <= result["high"] for result in results])
    assert 0.9 <= covered <= 0.985


def test_a_p_value_is_small_as_often_as_it_says() -> None:
    """Of samples that are symmetric about zero, about 5 % have p below 0.05."""
    small = np.mean([paired_test(normal(20, 0.0, seed))["p"] < 0.05 for seed in range(120)])
    assert 0.01 <= small <= 0.1


@given(differences=st.lists(st.floats(-10, 10), min_size=2, max_size=30).filter(any))
def test_the_test_has_no_favourite(differences: list[float]) -> None:
    """With every sign flipped, median and interval are mirrored and p is the same."""
    result, mirrored = paired_test(np.array(differences)), paired_test(-np.array(differences))
    assert mirrored["median"] == -result["median"]
    assert mirrored["low"] == pytest.approx(-result["high"], abs=1e-9)
    assert mirrored["high"] == pytest.approx(-result["low"], abs=1e-9)
    assert mirrored["p"] == pytest.approx(result["p"])
    assert 0 <= result["p"] <= 1


@pytest.mark.parametrize(
    ("differences", "median"), [([], math.nan), ([0.3], 0.3), ([0.0], 0.0), ([0.0] * 20, 0.0)]
)
def test_too_little_to_test_is_nan(differences: list[float], median: float) -> None:
    """No pairs, one pair, or none that differs: no interval and no p, and no warning either."""
    result = paired_test(np.array(differences))
    assert result["pairs"] == len(differences)
    assert result["median"] == pytest.approx(median, nan_ok=True)
    assert all(math.isnan(result[name]) for name in ("low", "high", "p"))


@pytest.mark.parametrize("differences", [[0.5] * 20, [0.0] * 19 + [1.0], [0.0, 1.0], [-1.0, 1.0], [2.0, 2.0]])
def test_ties_can_be_tested(differences: list[float]) -> None:
    """Equal differences, and zeros among others, give finite numbers without a warning."""
    result = paired_test(np.array(differences))
    assert all(math.isfinite(value) for value in result.values())
    assert result["low"] <= result["median"] <= result["high"]


def test_the_table_of_tests_has_a_row_per_group() -> None:
    """Each group of pairs is tested by itself, and its share of pairs that the DEQ wins is given."""
    pairs = pairs_table(denoising=np.array([1.0, 2.0, 0.0, -1.0]), inpainting=-np.arange(1.0, 7.0))
    pairs["noise"] = [0.1, 0.1, 0.5, 0.5, *[0.1] * 6]
    table = paired_table(pairs, ["task"]).reset_index().set_index("task")
    assert table["pairs"].to_dict() == {"denoising": 4, "inpainting": 6}
    assert table["median"].to_dict() == {"denoising": 0.5, "inpainting": -3.5}
    assert table["deq lower"].to_dict() == {"denoising": 0.5, "inpainting": 0.0}
    assert table.loc["inpainting", "p"] == paired_test(-np.arange(1.0, 7.0))["p"]
    finer = paired_table(pairs, ["task", "noise"])
    assert finer.index.names == ["task", "noise"]
    assert finer["pairs"].to_dict() == {("denoising", 0.1): 2, ("denoising", 0.5): 2, ("inpainting", 0.1): 6}
    assert finer.loc[("denoising", 0.5), "median"] == -0.5


def test_the_table_of_no_pairs_is_empty() -> None:
    """Without pairs there are no groups, and no error."""
    assert paired_table(pairs_table(), ["task"]).empty


def test_the_best_run_has_the_lowest_loss() -> None:
    """One run per task, noise and model, its loss the smallest; diverged and untrained ones do not count."""
    losses = {0.1: 0.3, 0.5: 0.2, 0.9: 0.25}
    runs = runs_table(
        *({"tau": tau, "test_loss": loss} for tau, loss in losses.items()),
        *({"tau": tau, "test_loss": loss / 2, "model": "deq"} for tau, loss in losses.items()),
        *({"tau": tau, "test_loss": loss, "noise": 0.5} for tau, loss in losses.items()),
        {"tau": 1.1, "test_loss": 0.01, "status": "diverged"},
        {"tau": 1.1, "test_loss": 0.01, "status": "out of time", "epochs_finished": 0},
        {"tau": 1.1, "test_loss": math.nan, "status": "not run", "task": "deblurring"},
    )
    best = best_runs(runs)
    columns = ["task", "noise", "model"]
    assert not best.duplicated(columns).any()
    assert best.set_index(columns)["test_loss"].to_dict() == {
        ("denoising", 0.1, "bilevel"): 0.2,
        ("denoising", 0.1, "deq"): 0.1,
        ("denoising", 0.5, "bilevel"): 0.2,
    }
    assert set(best["tau"]) == {0.5}


def test_the_best_configuration_of_several_seeds_has_the_lowest_median() -> None:
    """All its seeds are there, one lucky seed decides nothing, and one that diverged counts against it."""
    losses = {0.1: (0.3, 0.05, 0.4), 0.5: (0.2, 0.25, 0.9), 0.9: (0.1, None, None), 1.1: (0.24, 0.26, None)}
    runs = runs_table(
        *(
            {"tau": tau, "seed": seed, "test_loss": 0.01 if loss is None else loss}
            | ({"status": "diverged"} if loss is None else {})
            for tau, of_seeds in losses.items()
            for seed, loss in enumerate(of_seeds)
        )
    )
    best = best_runs(runs)
    assert set(best["tau"]) == {0.5}
    assert sorted(best["seed"]) == [0, 1, 2]
    shorter = best_runs(runs[runs["tau"] > 1])
    assert sorted(shorter["seed"]) == [0, 1]


def test_no_run_is_the_best_of_none() -> None:
    """Where all have diverged there is no best run."""
    assert best_runs(runs_table({"status": "diverged"}, {"status": "not run"})).empty


def test_the_time_for_epochs_is_the_budget_where_it_was_spent() -> None:
    """One run out of time: its budget; none: the median of the times of the kept runs."""
    times = [{"seconds": float(seconds)} for seconds in (1, 2, 4, 8, 100)]
    lost = [{"seconds": 1000.0, "test_loss": 0.9}, {"seconds": 1000.0, "status": "diverged"}]
    runs = runs_table(*times, *lost)
    assert epoch_budget(make_sweep(runs, pd.DataFrame())) == 4.0
    assert epoch_budget(make_sweep(runs, pd.DataFrame()), threshold=1.0) == 6.0
    late = runs_table(*times, {"status": "out of time", "seconds": 60.0})
    assert epoch_budget(make_sweep(late, pd.DataFrame())) == 60.0


def test_epochs_are_counted_to_the_second() -> None:
    """An epoch that ends just in time counts, the untrained model does not, and dropped runs are left out."""
    runs = runs_table({}, {}, {}, {"test_loss": 0.9})
    ends = {"run 0": (0.5, 2.0, 3.0, 4.0), "run 1": (0.1, 3.5, 4.0), "run 2": (0.2, 0.7, 1.2, 1.7, 2.2)}
    ends["run 3"] = (0.0, 0.1, 0.2)
    rows = [(key, epoch, seconds) for key, times in ends.items() for epoch, seconds in enumerate(times)]
    sweep = make_sweep(runs, pd.DataFrame(rows, columns=["key", "epoch", "seconds"]))
    for seconds, counts in ((3.0, [2, 0, 4]), (2.999, [1, 0, 4]), (100.0, [3, 2, 4]), (0.6, [0, 0, 0])):
        counted = epochs_within(sweep, seconds)
        assert counted["key"].tolist() == ["run 0", "run 1", "run 2"]
        assert counted["epochs_within"].tolist() == counts
    assert epochs_within(sweep, 0.15, threshold=1.0)["epochs_within"].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("supported", "refuted", "answer"),
    [(True, False, YES), (False, True, NO), (False, False, NOT_DECIDED), (True, True, NOT_DECIDED)],
)
def test_an_answer_needs_one_side(supported: bool, refuted: bool, answer: str) -> None:
    """What speaks for neither side, or for both, decides nothing."""
    assert decide(supported, refuted) == answer


CLEAR = np.linspace(0.1, 1.0, 30)
"""Thirty differences, all of them positive."""

DIFFERENCES = {
    "all positive": (CLEAR, YES),
    "mostly positive": (np.concatenate([CLEAR, -CLEAR[:3] / 10]), YES),
    "balanced": (np.concatenate([CLEAR, -CLEAR]), NOT_DECIDED),
    "few": (CLEAR[:4], NOT_DECIDED),
    "one": (CLEAR[:1], NOT_DECIDED),
    "none": (CLEAR[:0], NOT_DECIDED),
    "zeros": (np.zeros(30), NOT_DECIDED),
    "a few large ones and the median zero": (np.concatenate([CLEAR, np.zeros(40)]), NOT_DECIDED),
    "p just misses": (np.concatenate([np.full(14, 0.1), np.full(6, -0.2)]), NOT_DECIDED),
}


@pytest.mark.parametrize(("differences", "answer"), list(DIFFERENCES.values()), ids=list(DIFFERENCES))
@pytest.mark.parametrize("task", TASKS)
def test_the_answer_for_a_task(task: str, differences: NDArray[np.float64], answer: str) -> None:
    """Yes for clearly positive differences, the opposite with the models swapped, the rest open."""
    for sign, expected in ((1, answer), (-1, OPPOSITE[answer])):
        questions = questions_per_task(pairs_table(**{task: sign * differences}), "is it so?")
        assert [question.question for question in questions] == [f"{name}: is it so?" for name in TASKS]
        answers = {question.question.partition(":")[0]: question.answer for question in questions}
        assert answers == dict.fromkeys(TASKS, NOT_DECIDED) | {task: expected}
        (numbers,) = (question.numbers for question in questions if question.question.startswith(task))
        assert f"; {len(differences)} pairs, " in numbers


def test_the_level_of_significance_is_a_parameter() -> None:
    """Six positive differences have p = 0.03: enough for the level 0.05 and not for 0.01."""
    pairs = pairs_table(denoising=CLEAR[:6])
    assert questions_per_task(pairs, "so?")[0].answer == YES
    assert questions_per_task(pairs, "so?", level=0.01)[0].answer == NOT_DECIDED


def test_swapping_the_models_swaps_the_answers() -> None:
    """From runs to answers: what speaks for the DEQ speaks against it when the names are exchanged."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "task": task,
            "tau": float(i),
            "model": model,
            "test_loss": rng.uniform(0.2, 0.3) + shift * (model == "deq"),
        }
        for task, shift in zip(TASKS, (-0.1, 0.1, 0.0), strict=True)
        for i in range(20)
        for model in ("deq", "bilevel")
    ]
    runs = runs_table(*rows)
    answers = [question.answer for question in questions_per_task(paired(runs, "test_loss"), "so?")]
    assert answers == [YES, NO, NOT_DECIDED]
    again = [question.answer for question in questions_per_task(paired(swapped(runs), "test_loss"), "so?")]
    assert again == [OPPOSITE[answer] for answer in answers]


NOISES = (0.0, 0.05, 0.1, 0.5, 1.0)
PANELS = list(product(TASKS, NOISES))


def best_of_panels(wins: int, panels: int = len(PANELS)) -> pd.DataFrame:
    """Losses of both models in some panels, in the first ones of which the DEQ's is lower."""
    return best_table(
        {
            (task, noise, model): 0.2 + 0.01 * ((model == "deq") != (i < wins))
            for i, (task, noise) in enumerate(PANELS[:panels])
            for model in ("bilevel", "deq")
        }
    )


@pytest.mark.parametrize(
    ("wins", "panels", "answer"),
    [
        (15, 15, YES),
        (12, 15, YES),
        (11, 15, NOT_DECIDED),
        (8, 15, NOT_DECIDED),
        (7, 15, NOT_DECIDED),
        (4, 15, NOT_DECIDED),
        (3, 15, NO),
        (0, 15, NO),
        (6, 6, YES),
        (5, 5, NOT_DECIDED),
        (1, 1, NOT_DECIDED),
    ],
)
def test_the_answer_of_the_best_runs(wins: int, panels: int, answer: str) -> None:
    """A two-sided sign test over the panels decides, and with the models swapped it decides the opposite."""
    best = best_of_panels(wins, panels)
    first, _ = questions_of_best_runs(best)
    assert first.answer == answer
    assert first.numbers.startswith(f"in {wins} of {panels} panels; p = ")
    reverse, _ = questions_of_best_runs(swapped(best))
    assert reverse.answer == OPPOSITE[answer]
    assert reverse.numbers.startswith(f"in {panels - wins} of {panels} panels; p = ")


def test_a_panel_needs_both_models() -> None:
    """Panels with one model's best run only are not counted."""
    best = best_of_panels(15)
    one_sided = best[(best["model"] == "bilevel") | (best["noise"] > 0)]
    assert questions_of_best_runs(one_sided)[0].numbers.startswith("in 12 of 12 panels")
    assert questions_of_best_runs(best[best["model"] == "deq"])[0].answer == NOT_DECIDED


def best_over_noise(falling: int) -> pd.DataFrame:
    """Losses that rise with the noise, but in the first so many of the six cases of task and model."""
    cases = list(product(TASKS, ("bilevel", "deq")))
    return best_table(
        {
            (*place, model): 0.2 + 0.1 * noise * (-1 if i < falling and noise == 1.0 else 1)
            for i, (task, model) in enumerate(cases)
            for noise in NOISES
            for place in [(task, noise)]
        }
    )


@pytest.mark.parametrize(
    ("falling", "answer"), [(0, YES), (1, NOT_DECIDED), (2, NOT_DECIDED), (3, NO), (6, NO)]
)
def test_the_answer_about_the_noise(falling: int, answer: str) -> None:
    """One fall anywhere spoils a case; yes needs all cases, no half of them."""
    _, second = questions_of_best_runs(best_over_noise(falling))
    assert second.answer == answer
    assert second.numbers == f"in {6 - falling} of 6 cases"


def test_a_level_loss_does_not_rise() -> None:
    """Equal losses at two noise levels are no rise."""
    flat = best_table({("denoising", noise, "deq"): 0.2 for noise in NOISES})
    assert questions_of_best_runs(flat)[1].answer == NO


def test_nothing_decides_nothing() -> None:
    """No best runs, or one noise level only: both questions stay open where nothing speaks for a yes."""
    empty = best_runs(runs_table({"status": "diverged"}))
    assert [question.answer for question in questions_of_best_runs(empty)] == [NOT_DECIDED] * 2
    one_level = best_of_panels(15)
    one_level = one_level[one_level["noise"] == 0.1]
    assert [question.answer for question in questions_of_best_runs(one_level)] == [NOT_DECIDED] * 2


def test_answers_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """A line per question, its answer first and its numbers last, and each rule once."""
    questions = [
        Question("is it so?", YES, "3 pairs", "count"),
        Question("is it not?", NOT_DECIDED, "0 pairs", "count"),
        Question("was it?", NOT_DECIDED, "1 pair", "weigh"),
    ]
    print_answers(questions)
    assert capsys.readouterr().out.splitlines() == [
        "YES: is it so? 3 pairs",
        "NOT DECIDED AT THIS BUDGET: is it not? 0 pairs",
        "Rule: count",
        "NOT DECIDED AT THIS BUDGET: was it? 1 pair",
        "Rule: weigh",
    ]


def test_the_rule_names_the_level() -> None:
    """A question answered at another level says so."""
    assert "p is below 0.01" in questions_per_task(pairs_table(), "so?", level=0.01)[0].rule
    assert "p below 0.01" in questions_of_best_runs(best_of_panels(15), level=0.01)[0].rule


def test_the_committed_answers_are_those_of_the_committed_runs() -> None:
    """Figures 1 and 5: what stands in the reference and in the README follows from the table of the sweep."""
    runs = pd.read_parquet(REFERENCE / "sweep" / "runs.parquet")
    made = {
        "fig01": questions_per_task(paired(kept_runs(runs), "test_loss"), "so?"),
        "fig05": questions_of_best_runs(best_runs(runs)),
    }
    for name, questions in made.items():
        committed = json.loads((REFERENCE / name / "questions.json").read_bytes())
        found = [(question.answer, question.numbers, question.rule) for question in questions]
        assert found == [(known["answer"], known["numbers"], known["rule"]) for known in committed]


def sound_sweep() -> Sweep:
    """Four runs, one of them diverged and one not run, and their epochs."""
    runs = runs_table(
        {"test_loss": 0.2},
        {"model": "deq", "test_loss": 0.1},
        {"tau": 0.9, "status": "diverged", "test_loss": math.nan, "epochs_finished": 0},
        {"tau": 0.9, "model": "deq", "status": "not run", "test_loss": math.nan, "epochs_finished": 0},
    )
    rows = [("run 0", 0, 0.9), ("run 1", 2, 0.1), ("run 0", 2, 0.2), ("run 0", 1, 0.3), ("run 1", 0, 0.8)]
    return make_sweep(runs, pd.DataFrame(rows, columns=["key", "epoch", "test_loss"]))


def test_a_sound_sweep_passes_the_checks(capsys: pytest.CaptureFixture[str]) -> None:
    """Each check that holds is told in a line."""
    check_sweep(sound_sweep())
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_configuration_that_is_there_twice_is_noticed() -> None:
    """A duplicated row, or two runs under one key, are no sweep."""
    sweep = sound_sweep()
    twice = pd.concat([sweep.runs, sweep.runs.iloc[:1]], ignore_index=True)
    with pytest.raises(AssertionError):
        check_sweep(make_sweep(twice, sweep.epochs))
    same_key = sweep.runs.assign(key=["run 0", "run 0", "run 2", "run 3"])
    with pytest.raises(AssertionError):
        check_sweep(make_sweep(same_key, sweep.epochs))


@pytest.mark.parametrize("loss", [0.2000001, 0.3, math.nan])
def test_a_loss_that_is_not_the_last_epochs_is_noticed(loss: float) -> None:
    """The final loss of a run is that of its last epoch, to the bit."""
    sweep = sound_sweep()
    sweep.runs.loc[0, "test_loss"] = loss
    with pytest.raises(AssertionError):
        check_sweep(sweep)


def solved(**values: Any) -> dict[str, Any]:
    """A run whose solves converged, but for the values given."""
    return {f"{solve}_unconverged": 0.0 for solve in ("forward", "backward", "test")} | values


def test_a_few_solves_need_not_converge() -> None:
    """A share of one in twenty is too much, in whichever solve; what was never solved is no failure."""
    assert has_converged(runs_table(solved(), solved(forward_unconverged=math.nan)))
    assert has_converged(runs_table(solved(), solved(backward_unconverged=0.09)))
    assert not has_converged(runs_table(solved(), solved(backward_unconverged=0.1)))
    assert not has_converged(runs_table(solved(test_unconverged=1.0)))

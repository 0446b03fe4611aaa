"""Planted faults: tests and notebooks notice each of them, and pass without it.

A fault is one text of a source file replaced by another, in a copy of the repository. What must notice it is
one of the tests, or a notebook at the smoke profile, run in a process of its own. All of them run on a copy
without a fault too, so that none notices a fault by failing always.

The processes are forked from one that has imported torch and the like; none has imported anything of `lib`.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

PROCESSES = 2
"""At a time; each computes on one thread."""

IMPORTED = [
    "torch",
    "pandas",
    "matplotlib.pyplot",
    "scipy.stats",
    "pydantic",
    "IPython.display",
    "hypothesis",
]
"""Modules that the processes find imported."""


@dataclass(frozen=True)
class Fault:
    """A fault, and who notices it.

    Attributes:
        name: what is wrong.
        file: in `lib`, without its suffix.
        old: a text that occurs there once.
        new: what stands in its place.
        noticed: `test_file.py::test`, which may end with a parameter in brackets, or the name of a notebook.
    """

    name: str
    file: str
    old: str
    new: str
    noticed: str

    def plant(self, repository: Path) -> None:
        path = repository / "lib" / f"{self.file}.py"
        source = path.read_text(encoding="utf-8")
        found = source.count(self.old)
        assert found == 1, f"{self.name}: mend its entry, {path.name} has {found} times: {self.old}"
        path.write_text(source.replace(self.old, self.new), encoding="utf-8")


FAULTS = [
    # The operators and their adjoints.
    Fault(
        "the adjoint of the blur is one pixel off",
        "operators",
        "_filtered(v, self.transfer(v).conj())",
        "_filtered(v, self.transfer(v).conj()).roll(1, -1)",
        "test_operators.py::test_the_papers_operators_are_linear_with_exact_adjoints",
    ),
    Fault(
        "the blur is centred one pixel off",
        "operators",
        "(-(p // 2), -(q // 2))",
        "(-(p // 2), 1 - q // 2)",
        "test_operators.py::test_blur_is_the_circular_sum_over_its_kernel",
    ),
    Fault(
        "the adjoint of the blur is the blur",
        "operators",
        "self.transfer(v).conj()",
        "self.transfer(v)",
        "test_operators.py::test_any_operator_is_linear_with_an_exact_adjoint",
    ),
    Fault(
        "the adjoint of the mask lets lost pixels through",
        "operators",
        "return self.forward(v)",
        "return v",
        "test_operators.py::test_a_mask_is_an_orthogonal_projection",
    ),
    Fault(
        "the normal operator of the mask is the identity",
        "operators",
        "return self.forward(u)",
        "return u",
        "test_operators.py::test_any_operator_is_linear_with_an_exact_adjoint",
    ),
    Fault(
        "the normal operator of the blur is not squared",
        "operators",
        ".abs().square()",
        ".abs()",
        "test_operators.py::test_the_papers_operators_are_linear_with_exact_adjoints",
    ),
    # The models.
    Fault(
        "the DEQ's C is tied to A",
        "models",
        'return model == "deq"',
        "return False",
        "test_models.py::test_deq_with_free_weights_is_another_model",
    ),
    Fault(
        "the bilevel model's C is free",
        "models",
        'return model == "deq"',
        "return True",
        "test_theory.py::test_bilevel_learning_is_the_tied_equilibrium",
    ),
    Fault(
        "softshrink forgets the step tau",
        "regularizer",
        "return z - torch.clamp(z, -tau, tau)",
        "return z - torch.clamp(z, -0.5, 0.5)",
        "test_regularizer.py::test_activations_are_those_of_torch",
    ),
    Fault(
        "the products with the Jacobian take A for C",
        "regularizer",
        "return product(w.flatten(-3), (self.A if self.C is None else self.C).mT)",
        "return product(w.flatten(-3), self.A.mT)",
        "test_conv_model.py::test_products_with_the_dense_step_maps_jacobian_are_autograds",
    ),
    # Kernels.
    Fault(
        "the adjoint of a convolution has flipped kernels",
        "kernels",
        "_block_matrix(kernels).mT",
        "_block_matrix(kernels.flip(-2, -1)).mT",
        "test_kernels.py::test_synthesis_is_the_exact_adjoint",
    ),
    Fault(
        "the norm of the kernels is their smallest one",
        "kernels",
        "eigenvectors[..., None, :, -1]",
        "eigenvectors[..., None, :, 0]",
        "test_kernels.py::test_norm_is_the_largest_singular_value",
    ),
    Fault(
        "kernels are scaled by their norm on a patch",
        "regularizer",
        "torch.stack([direction] * sets, dim=-5)",
        "torch.stack([direction[..., :5, :5]] * sets, dim=-5)",
        "test_conv_model.py::test_kernels_are_scaled_to_the_norm_of_the_gradient",
    ),
    Fault(
        "the norm of the kernels is not measured again after a step",
        "experiments/trainer",
        "self.optimizer.step()\n        self.model.refresh()",
        "self.optimizer.step()",
        "test_faces.py::test_trained_kernels_keep_the_norm_of_the_gradient",
    ),
    # Solvers and implicit differentiation.
    Fault(
        "Anderson's weights do not sum to one",
        "solvers",
        "alpha = alpha / alpha.sum(-1, keepdim=True)",
        "alpha = alpha / alpha.abs().sum(-1, keepdim=True)",
        "test_solvers.py::test_anderson_takes_the_step_of_its_definition",
    ),
    Fault(
        "Anderson's ridge is absolute",
        "solvers",
        "gram / scale +",
        "gram +",
        "test_solvers.py::test_anderson_takes_the_step_of_its_definition",
    ),
    Fault(
        "a diverged solve has converged",
        "solvers",
        "(diverged, Status.DIVERGED)",
        "(diverged, Status.CONVERGED)",
        "test_solvers.py::test_an_expansion_diverges_at_the_step_its_growth_gives",
    ),
    Fault(
        "a sample stops with the first of its batch",
        "solvers",
        "running = running & ~converged & ~diverged",
        "running = running & ~converged.any() & ~diverged",
        "test_solvers.py::test_a_batch_solves_every_sample_as_if_alone",
    ),
    Fault(
        "the hypergradient lost a sign",
        "implicit",
        "transposed_jacobian()(w) + g",
        "transposed_jacobian()(w) - g",
        "test_implicit.py::test_adjoint_solve_is_the_transposed_linear_system",
    ),
    Fault(
        "the adjoint equation is not solved",
        "implicit",
        "ctx.solve_adjoint(cotangents[0].detach())",
        "cotangents[0].detach()",
        "test_implicit.py::test_gradient_is_that_of_finite_differences",
    ),
    Fault(
        "a recorded solve keeps the data that it was recorded with",
        "graphs",
        "buffer.copy_(value)",
        "buffer.copy_(buffer)",
        "test_graphs.py::test_a_replayed_solve_is_a_plain_one",
    ),
    Fault(
        "a recorded solve keeps the weights that it was recorded with",
        "graphs",
        "self.recordings.clear()\n            self.state",
        "self.state",
        "test_graphs.py::test_replaced_weights_are_not_forgotten",
    ),
    Fault(
        "a solve asks the device in every evaluation",
        "solvers",
        "yes if at_once(condition) and condition.all()",
        "yes if condition.all()",
        "test_graphs.py::test_between_the_looks_nothing_is_asked",
    ),
    Fault(
        "an image is left out while one of its stack runs",
        "solvers",
        "running.view(-1, self.shape[-4]).any(0)",
        "running.view(-1, self.shape[-4]).all(0)",
        "test_solvers.py::test_a_restricted_map_changes_nothing_but_the_work",
    ),
    Fault(
        "the preconditioner has the whole curvature of the experts",
        "models",
        "field.activation.steepest / 2 *",
        "field.activation.steepest *",
        "test_models.py::test_the_preconditioner_is_the_inverse_of_the_mean_curvature",
    ),
    Fault(
        "the preconditioner is never made again",
        "experiments/trainer",
        "step % PRECONDITIONER_AGE == 0",
        "self.step == 0",
        "test_trainer.py::test_a_preconditioner_is_of_the_weights_of_its_age",
    ),
    # Data and random numbers.
    Fault(
        "the training images are test images",
        "experiments/trainer",
        'loaded["train"].to(',
        'loaded["test"].to(',
        "test_trainer.py::test_the_training_loss_is_a_mean_over_images",
    ),
    Fault(
        "people of the test set are in the training set",
        "experiments/data",
        "people[:FACE_TRAIN_PEOPLE]",
        "people[1 : FACE_TRAIN_PEOPLE + 1]",
        "test_data.py::test_faces_are_split_by_person",
    ),
    Fault(
        "the training noise is drawn from the global state",
        "experiments/trainer",
        "torch.randn(batch.shape, generator=draws)",
        "torch.randn(batch.shape)",
        "test_trainer.py::test_training_is_repeatable_and_leaves_the_global_generator_alone",
    ),
    Fault(
        "the test noise is drawn from the global state",
        "experiments/problem",
        'torch.randn(shape, generator=generator(config.seed, "test noise"))',
        "torch.randn(shape)",
        "test_trainer.py::test_training_is_repeatable_and_leaves_the_global_generator_alone",
    ),
    Fault(
        "the noise is added before the operator",
        "experiments/problem",
        "operator.forward(images) + noise[..., None, None, None, None] * n",
        "operator.forward(images + noise[..., None, None, None, None] * n)",
        "test_inpainting.py::test_the_data_are_the_masked_images_and_noise",
    ),
    Fault(
        "the seed is ignored",
        "experiments/problem",
        "for part in (seed, *purpose)",
        "for part in purpose",
        "test_trainer.py::test_another_seed_is_another_training",
    ),
    # Training.
    Fault(
        "the learning rate does not fall to its end",
        "experiments/trainer",
        "math.cos(math.pi * passed)",
        "math.cos(passed)",
        "test_trainer.py::test_learning_rate_is_a_cosine_between_its_ends",
    ),
    Fault(
        "the schedule goes by epochs",
        "experiments/trainer",
        "learning_rate(self.config, self.step, total_steps(self.config))",
        "learning_rate(self.config, self.epoch, self.config.epochs)",
        "test_trainer.py::test_each_step_is_taken_with_its_learning_rate",
    ),
    Fault(
        "a diverged training has completed",
        "experiments/trainer",
        '"completed", "diverged", "out of time"',
        '"completed", "completed", "out of time"',
        "test_trainer.py::test_a_stack_of_diverging_members_ends",
    ),
    # The store.
    Fault(
        "runs of other code are loaded",
        "experiments/runs",
        "for file in RESULT_FILES:",
        "for file in ():",
        "test_runs.py::test_the_key_depends_on_the_code",
    ),
    Fault(
        "the last epoch is not kept when a training is stopped",
        "experiments/processes",
        "        act()\n        raise",
        "        raise",
        "test_runs.py::test_checkpoints_are_written_once_a_minute_and_at_the_end",
    ),
    Fault(
        "the key does not know the code",
        "experiments/runs",
        'data_digests(config), "code": code or code_version()}',
        "data_digests(config)}",
        "test_runs.py::test_the_key_depends_on_the_code",
    ),
    Fault(
        "the run of another configuration is loaded",
        "experiments/runs",
        'record["config"] != config.model_dump()',
        'record["config"] is None',
        "test_runs.py::test_a_record_of_another_configuration_is_noticed",
    ),
    Fault(
        "weights of another run are loaded",
        "experiments/runs",
        'record["weights"] != hashlib.sha256(content).hexdigest()',
        'record["weights"] is None',
        "test_runs.py::test_weights_of_another_run_are_noticed",
    ),
    # The sweep, its statistics and its figures.
    Fault(
        "the final test loss is the lowest one",
        "experiments/sweep",
        "row |= {name: metrics[name] for name in metrics",
        "row |= {name: min(metrics[name], row.get(name, metrics[name])) for name in metrics",
        "test_sweep.py::test_a_row_has_the_last_epochs_numbers",
    ),
    Fault(
        "diverged runs are kept",
        "figures/comparison",
        'runs["status"] == DIVERGED',
        'runs["status"] == NOT_RUN',
        "test_comparison.py::test_the_outcome_of_a_run",
    ),
    Fault(
        "the threshold of the losses is ignored",
        "figures/comparison",
        'runs["test_loss"] <= threshold',
        'runs["test_loss"] <= LOSS_THRESHOLD',
        "test_comparison.py::test_the_threshold_is_a_parameter",
    ),
    Fault(
        "the counts under the boxes ignore the threshold",
        "figures/grid",
        "comparison.outcome_table(sweep.runs, threshold)",
        "comparison.outcome_table(sweep.runs)",
        "test_figures.py::test_the_losses_are_counted_under_their_boxes",
    ),
    Fault(
        "the boxes of the models are swapped",
        "figures/grid",
        '(kept["model"] == model)',
        '(kept["model"] != model)',
        "test_figures.py::test_the_boxes_are_of_the_kept_runs",
    ),
    Fault(
        "the paired differences have the models swapped",
        "figures/comparison",
        'pairs["bilevel"] - pairs["deq"]',
        'pairs["deq"] - pairs["bilevel"]',
        "test_comparison.py::test_pairs_are_one_configuration_of_both_models",
    ),
    Fault(
        "the reconstructions of the models are swapped in the picture",
        "figures/reconstructions",
        "result.outputs[model]",
        "result.outputs[models[models.index(model) - 1]]",
        "test_figures.py::test_reconstructions_stand_in_the_column_of_their_model",
    ),
    Fault(
        "the titles of the models are swapped in the picture",
        "figures/reconstructions",
        "after = result.table.loc[model]",
        "after = result.table.loc[models[models.index(model) - 1]]",
        "test_figures.py::test_reconstructions_stand_in_the_column_of_their_model",
    ),
    Fault(
        "models are reconstructed with each other's weights",
        "figures/reconstructions",
        "model = run.model(stacked=True)",
        "model = list(runs.values())[-1].model(stacked=True)",
        "fig02",
    ),
]


@dataclass(frozen=True)
class Trial:
    """Tests, or one notebook, that are run on a copy of the repository with one fault or with none."""

    fault: Fault | None
    selection: tuple[str, ...]

    def __str__(self) -> str:
        return self.fault.name if self.fault else f"no fault, {self.selection[0].partition('::')[0]}"

    def run(self, folder: Path) -> str:
        """Whether what was run `passed`, or `failed` by an assertion, and else all that was printed."""
        # With what is compiled of them, but not with what another process is about to compile.
        for name in ("lib", "tests"):
            shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("*.pyc.*"))
        shutil.copy(REPOSITORY / "pyproject.toml", folder)
        # These are only read.
        for name in ("data", "nbs"):
            (folder / name).symlink_to(REPOSITORY / name)
        if self.fault is not None:
            self.fault.plant(folder)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ |= {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        with (folder / "said").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.stdout = sys.stderr = said
            if is_notebook(self.selection[0]):
                from lib.pages import notebooks

                status = notebooks.main(["run", *self.selection, "--profile", "smoke"])
            else:
                options = ["-o", "addopts=", "-x", "-q", "--tb=line", "--hypothesis-profile=unshrunk"]
                for plugin in ("no:cacheprovider", "pytest_timeout", "_hypothesis_pytestplugin"):
                    options += ["-p", plugin]
                status = int(pytest.main([*options, *(f"tests/{test}" for test in self.selection)]))
        text = (folder / "said").read_text()
        if status == 0:
            return "passed"
        asserted = re.search(r"AssertionError|: assert |DID NOT RAISE", text)
        return "failed" if status == 1 and asserted else text


def is_notebook(selection: str) -> bool:
    return "::" not in selection


SELECTIONS = {fault.noticed: None for fault in FAULTS}
FAULTY = [Trial(fault, (fault.noticed,)) for fault in FAULTS]
FAULTLESS = [Trial(None, tuple(name for name in SELECTIONS if not is_notebook(name)))]
FAULTLESS += [Trial(None, (name,)) for name in SELECTIONS if is_notebook(name)]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Trial, Future[str]]]:
    """The outcome of each trial that was asked for, as soon as it is there."""
    from lib.experiments.data import faces, mnist

    mnist("test", 1)
    faces("test", 1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(PROCESSES, context, max_tasks_per_child=1)
        yield {
            trial: pool.submit(trial.run, tmp_path_factory.mktemp("copy"))
            for item in request.session.items
            if isinstance(item, pytest.Function) and item.parent is request.node
            for trial in item.callspec.params.values()
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("trial", FAULTLESS, ids=str)
def test_without_a_fault_all_pass(trial: Trial, outcomes: dict[Trial, Future[str]]) -> None:
    """The tests and notebooks that notice the faults, on a copy with none."""
    assert outcomes[trial].result() == "passed"


@pytest.mark.parametrize("trial", FAULTY, ids=str)
def test_a_fault_is_noticed(trial: Trial, outcomes: dict[Trial, Future[str]]) -> None:
    """By an assertion, not by code that cannot run."""
    assert outcomes[trial].result() == "failed"

"""Hypergradients against finite differences, unrolled iterations, dense algebra and TorchDEQ."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torchdeq import get_deq

from lib.implicit import implicit_fixed_point
from lib.models import MODELS, FixedPointModel, build_model
from lib.operators import TASKS, forward_operator
from lib.regularizer import ACTIVATIONS
from lib.solvers import (
    Anderson,
    FixedPointProblem,
    PlainIteration,
    Solution,
    Solver,
    Status,
    StepMap,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE, BATCH = 6, 2
TAU, LAM, GAMMA = 0.5, 2.0, 1.0
ANDERSON, PLAIN = Anderson(tol=1e-12, max_steps=2000), PlainIteration(tol=1e-12, max_steps=2000)
EVERY_MODEL = pytest.mark.parametrize(
    ("model", "task", "activation"), list(itertools.product(MODELS, TASKS, ACTIVATIONS))
)

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A small training problem whose step map contracts; `leaves` are what a gradient may be taken of.

    Attributes:
        model, task, activation: which model, operator and `sigma`.
        leaves: weights `A`, `b`, for a DEQ `C`, and the data `f`; all may have a leading stack dimension.
        truth: the images to compare with.
    """

    model: str
    task: str
    activation: str
    leaves: dict[str, Tensor]
    truth: Tensor

    def build(self, leaves: dict[str, Tensor]) -> tuple[FixedPointModel, Tensor]:
        """The model with these leaves, and the data as a leaf."""
        A, b, C = leaves["A"], leaves["b"], leaves.get("C", leaves["A"])
        operator = forward_operator(self.task, SIDE, SIDE)
        model = build_model(self.model, operator, (A, b, C), self.activation, tau=TAU, lam=LAM, gamma=GAMMA)
        return model, leaves["f"].clone().requires_grad_()

    def loss(self, u: Tensor) -> Tensor:
        return (u - self.truth).square().mean((-4, -3, -2, -1))

    def gradients(self, model: FixedPointModel, f: Tensor, loss: Tensor) -> Gradients:
        leaves = dict(model.regularizer.named_parameters()) | {"f": f}
        assert leaves.keys() == self.leaves.keys()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def implicit_gradients(self, solver: Solver) -> Gradients:
        model, f = self.build(self.leaves)
        adjoints: list[Solution] = []
        u0 = torch.zeros_like(f)
        solution = implicit_fixed_point(model.step_map(f), u0, solver, on_adjoint=adjoints.append)
        gradients = self.gradients(model, f, self.loss(solution.value))
        for solve in (solution, *adjoints):
            assert solve.status.eq(Status.CONVERGED).all()
        assert len(adjoints) == 1
        return gradients


@pytest.fixture
def make_problem(near_orthogonal: Callable[[int], tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Problem]:
    """Makes the `Problem` of a model, a task and an activation, with noisy data."""

    def make(model: str, task: str, activation: str) -> Problem:
        A, b, C = near_orthogonal(SIDE**2)
        generator = torch.Generator().manual_seed(2)
        truth, noise = torch.randn(2, BATCH, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
        f = forward_operator(task, SIDE, SIDE).forward(truth) + 0.1 * noise
        leaves = {"A": A, "b": b, "C": C, "f": f}
        if model == "bilevel":
            del leaves["C"]
        return Problem(model, task, activation, leaves, truth)

    return make


def assert_same_gradients(actual: Gradients, expected: Gradients, rtol: float) -> None:
    """Every gradient is right in norm, up to `rtol`, and none is zero."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-6, name
        assert (actual[name] - gradient).norm() <= rtol * gradient.norm(), name


def active_pieces(model: FixedPointModel, u: Tensor) -> Tensor:
    """Which linear piece of `sigma` every expert of `u` is on; the identity has one."""
    if model.regularizer.activation is ACTIVATIONS["identity"]:
        return torch.zeros(1)
    return model.regularizer.activation.sigma(model.regularizer.analysis(u), model.tau).sign()


@EVERY_MODEL
def test_gradient_is_that_of_finite_differences(
    make_problem: Callable[..., Problem], model: str, task: str, activation: str
) -> None:
    """Central differences of the loss in random directions of `A`, `b`, `C` and `f`, away from all kinks.

    The models of all directions and both signs are one stack, solved together.
    """
    problem = make_problem(model, task, activation)
    gradients = problem.implicit_gradients(ANDERSON)
    per_leaf, h = 3, 1e-5
    generator = torch.Generator().manual_seed(3)
    directions: list[tuple[str, Tensor]] = []
    for name in [name for name in problem.leaves for _ in range(per_leaf)]:
        direction = torch.randn(problem.leaves[name].shape, generator=generator, dtype=torch.float64)
        directions.append((name, direction / direction.norm()))
    stack = {
        name: leaf.expand(2 * len(directions) + 1, *leaf.shape).clone()
        for name, leaf in problem.leaves.items()
    }
    for i, (name, direction) in enumerate(directions):
        stack[name][2 * i] += h * direction
        stack[name][2 * i + 1] -= h * direction
    models, f = problem.build(stack)
    solution = fixed_point(models.step_map(f), torch.zeros_like(f), Anderson(tol=1e-13, max_steps=2000))
    assert solution.status.eq(Status.CONVERGED).all()
    pieces = active_pieces(models, solution.value)
    assert torch.equal(pieces, pieces[-1:].expand_as(pieces))
    assert pieces.unique().numel() > 1 or activation == "identity"
    *losses, _ = problem.loss(solution.value).tolist()
    for (name, direction), up, down in zip(directions, losses[::2], losses[1::2], strict=True):
        derivative = (gradients[name] * direction).sum().item()
        assert (up - down) / (2 * h) == pytest.approx(derivative, rel=1e-5, abs=1e-8), name


@EVERY_MODEL
def test_gradient_is_that_of_the_unrolled_iteration(
    make_problem: Callable[..., Problem], model: str, task: str, activation: str
) -> None:
    """Backpropagation through 2,000 plain steps, which have converged, gives the gradient of both solvers."""
    problem = make_problem(model, task, activation)
    built, f = problem.build(problem.leaves)
    T = built.step_map(f)
    u = torch.zeros_like(f)
    for _ in range(2000):
        u = T(u)
    assert (T(u) - u).norm() <= 1e-13 * u.norm()
    # What early steps contribute decays into denormal numbers, which are slow.
    torch.set_flush_denormal(True)
    try:
        unrolled = problem.gradients(built, f, problem.loss(u))
    finally:
        torch.set_flush_denormal(False)
    for solver in (PLAIN, ANDERSON):
        assert_same_gradients(problem.implicit_gradients(solver), unrolled, rtol=1e-8)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("task", TASKS)
def test_adjoint_solve_is_the_transposed_linear_system(
    make_problem: Callable[..., Problem], task: str, model: str
) -> None:
    """`w` solves `(I - J)^T w = dL/du` with the dense Jacobian `J`, and its report says how well."""
    problem = make_problem(model, task, "relu")
    built, f = problem.build(problem.leaves)
    T = built.step_map(f)
    adjoints: list[Solution] = []
    points: list[Tensor] = []

    def vjp(u: Tensor) -> StepMap:
        transposed_jacobian = built.vjp(u)

        def recorded(w: Tensor) -> Tensor:
            points.append(w.clone())
            return transposed_jacobian(w)

        return recorded

    solution = implicit_fixed_point(
        FixedPointProblem(T, vjp), torch.zeros_like(f), PLAIN, ANDERSON, adjoints.append
    )
    assert not adjoints
    problem.loss(solution.value).backward()
    (adjoint,) = adjoints
    u = solution.value.detach()
    J = jacobian(T, u).view(u.numel(), u.numel())
    g = 2 * (u - problem.truth) / u.numel()
    w = torch.linalg.solve((torch.eye(u.numel()) - J).T, g.flatten()).view_as(g)
    torch.testing.assert_close(adjoint.value, w, rtol=1e-8, atol=1e-10)
    residual = (adjoint.value - points[-1]).flatten(1).norm(dim=1) / adjoint.value.flatten(1).norm(dim=1)
    assert adjoint.status.eq(Status.CONVERGED).all()
    assert adjoint.residual.le(ANDERSON.tol).all()
    torch.testing.assert_close(adjoint.residual, residual, rtol=0.1, atol=1e-14)


def test_adjoint_solve_reports_when_it_did_not_converge(make_problem: Callable[..., Problem]) -> None:
    """With three steps allowed the report says three steps, not converged and the residual reached."""
    problem = make_problem("deq", "inpainting", "relu")
    built, f = problem.build(problem.leaves)
    adjoints: list[Solution] = []
    few = PlainIteration(tol=1e-12, max_steps=3)
    solution = implicit_fixed_point(built.step_map(f), torch.zeros_like(f), PLAIN, few, adjoints.append)
    problem.loss(solution.value).backward()
    (adjoint,) = adjoints
    assert solution.status.eq(Status.CONVERGED).all()
    assert adjoint.status.eq(Status.MAX_STEPS).all()
    assert adjoint.steps.eq(3).all()
    assert adjoint.residual.gt(1e-12).all()


def test_divergent_adjoint_is_a_status() -> None:
    """At the fixed point of an expansion the adjoint equation diverges: reported, not raised."""
    theta = torch.tensor([[[[1.0, 2.0]]]], dtype=torch.float64, requires_grad=True)
    adjoints: list[Solution] = []
    solution = implicit_fixed_point(
        lambda u: 3 * u + theta, -theta.detach() / 2, PLAIN, on_adjoint=adjoints.append
    )
    solution.value.sum().backward()
    assert solution.status.item() == Status.CONVERGED
    assert adjoints[0].status.item() == Status.DIVERGED


@pytest.mark.parametrize("solver", [PlainIteration(1e-2, 20), Anderson(1e-2, 20)], ids=["plain", "anderson"])
def test_value_is_the_solvers_iterate(make_problem: Callable[..., Problem], solver: Solver) -> None:
    """The differentiable solution is the solver's own, to the last bit; without gradients it records none."""
    problem = make_problem("deq", "deblurring", "softshrink")
    built, f = problem.build(problem.leaves)
    T, u0 = built.step_map(f), torch.zeros_like(f)
    expected = fixed_point(T, u0, solver)
    solution = implicit_fixed_point(T, u0, solver)
    assert torch.equal(solution.value, expected.value)
    assert torch.equal(solution.residual, expected.residual)
    assert solution.value.requires_grad
    with torch.no_grad():
        assert not implicit_fixed_point(T, u0, solver).value.requires_grad


@pytest.mark.parametrize("model", MODELS)
def test_members_of_a_stack_receive_their_own_gradients(
    make_problem: Callable[..., Problem], model: str
) -> None:
    """The gradient of a sum of losses over a stack is each member's alone, even beside one that diverges."""
    problem = make_problem(model, "deblurring", "softshrink")
    tau = torch.tensor([0.5, 0.3, 50.0], dtype=torch.float64)
    gamma = torch.tensor([1.0, 0.7, 1.0], dtype=torch.float64)

    def solved(leaves: dict[str, Tensor], tau: Tensor, gamma: Tensor) -> tuple[Gradients, Tensor]:
        built, f = problem.build(leaves)
        built.tau, built.gamma = tau, gamma
        solution = implicit_fixed_point(built.step_map(f), torch.zeros_like(f), ANDERSON)
        losses = problem.loss(solution.value)
        kept = losses[:2].sum() if losses.dim() else losses
        return problem.gradients(built, f, kept), solution.status

    together, status = solved({k: v.expand(3, *v.shape) for k, v in problem.leaves.items()}, tau, gamma)
    assert status[:2].eq(Status.CONVERGED).all()
    assert status[2].ne(Status.CONVERGED).all()
    for i in range(2):
        alone, _ = solved(problem.leaves, tau[i], gamma[i])
        assert_same_gradients({name: g[i] for name, g in together.items()}, alone, rtol=1e-8)


def saved_for_backward(run: Callable[[], object]) -> tuple[int, int]:
    """How many tensors, and how many bytes, `run` leaves behind for a backward pass."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return len(sizes), sum(sizes)


@pytest.mark.parametrize("make_solver", [PlainIteration, Anderson])
def test_memory_does_not_grow_with_the_steps(
    make_problem: Callable[..., Problem], make_solver: Callable[[float, int], Solver]
) -> None:
    """Ten steps or two hundred leave the same tensors for the backward pass; unrolling leaves all of them."""
    problem = make_problem("deq", "inpainting", "relu")
    built, f = problem.build(problem.leaves)
    T, u0 = built.step_map(f), torch.zeros_like(f)

    def implicit(steps: int) -> None:
        solution = implicit_fixed_point(T, u0, make_solver(1e-300, steps))
        assert solution.steps.eq(steps).all()

    def unrolled(steps: int) -> None:
        u = u0
        for _ in range(steps):
            u = T(u)

    one_step = saved_for_backward(lambda: unrolled(1))
    few, many = saved_for_backward(lambda: implicit(10)), saved_for_backward(lambda: implicit(200))
    assert 0 < few[0] == many[0] <= 2 * one_step[0]
    assert few[1] == many[1]
    assert saved_for_backward(lambda: unrolled(200))[1] > 100 * one_step[1]


def test_graph_is_freed_without_the_garbage_collector(make_problem: Callable[..., Problem]) -> None:
    """No cycle of references keeps a solution's graph alive once nobody holds the solution."""
    problem = make_problem("deq", "denoising", "relu")
    built, f = problem.build(problem.leaves)
    step_map = built.step_map(f)
    evaluations: list[weakref.ref[Tensor]] = []

    def T(u: Tensor) -> Tensor:
        step = step_map(u)
        evaluations.append(weakref.ref(step))
        return step

    gc.disable()
    try:
        solution = implicit_fixed_point(T, torch.zeros_like(f), ANDERSON)
        problem.loss(solution.value).backward()
        assert evaluations[-1]() is not None
        del solution
        assert evaluations[-1]() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")  # of torch itself, where forward mode begins
def test_what_cannot_be_differentiated_is_refused() -> None:
    """Derivatives of derivatives, in forward mode and through torch.func: never a number that is wrong."""

    def solved(t: Tensor) -> Tensor:
        u0 = torch.zeros(1, 1, 1, dtype=torch.float64)
        return implicit_fixed_point(lambda u: 0.5 * u.tanh() + t.square(), u0, ANDERSON).value.sum()

    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(solved(t), t, create_graph=True)
    h = 1e-6
    assert first.item() == pytest.approx(((solved(t + h) - solved(t - h)) / (2 * h)).item(), rel=1e-8)
    with pytest.raises(RuntimeError, match="got a second derivative"):
        torch.autograd.grad(first, t)
    with pytest.raises(RuntimeError, match="got a second derivative"):
        torch.autograd.functional.hessian(solved, t.detach())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        solved(forward_ad.make_dual(t.detach(), torch.ones_like(t.detach())))
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError):
            transform(solved)(t.detach().expand(2) if transform is torch.func.vmap else t.detach())


@pytest.mark.parametrize(("solver", "hook"), [("fixed_point_iter", True), ("anderson", False)])
@pytest.mark.parametrize("task", TASKS)
def test_gradient_agrees_with_torchdeq(
    make_problem: Callable[..., Problem], task: str, solver: str, hook: bool
) -> None:
    """TorchDEQ differentiates the same step map, by a hook or a function of its own, to the same gradient."""
    problem = make_problem("deq", task, "relu")
    built, f = problem.build(problem.leaves)
    deq = get_deq(
        f_solver=solver,
        b_solver=solver,
        f_max_iter=2000,
        b_max_iter=2000,
        f_tol=1e-8,
        b_tol=1e-8,
        f_stop_mode="rel",
        b_stop_mode="rel",
        ift=not hook,
        hook_ift=hook,
    )
    values, info = deq(built.step_map(f), torch.zeros_like(f))
    assert info["rel_lowest"].le(1e-8).all()
    theirs = problem.gradients(built, f, problem.loss(values[-1]))
    assert_same_gradients(problem.implicit_gradients(ANDERSON), theirs, rtol=1e-5)

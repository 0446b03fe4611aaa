"""Small problems for the tests of the mathematics: random tensors, operators, and models that contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lib.implicit import NeumannSeries, implicit_fixed_point
from lib.models import FixedPointModel
from lib.operators import CircularBlur, Identity, Mask, Operator, central_block_mask, diagonal_motion_kernel
from lib.regularizer import (
    GRADIENT_NORM,
    LINEAR,
    RELU,
    SOFTSHRINK,
    Activation,
    ConvFieldsOfExperts,
    DenseFieldsOfExperts,
    FieldsOfExperts,
    smoothed_sign,
)
from lib.solvers import Anderson, PlainIteration, Solution, Solver, Status

HEIGHT, WIDTH, BATCH = 6, 7, 2
PIXELS = HEIGHT * WIDTH
SHARPNESS = 5.0
ANDERSON, PLAIN = Anderson(tol=1e-12, max_steps=3000), PlainIteration(tol=1e-12, max_steps=5000)

Gradients = dict[str, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Projections:
    """A dense operator of norm 1 from images `(1, H, W)` to data of another shape, `(2, 3, 5)`."""

    def __init__(self) -> None:
        M = normal(30, PIXELS, seed=7)
        self.matrix = M / torch.linalg.matrix_norm(M, 2)

    def forward(self, u: Tensor) -> Tensor:
        return (u.flatten(-3) @ self.matrix.T).unflatten(-1, (2, 3, 5))

    def adjoint(self, v: Tensor) -> Tensor:
        return (v.flatten(-3) @ self.matrix).unflatten(-1, (1, HEIGHT, WIDTH))

    def normal(self, u: Tensor) -> Tensor:
        return self.adjoint(self.forward(u))


OPERATORS: dict[str, Callable[[], Operator]] = {
    "identity": Identity,
    "mask": lambda: Mask(central_block_mask(HEIGHT, WIDTH)),
    "blur": lambda: CircularBlur(diagonal_motion_kernel(3)),
    "projections": Projections,
}

DENSE: dict[str, Activation] = {"relu": RELU, "softshrink": SOFTSHRINK, "linear": LINEAR}
KINDS = (*DENSE, "kernels")


def matrix_of(operator: Operator) -> Tensor:
    """Return an operator as a matrix, whose columns are the data of the unit vectors."""
    units = torch.eye(PIXELS, dtype=torch.float64).view(PIXELS, 1, HEIGHT, WIDTH)
    return operator.forward(units).flatten(1).T


def image_norm(kernels: Tensor, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """Return the norm of one set of kernels `(F, k, k)` on images of this size, by the dense matrix."""
    basis = torch.eye(height * width, dtype=kernels.dtype).view(-1, 1, height, width)
    dense = functional.conv2d(basis, kernels[:, None], padding=kernels.shape[-1] // 2)
    return torch.linalg.svdvals(dense.flatten(1))[0]


def make_field(kind: str, leaves: dict[str, Tensor]) -> FieldsOfExperts:
    """Return the field with these weights, `A`, `b` if it is dense, and `C` if it is free."""
    weights = {name: leaf.clone() for name, leaf in leaves.items()}
    if kind == "kernels":
        return ConvFieldsOfExperts(weights["A"], weights.get("C"), smoothed_sign(SHARPNESS))
    return DenseFieldsOfExperts(weights["A"], weights["b"], weights.get("C"), DENSE[kind])


@dataclass(frozen=True)
class Problem:
    """A small training problem whose step map contracts.

    Attributes:
        kind: regularizer, one of `KINDS`.
        leaves: weights `A`, `b` of dense kinds, `C` of a DEQ, and the data `f`; a stack dimension may lead.
        numbers: `tau`, `lam` and `gamma`.
    """

    kind: str
    operator: Operator
    leaves: dict[str, Tensor]
    truth: Tensor
    numbers: dict[str, Any]

    def build(self, leaves: dict[str, Tensor] | None = None) -> tuple[FixedPointModel, Tensor]:
        """Return the model, and the data as a leaf."""
        leaves = leaves or self.leaves
        weights = {name: leaf for name, leaf in leaves.items() if name != "f"}
        model = FixedPointModel(self.operator, make_field(self.kind, weights), **self.numbers)
        return model, leaves["f"].clone().requires_grad_()

    def start(self, f: Tensor) -> Tensor:
        return torch.zeros_like(self.operator.adjoint(f))

    def loss(self, u: Tensor) -> Tensor:
        return (u - self.truth).square().mean((-4, -3, -2, -1))

    def gradients(self, model: FixedPointModel, f: Tensor, loss: Tensor) -> Gradients:
        leaves = dict(model.regularizer.named_parameters()) | {"f": f}
        assert leaves.keys() == self.leaves.keys()
        return dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True))

    def implicit_gradients(
        self,
        solver: Solver = ANDERSON,
        adjoint: Solver | NeumannSeries | None = None,
        P: Tensor | None = None,
        **changes: Any,
    ) -> tuple[Gradients, Solution, Solution]:
        """Return the gradients of the loss and both solutions; `changes` are to the `FixedPointProblem`."""
        model, f = self.build()
        adjoints: list[Solution] = []
        problem = replace(model.problem(f, P), **changes)
        solution = implicit_fixed_point(problem, self.start(f), solver, adjoint, adjoints.append)
        gradients = self.gradients(model, f, self.loss(solution.value))
        assert len(adjoints) == 1
        return gradients, solution, adjoints[0]


def make_problem(kind: str, operator: str, tied: bool, same: bool = False) -> Problem:
    """Return the problem of a regularizer and an operator; a free `C` is near `A`, or equal if `same`.

    Dense `A` are nearly orthogonal with positive biases, so that most experts are active and the step maps
    contract on pixels that the data do not contain. Kernels have the norm of the gradient.
    """
    K = OPERATORS[operator]()
    truth = normal(BATCH, 1, HEIGHT, WIDTH, seed=2)
    if kind == "kernels":
        A = normal(3, 3, 3, seed=3)
        A *= GRADIENT_NORM / image_norm(A)
        C = A + 0.1 * A.std() * normal(*A.shape, seed=1)
        leaves = {"A": A, "C": C * GRADIENT_NORM / image_norm(C)}
        truth, noise = 0.3 * truth, 0.1
        numbers = {"tau": 1 / (4 + SHARPNESS * 2.73**2), "lam": 4.0, "gamma": 1.0}
    else:
        rotation, first, second = normal(3, PIXELS, PIXELS, seed=1)
        A = torch.linalg.qr(rotation)[0] + 0.1 * PIXELS**-0.5 * first
        leaves = {"A": A, "b": 1 + normal(PIXELS, seed=4), "C": A + 0.1 * PIXELS**-0.5 * second}
        noise, numbers = 0.1, {"tau": 0.5, "lam": 2.0, "gamma": 0.8}
    if same:
        leaves["C"] = A.clone()
    if tied:
        del leaves["C"]
    data = K.forward(truth)
    leaves["f"] = data + noise * normal(*data.shape, seed=5)
    return Problem(kind, K, leaves, truth, numbers)


def expand(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return a stack of `count` copies of tensors."""
    return {name: tensor.expand(count, *tensor.shape).clone() for name, tensor in tensors.items()}


def assert_converged(*solutions: Solution) -> None:
    for solution in solutions:
        assert solution.status.eq(Status.CONVERGED).all()


def assert_same_gradients(actual: Gradients, expected: Gradients, rtol: float) -> None:
    """Check that each gradient is right in norm, up to `rtol`, and not zero."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-6, name
        assert (actual[name] - gradient).norm() <= rtol * gradient.norm(), name


def assert_differences(
    gradients: Gradients,
    tensors: dict[str, Tensor],
    losses: Callable[[dict[str, Tensor]], Tensor],
    tolerance: float = 1e-5,
) -> None:
    """Compare gradients with central differences of the loss.

    Each tensor is moved by `1e-5` in a random direction with a component along its gradient. Points of all
    tensors and both signs are one stack, of which `losses` returns the losses.
    """
    h, directions, points = 1e-5, {}, expand(tensors, 2 * len(gradients))
    for i, (name, gradient) in enumerate(gradients.items()):
        across = normal(*gradient.shape, seed=20 + i)
        direction = gradient / gradient.norm() + across / across.norm()
        directions[name] = direction / direction.norm()
        points[name][2 * i] += h * directions[name]
        points[name][2 * i + 1] -= h * directions[name]
    values = losses(points).tolist()
    for i, (name, gradient) in enumerate(gradients.items()):
        difference = (values[2 * i] - values[2 * i + 1]) / (2 * h)
        derivative = (gradient * directions[name]).sum().item()
        assert abs(difference - derivative) <= tolerance * gradient.norm().item(), name

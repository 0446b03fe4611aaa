"""The special case: bilevel learning is a deep equilibrium model whose two sets of weights are tied.

Everything here is dense and exact, for images of some hundred pixels in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.experiments.data import faces
from lib.experiments.profiles import FILTERS
from lib.experiments.runs import trained_kernels
from lib.figures.style import MODEL_COLORS, MODEL_NAMES, STYLE
from lib.implicit import implicit_fixed_point
from lib.models import FixedPointModel
from lib.operators import Identity
from lib.regularizer import GRADIENT_NORM, ConvFieldsOfExperts, smoothed_sign
from lib.solvers import Solver
from lib.training import generator


@dataclass(frozen=True)
class SmallProblem:
    """Denoising of one small image in float64.

    Attributes:
        tied: the bilevel model with kernels `A`.
        free: the DEQ with `C = A`, a parameter of its own.
        other: other random kernels `(F, k, k)` of the same norm.
        f, truth: data and true image, `(1, 1, H, W)`.
    """

    tied: FixedPointModel
    free: FixedPointModel
    other: Tensor
    f: Tensor
    truth: Tensor


def small_problem(
    height: int,
    width: int,
    filters: int,
    filter_size: int,
    sharpness: float,
    lam: float,
    noise: float,
    seed: int,
) -> SmallProblem:
    """Random kernels, scaled so that plain iteration contracts, and a noisy piece of a face.

    Args:
        height, width: of the piece in pixels.
        filters, filter_size: number and side of the kernels.
        sharpness, lam, noise: as in `lib.experiments.config.FacesConfig`.
        seed: of the kernels and the noise.
    """
    draws = generator(seed, "small problem")
    shape = (filters, filter_size, filter_size)
    A, other = (
        kernels * (GRADIENT_NORM / torch.linalg.vector_norm(kernels) / filter_size)
        for kernels in (torch.randn(shape, generator=draws).double() for _ in range(2))
    )
    truth = faces("test", 1)[..., 40 : 40 + height, 30 : 30 + width].double()
    f = truth + noise * torch.randn(truth.shape, generator=draws, dtype=torch.float64)
    # The sum of the moduli of all entries bounds the norm of each kernel's convolution.
    bound = A.abs().sum((-2, -1)).square().sum().item()
    tau, sigma = 1 / (lam + sharpness * bound), smoothed_sign(sharpness)
    tied, free = (
        FixedPointModel(Identity(), ConvFieldsOfExperts(A.clone(), C, sigma), tau, lam, 1.0)
        for C in (None, A)
    )
    return SmallProblem(tied, free, other, f, truth)


def optimality_hypergradient(model: FixedPointModel, u: Tensor, f: Tensor, truth: Tensor) -> Tensor:
    """The bilevel hypergradient `dL/dA` from the lower level's optimality condition.

    At the minimiser `u` of the energy `E`, `grad E(u; A) = 0`, and the implicit function theorem gives
    `dL/dA = -(d/dA grad E)^T q` with `H q = dL/du` and the Hessian `H` of `E`. Neither a step map nor a step
    size appears.

    Args:
        model: tied weights.
        u: `(1, 1, H, W)`, the minimiser for the data `f`.
        f, truth: like `u`; the loss is the mean squared error.

    Returns:
        Tensor like the weights `A`.
    """
    A = model.regularizer.A
    u = u.detach().requires_grad_()

    def gradient(u: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(model.lower_level(u, f).sum(), u, create_graph=True)
        return g

    n = u.numel()
    H = torch.autograd.functional.jacobian(gradient, u).view(n, n)
    q = torch.linalg.solve(H, 2 * (u - truth).detach().flatten() / n).view_as(u)
    (dL_dA,) = torch.autograd.grad(gradient(u), A, -q)
    return dL_dA


def equilibrium_gradients(
    model: FixedPointModel, f: Tensor, truth: Tensor, solver: Solver
) -> tuple[Tensor, dict[str, Tensor]]:
    """The fixed point for the data `f`, and the gradient of the loss there by implicit differentiation.

    Returns:
        `u*` and a gradient per set of weights, `A` and for free weights `C`.
    """
    model.zero_grad()
    solution = implicit_fixed_point(model.problem(f), f, solver)
    (solution.value - truth).square().mean().backward()
    named = model.regularizer.named_parameters()
    return solution.value.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def field_jacobian(model: FixedPointModel, u: Tensor) -> Tensor:
    """The Jacobian `(n, n)` of the learned field at one image `u` `(1, 1, H, W)` of `n` pixels.

    It is symmetric at every `u` if and only if the field is the gradient of some energy.
    """

    def field(u: Tensor) -> Tensor:
        return model.regularizer.field(u, model.gamma, model.tau)

    n = u.numel()
    jacobian: Tensor = torch.autograd.functional.jacobian(field, u)
    return jacobian.view(n, n).detach()


def skew_share(jacobian: Tensor) -> float:
    """`||J - J^T|| / (2 ||J||)` in Frobenius norm: 0 of a symmetric matrix, 1 of a skew one."""
    return float(torch.linalg.matrix_norm(jacobian - jacobian.T) / (2 * torch.linalg.matrix_norm(jacobian)))


def path_of_skew_shares(problem: SmallProblem, steps: int) -> pd.DataFrame:
    """The field's Jacobian at the data on the way `C = (1 - t) A + t B` to other kernels `B`.

    Returns:
        Rows by `t`: `skew`, see `skew_share`, and `lowest`, the lowest eigenvalue of the symmetric part over
        the largest one.
    """
    model, rows = problem.free, {}
    assert model.regularizer.C is not None
    A = model.regularizer.A.detach().clone()
    for t in np.linspace(0, 1, steps):
        model.regularizer.C.data = (1 - t) * A + t * problem.other
        J = field_jacobian(model, problem.f)
        eigenvalues = torch.linalg.eigvalsh((J + J.T) / 2)
        rows[t] = {"skew": skew_share(J), "lowest": float(eigenvalues[0] / eigenvalues[-1])}
    model.regularizer.C.data = A
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("t")


def trained_skew_shares(height: int, width: int) -> dict[str, float]:
    """`skew_share` of the committed kernels of denoising at a piece of a face."""
    u = faces("test", 1)[..., 40 : 40 + height, 30 : 30 + width]
    shares = {}
    for (model, name), (size, (filters, _)) in product(MODEL_NAMES.items(), FILTERS.items()):
        trained = trained_kernels("denoising", model, filters).model(shape=(height, width))
        shares[f"{name} {size}"] = skew_share(field_jacobian(trained, u))
    return shares


def skew_figure(shares: pd.DataFrame, trained: Mapping[str, float]) -> Figure:
    """What `path_of_skew_shares` and `trained_skew_shares` returned, side by side."""
    with plt.rc_context(STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(6.0, 2.5), width_ratios=(1.3, 1))
        fig.subplots_adjust(left=0.09, right=0.99, top=0.95, bottom=0.2, wspace=0.3)
        left.plot(shares.index, shares["skew"], "o-", color="#0072b2", label="share of the skew part")
        left.plot(shares.index, shares["lowest"], "s--", color="#e69f00", label="lowest / largest eigenvalue")
        left.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        left.set(xlabel="$t$ in $C = (1 - t) A + t B$", ylabel="of the field's Jacobian")
        left.legend(frameon=False)
        colors = [MODEL_COLORS["bilevel" if name.startswith("bilevel") else "deq"] for name in trained]
        names = [name.replace(" ", "\n") for name in trained]
        right.bar(names, list(trained.values()), color=colors, edgecolor="k", linewidth=0.6)
        right.tick_params(axis="x", labelsize=7)
        right.set(ylabel="share of the skew part, trained")
    return fig


def check_shares(shares: pd.DataFrame, trained: Mapping[str, float]) -> None:
    """Print what must hold whatever the parameters are.

    Raises:
        AssertionError: a tied field has a skew part, or a free one has none.
    """
    assert shares["skew"].iloc[0] <= 1e-12, f"C = A: skew share {shares['skew'].iloc[0]}"
    assert shares["lowest"].iloc[0] >= -1e-12, f"C = A: lowest eigenvalue {shares['lowest'].iloc[0]}"
    print("C = A: the Jacobian is symmetric and positive semidefinite")
    assert shares["skew"].iloc[-1] > 0.01, "C = B: no skew part"
    print("C = B: the Jacobian has a skew part, the field is no gradient")
    for name, share in trained.items():
        tied = name.startswith("bilevel")
        assert share <= 1e-5 if tied else share > 1e-3, f"{name}: skew share {share}"
        print(f"{name}, trained: {'a gradient' if tied else 'no gradient'}")

"""The figures of docs/theory.md, computed with the package: ``python docs/figures/draw.py``.

The smallest pair there is, A = (a) and B = (b), has a total space that can be drawn: the plane.
GL(1) acts by (a, b) -> (a / g, g b), the orbits are the hyperbolas a b = const.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quotientopt as qo
from quotientopt._system import write_atomically
from quotientopt.flow import projected_gradient_flow

FOLDER = Path(__file__).parent
BLACK, BLUE, GREEN, ORANGE = "#000000", "#0072B2", "#009E73", "#D55E00"
YELLOW = "#E69F00"
PLANE = qo.manifolds.FactorQuotient(1, 1, 1)
TARGET = 1.0
LINES = (("-", 6), ("--", 2.5), (":", 1.2))


def point(a: float, b: float) -> tuple[Tensor, Tensor]:
    """A point of the plane as a factor pair."""
    return (torch.tensor([[a]], dtype=torch.float64), torch.tensor([[b]], dtype=torch.float64))


def numbers(x: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Its coordinates."""
    return x[0].item(), x[1].item()


def orbit(x: tuple[Tensor, Tensor], reach: float = 1.6) -> tuple[list[float], list[float]]:
    """Points g x of the orbit, g from exp(-reach) to exp(reach)."""
    elements = torch.linspace(-reach, reach, 121, dtype=torch.float64).exp()
    moved = [numbers(PLANE.act(g.view(1, 1), x)) for g in elements]
    return [a for a, _ in moved], [b for _, b in moved]


def new_figure(*size: float) -> Any:
    """An empty figure."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def orbits_and_sections() -> Any:
    """Orbits, vertical and horizontal space, and two sections."""
    figure = new_figure(6, 5.2)
    axes = figure.subplots()
    for height in (0.25, 1.0, 2.25, 4.0):
        root = height**0.5
        label = "orbits: a b = const" if height == 0.25 else None
        axes.plot(*orbit(point(root, root), 2.5), color="0.6", lw=1, label=label)
    x = PLANE.act(torch.tensor([[0.5]], dtype=torch.float64), point(1.5, 1.5))
    for kind, color, marker in (("balanced", ORANGE, "o"), ("orthonormal", BLUE, "s")):
        dressed = [numbers(PLANE.section(point(r, r), kind)[0]) for r in (0.3, 0.5, 1.0, 1.5, 2.0)]
        label = f"section {kind!r}: " + ("|a| = |b|" if kind == "balanced" else "|b| = 1")
        axes.plot(*zip(*dressed, strict=True), color=color, marker=marker, ms=5, label=label)
    vertical = (-x[0], x[1])
    horizontal = PLANE.horizontal_component(x, point(1.0, 0.2))
    parts = ((vertical, "vertical (−Λa, Λb)", BLACK), (horizontal, "horizontal", GREEN))
    for u, text, color in parts:
        length = 0.7 / sum(float(part) ** 2 for part in u) ** 0.5
        start = numbers(x)
        end = [s + length * v for s, v in zip(start, numbers(u), strict=True)]
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "lw": 2})
        away = (-66, -4) if color == GREEN else (-112, -22)
        axes.annotate(text, end, away, textcoords="offset points", color=color)
    axes.plot(*numbers(x), "o", color=BLACK, ms=6)
    axes.annotate("x", numbers(x), (-12, -10), textcoords="offset points")
    axes.set(xlim=(0, 4.2), ylim=(0, 3), xlabel="a (the entry of A)", ylabel="b (the entry of B)")
    axes.legend(loc="upper right", frameon=True, fontsize=8)
    return figure


def loss(x: tuple[Tensor, Tensor]) -> Tensor:
    """Least squares on the invariant."""
    A, B = x
    return 0.5 * (A.mT @ B - TARGET).square().sum()


def descend(make: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int) -> Tensor:
    """Points of an optimizer's path in the plane."""
    x = [part.clone().requires_grad_() for part in point(2.0, 0.2)]
    optimizer, path = make(x), [[2.0, 0.2]]
    for _ in range(steps):
        optimizer.zero_grad()
        loss((x[0], x[1])).backward()
        optimizer.step()
        path.append([part.item() for part in x])
    return torch.tensor(path, dtype=torch.float64)


def flow_and_charges() -> Any:
    """Paths of the Euclidean gradient flow, and the charge a² − b² along flow, SGD and Adam."""
    figure = new_figure(10, 4.4)
    plane, right = figure.subplots(1, 2)
    starts = [(2.0, 0.2), (1.2, 0.1), (0.4, 0.3), (0.1, 1.0), (0.2, 1.9), (2.1, 1.6), (1.5, 2.1)]
    for number, start in enumerate(starts):
        x0 = point(*start)
        result = projected_gradient_flow(PLANE, loss, (0, 8), x0=x0, rtol=1e-9, atol=1e-11)
        a, b = (part.squeeze() for part in result.points)
        label = "gradient flow: a² − b² = const" if number == 0 else None
        plane.plot(a, b, color=BLUE, lw=1.5, label=label)
        plane.plot(*start, ".", color=BLUE)
    plane.plot(*orbit(point(1.0, 1.0)), color="0.4", ls="--", label="minima: a b = 1")
    plane.set(xlim=(0, 2.4), ylim=(0, 2.4), xlabel="a", ylabel="b")
    plane.legend(loc="upper right", fontsize=8)
    runs = {
        "SGD, rate 0.1": (lambda p: torch.optim.SGD(p, lr=0.1), YELLOW, "-."),
        "SGD, rate 0.01": (lambda p: torch.optim.SGD(p, lr=0.01), YELLOW, ":"),
        "Adam, rate 0.01": (lambda p: torch.optim.Adam(p, lr=0.01), BLACK, "--"),
    }
    result = projected_gradient_flow(PLANE, loss, (0, 8), x0=point(2.0, 0.2), rtol=1e-9, atol=1e-11)
    a, b = (part.squeeze() for part in result.points)
    product = (a * b).tolist()
    right.plot(product, (a * a - b * b).tolist(), color=BLUE, label="gradient flow")
    for name, (make, color, style) in runs.items():
        path = descend(make, 1500)
        charge = path[:, 0] ** 2 - path[:, 1] ** 2
        right.plot(path.prod(1).tolist(), charge.tolist(), color=color, ls=style, label=name)
    right.set(xlabel="progress: the invariant a b, from 0.4 to 1", ylabel="charge a² − b²")
    right.legend(fontsize=8)
    return figure


class Attention(torch.nn.Module):
    """A pair of rank two, (A, B) ↦ AᵀB."""

    def __init__(self, x: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.A, self.B = (torch.nn.Parameter(part.clone()) for part in x)

    def symmetries(self) -> qo.SymmetryMap:
        """GL(2)."""
        pair = qo.HeadSymmetry(left=[self.A], right=[self.B], group=qo.groups.GL(2), name="pair")
        return qo.SymmetryMap([pair])


def course(x: tuple[Tensor, Tensor], target: Tensor, quotient: bool, steps: int) -> Tensor:
    """Both singular values of AᵀB, step by step."""
    model = Attention(x)
    optimizer: torch.optim.Optimizer
    if quotient:
        optimizer = qo.QuotientAdam(model, lr=0.02, symmetries=model.symmetries(), weight_decay=0)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    values = []
    for _ in range(steps):
        values.append(torch.linalg.svdvals((model.A.mT @ model.B).detach()[0])[:2])
        optimizer.zero_grad()
        (model.A.mT @ model.B - target).square().sum().backward()
        optimizer.step()
    return torch.stack(values)


def twins() -> Any:
    """What two gauges of one start do under Adam and under QuotientAdam."""
    torch.manual_seed(3)
    manifold = qo.manifolds.FactorQuotient(2, 6, 6, batch_shape=(1,))
    x = manifold.random_point(dtype=torch.float64)
    target = torch.randn(1, 6, 2, dtype=torch.float64) @ torch.randn(1, 2, 6, dtype=torch.float64)
    others = [manifold.group.random((1,), cond=cond, dtype=torch.float64) for cond in (3, 10)]
    starts = {"x": x, "g·x, cond(g) = 3": manifold.act(others[0], x)}
    starts["g·x, cond(g) = 10"] = manifold.act(others[1], x)
    figure = new_figure(10, 4.2)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, quotient in zip(panels, (False, True), strict=True):
        color = ORANGE if quotient else BLACK
        for (name, start), (style, width) in zip(starts.items(), LINES, strict=True):
            values = course(start, target, quotient, 150)
            line = {"ls": style, "lw": width, "alpha": 0.35 if style == "-" else 1.0}
            axes.plot(values[:, 0], values[:, 1], color=color, label=name, **line)
        axes.plot(*values[0], "o", color="0.4")
        goal = torch.linalg.svdvals(target[0])[:2]
        axes.plot(*goal, "*", color="0.4", ms=12)
        axes.set_title("QuotientAdam: one path" if quotient else "Adam: a path for every gauge")
        axes.set_xlabel("largest singular value of AᵀB")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("second singular value of AᵀB")
    return figure


FIGURES = {"orbits": orbits_and_sections, "charges": flow_and_charges, "twins": twins}


def main() -> None:
    """Draw all, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*FIGURES, []], default=[])
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for name in given.names or FIGURES:
        image = io.BytesIO()
        figure = FIGURES[name]()
        figure.set_dpi(120)
        FigureCanvasAgg(figure).print_png(image)
        write_atomically(given.out / f"{name}.png", image.getvalue())


if __name__ == "__main__":
    main()

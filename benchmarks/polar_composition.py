"""Odd polynomials whose composition is nearest to one, and how near it brings matrices to polar.

Each polynomial minimises the largest error on the range of the one before, by linear programming
on a grid. Prints the coefficients that ``quotientopt.optim.polar.COMPOSITION`` holds, and the
cosine of the result with the polar factor of random matrices, beside Polar Express' five quintics
on the Frobenius norm (Amsel et al., arXiv 2505.16932) and the one step of version 0.1.0.

    python benchmarks/polar_composition.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from quotientopt.compare.protocol import describe_environment
from quotientopt.optim.polar import (
    COMPOSITION,
    NARROW_COMPOSITION,
    bfloat16_product,
    orthogonalise,
    polar_direction,
)

LOWER, DEGREES = 0.02, (13, 9)
# For narrow products: small coefficients, and room for rounding.
NARROW_LOWER, NARROW_DEGREES, NARROW_MARGIN = 0.01, (5, 5, 5, 5), 0.02
SHAPES = ((128, 128), (384, 384), (768, 768), (128, 512))
# Of arXiv 2505.16932, for singular values over 1.01 times the Frobenius norm.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
RESULT = Path(__file__).parent / "results" / "polar-composition.json"


def minimax(low: float, high: float, degree: int) -> tuple[list[float], float]:
    """Coefficients of σ, σ³, … nearest to one on [low, high], and the largest error."""
    grid = np.concatenate([np.geomspace(low, high, 1500), np.linspace(low, high, 1500)])
    powers = np.arange(1, degree + 1, 2)
    values = (grid[:, None] / high) ** powers
    error = -np.ones((len(grid), 1))
    upper = np.block([[values, error], [-values, error]])
    bounds = np.concatenate([np.ones(len(grid)), -np.ones(len(grid))])
    cost = np.r_[np.zeros(len(powers)), 1]
    found = linprog(cost, A_ub=upper, b_ub=bounds, bounds=(None, None), method="highs")
    return list(found.x[:-1] / high**powers), float(found.x[-1])


def composition(
    degrees: Sequence[int] = DEGREES, lower: float = LOWER, margin: float = 0.0
) -> tuple[list[list[float]], float]:
    """Polynomials of these degrees for singular values down to ``lower``, and the final error.

    Each expects those of the one before to be off by ``margin`` more than they are.
    """
    low, high, found, error = lower, 1.0, [], 1.0
    for degree in degrees:
        coefficients, error = minimax(low, high, degree)
        found.append(coefficients)
        low, high = 1 - error - margin, 1 + error + margin
    return found, error


def cosine(first: Tensor, second: Tensor) -> float:
    """Of the angle between two matrices."""
    return float((first * second).sum() / first.norm() / second.norm())


def main() -> int:
    """Print and write the coefficients, their error and the cosines."""
    coefficients, error = composition()
    print(
        "coefficients", [[round(float(c), 7) for c in own] for own in coefficients], "error", error
    )
    narrow, narrow_error = composition(NARROW_DEGREES, NARROW_LOWER, NARROW_MARGIN)
    print("narrow", [[round(float(c), 7) for c in own] for own in narrow], "error", narrow_error)
    held = max(
        abs(a - b)
        for own, theirs in zip(
            (*coefficients, *narrow), (*COMPOSITION, *NARROW_COMPOSITION), strict=True
        )
        for a, b in zip(own, theirs, strict=True)
    )
    print("largest difference from those of the optimizer", held)
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(1, *shape, generator=generator)
        U, sigma, Vt = torch.linalg.svd(matrix, full_matrices=False)
        express = sigma / (1.01 * sigma.norm())
        for a, b, c in POLAR_EXPRESS:
            express = a * express + b * express**3 + c * express**5
        row = {
            "shape": shape,
            "step of 0.1.0": cosine(orthogonalise(matrix, None), U @ Vt),
            "composition": cosine(polar_direction(matrix, None), U @ Vt),
            "in bfloat16": cosine(polar_direction(matrix, None, bfloat16_product), U @ Vt),
            "polar express": cosine(U @ express.diag_embed() @ Vt, U @ Vt),
        }
        rows.append(row)
        print(row)
    record = {
        "environment": describe_environment("cpu"),
        "degrees": DEGREES,
        "lower": LOWER,
        "coefficients": coefficients,
        "error": error,
        "narrow coefficients": narrow,
        "narrow error": narrow_error,
        "cosines, seed 0": rows,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

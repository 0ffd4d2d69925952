"""Completion of a low-rank matrix by pymanopt's trust regions on the quotient by GL(r)."""

import argparse

import pymanopt
import torch

import quotientopt as qo

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50, help="most outer iterations")
steps = parser.parse_args().steps

torch.manual_seed(0)
left, right = torch.randn(40, 3).double(), torch.randn(3, 30).double()
target = left @ right
seen = torch.rand(40, 30, dtype=torch.float64) < 0.5


def cost(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Mean squared error where the matrix is known; it depends on AᵀB alone."""
    return ((A.mT @ B - target)[seen]).square().mean()


manifold = qo.pymanopt.FactorManifold(3, 40, 30)
problem = qo.pymanopt.problem(manifold, cost)
solver = pymanopt.optimizers.TrustRegions(verbosity=0, max_iterations=steps)
result = solver.run(problem, initial_point=manifold.random_point())
A, B = result.point
error = (torch.as_tensor(A.T @ B) - target)[~seen].square().mean().sqrt()
print(
    f"cost {result.cost:.1e} after {result.iterations} iterations; error where unseen {error:.1e}"
)

"""Our manifolds in the shape of geomstats' fiber bundles.

Points are matrices, ``[A, B]`` for pairs; the base spaces know nothing of our code.
"""

import torch
from geomstats.geometry.fiber_bundle import FiberBundle
from geomstats.geometry.matrices import Matrices
from geomstats.geometry.rank_k_psd_matrices import RankKPSDMatrices

from quotientopt.groups import GL, O, RotaryCommutant, StabilizerOfOnes
from quotientopt.manifolds import FactorQuotient, GramQuotient

N, M = 7, 6


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class Bundle(FiberBundle):
    """The interface of geomstats' bundles over a :class:`TotalSpace`."""

    def _call(self, method, *tensors):
        """A method of our manifold on matrices, their batches broadcast."""
        space = self._total_space
        batch = torch.broadcast_shapes(*(tensor.shape[:-2] for tensor in tensors))
        expanded = [tensor.expand(*batch, *tensor.shape[-2:]) for tensor in tensors]
        return getattr(space.build(batch), method)(*(space.unpack(t) for t in expanded))

    def riemannian_submersion(self, point):
        return self._total_space.base.pack(self._call("canonical_projection", point))

    def lift(self, point):
        return self._total_space.base.lift(point)

    def tangent_riemannian_submersion(self, tangent_vec, base_point):
        return self._total_space.base.pack(self._call("differential", base_point, tangent_vec))

    def horizontal_projection(self, tangent_vec, base_point):
        moved = self._call("horizontal_component", base_point, tangent_vec)
        return self._total_space.pack(moved)

    def vertical_projection(self, tangent_vec, base_point):
        moved = self._call("vertical_component", base_point, tangent_vec)
        return self._total_space.pack(moved)

    def horizontal_lift(self, tangent_vec, base_point=None, fiber_point=None):
        space = self._total_space
        fiber_point = self.lift(base_point) if fiber_point is None else fiber_point
        batch = torch.broadcast_shapes(tangent_vec.shape[:-2], fiber_point.shape[:-2])
        fiber_point = fiber_point.expand(*batch, *space.shape)
        vector = space.base.unpack(tangent_vec.expand(*batch, *space.base.shape))
        lifted = space.build(batch).horizontal_lift(space.unpack(fiber_point), vector)
        return space.pack(lifted)

    def align(self, point, base_point):
        return self._total_space.pack(self._call("align", point, base_point)[0])

    def integrability_tensor(self, tangent_vec_a, tangent_vec_b, base_point):
        horizontal = [
            self.horizontal_projection(v, base_point) for v in (tangent_vec_a, tangent_vec_b)
        ]
        return self._call("integrability_tensor", base_point, *horizontal)


class TotalSpace:
    """Matrices of full rank with a bundle over `base`."""

    point_ndim = 2

    def __init__(self, build, shape, base, columns=None):
        self.build, self.shape, self.base = build, shape, base
        self.columns = columns
        self.fiber_bundle = Bundle(self)
        self.metric = Matrices(*shape).metric

    def pack(self, point):
        return torch.cat(point, dim=-1) if isinstance(point, tuple) else point

    def unpack(self, tensor):
        if self.columns is None:
            return tensor
        return tensor[..., : self.columns], tensor[..., self.columns :]

    def random_point(self, n_points=1):
        return randn(*(() if n_points == 1 else (n_points,)), *self.shape)

    def random_tangent_vec(self, base_point):
        return randn(*base_point.shape)

    def belongs(self, point, atol):
        shape = tuple(point.shape[-2:]) == self.shape
        return shape & (torch.linalg.svdvals(point)[..., -1] > atol)


def zero(tensor, atol):
    """Whether the matrices of a batch vanish."""
    return tensor.abs().amax(dim=(-2, -1)) <= atol


def complement(matrix, rank):
    """Projector to what is orthogonal to the first `rank` left singular vectors."""
    U = torch.linalg.svd(matrix).U[..., :rank]
    return torch.eye(matrix.shape[-2], dtype=matrix.dtype) - U @ U.mH


class Products:
    """A complex n×m matrix of rank 1 for every plane, and a real one of rank `passing`, stacked."""

    def __init__(self, group, planes, passing):
        self.group, self.planes, self.passing = group, planes, passing
        self.blocks = 2 * planes + bool(passing)
        self.shape = self.blocks * N, M

    def pack(self, invariants):
        return invariants.reshape(
            *invariants.shape[: invariants.ndim - (3 if self.planes else 2)], *self.shape
        )

    def unpack(self, tensor):
        return tensor.reshape(*tensor.shape[:-2], self.blocks, N, M) if self.planes else tensor

    def split(self, tensor):
        blocks = tensor.reshape(*tensor.shape[:-2], self.blocks, N, M)
        real, imaginary = (
            blocks[..., : self.planes, :, :],
            blocks[..., self.planes : 2 * self.planes, :, :],
        )
        parts = [(torch.complex(real, imaginary), 1)] if self.planes else []
        return parts + ([(blocks[..., -1:, :, :], self.passing)] if self.passing else [])

    def join(self, parts):
        blocks = []
        for part in parts:
            blocks += [part.real, part.imag] if part.is_complex() else [part]
        stacked = torch.cat(blocks, dim=-3)
        return stacked.reshape(*stacked.shape[:-3], *self.shape)

    def lift(self, point):
        rows = []
        for matrix, rank in self.split(point):
            U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
            root = S[..., :rank, None].sqrt()
            rows.append((root * U[..., :rank].mH, root * Vh[..., :rank, :]))
        factors = []
        for side in (0, 1):
            factor = randn(*point.shape[:-2], 2 * self.planes + self.passing, (N, M)[side])
            if self.planes:
                for index, (real, imaginary) in enumerate(self.group.planes):
                    row = rows[0][side][..., index, 0, :]
                    factor[..., real, :], factor[..., imaginary, :] = row.real, row.imag
            if self.passing:
                factor[..., 2 * self.planes :, :] = rows[-1][side][..., 0, :, :]
            factors.append(factor)
        return torch.cat(factors, dim=-1)

    def belongs(self, point, atol):
        answers = []
        for matrix, rank in self.split(point):
            values = torch.linalg.svdvals(matrix)
            rest = values[..., rank:].sum(dim=-1)
            answers.append(((values[..., rank - 1] > atol) & (rest <= atol)).all(dim=-1))
        return torch.stack(answers).all(dim=0)

    def is_tangent(self, vector, base_point, atol):
        answers = []
        for (matrix, rank), (rate, _) in zip(
            self.split(base_point), self.split(vector), strict=True
        ):
            normal = complement(matrix, rank) @ rate @ complement(matrix.mH, rank)
            answers.append(zero(normal, atol).all(dim=-1))
        return torch.stack(answers).all(dim=0)

    def random_point(self, n_points=1):
        batch = () if n_points == 1 else (n_points,)
        parts = []
        if self.planes:
            a, b = (
                torch.complex(randn(*s), randn(*s))
                for s in ((*batch, self.planes, N, 1), (*batch, self.planes, 1, M))
            )
            parts.append(a @ b)
        if self.passing:
            parts.append(randn(*batch, 1, N, self.passing) @ randn(*batch, 1, self.passing, M))
        return self.join(parts)

    def random_tangent_vec(self, base_point):
        parts = []
        for matrix, rank in self.split(base_point):
            vector = torch.randn_like(matrix)
            normal = complement(matrix, rank) @ vector @ complement(matrix.mH, rank)
            parts.append(vector - normal)
        return self.join(parts)


class Grams(RankKPSDMatrices):
    """geomstats' matrices of fixed rank; random ones of our own, well-conditioned and tangent."""

    def pack(self, invariants):
        return invariants

    unpack = pack

    def lift(self, point):
        values, vectors = torch.linalg.eigh(point)
        return vectors[..., -self.rank :] * values[..., None, -self.rank :].sqrt()

    def random_point(self, n_points=1):
        X = randn(*(() if n_points == 1 else (n_points,)), self.n, self.rank)
        return X @ X.mT

    def random_tangent_vec(self, base_point):
        vector = randn(*base_point.shape)
        vector = vector + vector.mT
        normal = complement(base_point, self.rank)
        return vector - normal @ vector @ normal


class JointGrams(Grams):
    """The Gram matrix of all columns of a pair; its representatives are transposed."""

    def lift(self, point):
        return super().lift(point).mT


class GramsWithSums:
    """``[X Xᵀ, X 1]``: what is left after the sums is a Gram matrix of rank d − 1."""

    def __init__(self, n, d):
        self.d, self.centred = d, Grams(n, d - 1, equip=False)
        self.shape = n, n + 1

    def pack(self, invariants):
        return invariants

    unpack = pack

    def split(self, point):
        G, s = point[..., :-1], point[..., -1:]
        return G - s @ s.mT / self.d, s

    def join(self, G, s):
        return torch.cat((G + s @ s.mT / self.d, s), dim=-1)

    def rate(self, vector, base_point):
        product = vector[..., -1:] @ base_point[..., -1:].mT / self.d
        return vector[..., :-1] - product - product.mT

    def lift(self, point):
        G, s = self.split(point)
        ones = torch.ones(self.d, 1, dtype=torch.float64)
        basis = torch.linalg.svd(ones).U[:, 1:]
        return self.centred.lift(G) @ basis.T + s @ ones.T / self.d

    def belongs(self, point, atol):
        return self.centred.belongs(self.split(point)[0], atol)

    def is_tangent(self, vector, base_point, atol):
        return self.centred.is_tangent(
            self.rate(vector, base_point), self.split(base_point)[0], atol
        )

    def random_point(self, n_points=1):
        batch = () if n_points == 1 else (n_points,)
        return self.join(self.centred.random_point(n_points), randn(*batch, self.shape[0], 1))

    def random_tangent_vec(self, base_point):
        G, s = self.split(base_point)
        rate = randn(*s.shape)
        product = rate @ s.mT / self.d
        tangent = self.centred.random_tangent_vec(G) + product + product.mT
        return torch.cat((tangent, rate), dim=-1)


def pairs(group, metric, base):
    """Pairs modulo `group`, packed side by side."""

    def build(batch):
        return FactorQuotient(group.r, N, M, group=group, metric=metric, batch_shape=batch)

    return TotalSpace(build, (group.r, N + M), base, columns=N)


def grams(columns, stabilizer, base):
    """Token matrices modulo rotations."""

    def build(batch):
        return GramQuotient(N, columns, stabilizer=stabilizer, batch_shape=batch)

    return TotalSpace(build, (N, columns), base)


def product_space(group, metric):
    rotary = isinstance(group, RotaryCommutant)
    planes = len(group.planes) if rotary else 0
    return pairs(group, metric, Products(group, planes, group.r - 2 * planes))


SPACES = {
    "gl preconditioned": lambda: product_space(GL(3), "preconditioned"),
    "gl right-invariant": lambda: product_space(GL(3), "right-invariant"),
    "rotary preconditioned": lambda: product_space(RotaryCommutant(4), "preconditioned"),
    "rotary right-invariant": lambda: product_space(
        RotaryCommutant(4, layout="interleaved"), "right-invariant"
    ),
    "partial rotary preconditioned": lambda: product_space(
        RotaryCommutant(5, 2, layout="interleaved"), "preconditioned"
    ),
    "partial rotary right-invariant": lambda: product_space(
        RotaryCommutant(6, 4), "right-invariant"
    ),
    "o euclidean": lambda: pairs(O(3), "euclidean", JointGrams(N + M, 3, equip=False)),
    "o preconditioned": lambda: pairs(O(3), "preconditioned", JointGrams(N + M, 3, equip=False)),
    "o right-invariant": lambda: pairs(O(3), "right-invariant", JointGrams(N + M, 3, equip=False)),
    "gram": lambda: grams(3, None, Grams(N, 3, equip=False)),
    "gram of ones": lambda: grams(4, StabilizerOfOnes(4), GramsWithSums(N, 4)),
}
FLAT = ("o euclidean", "gram", "gram of ones")

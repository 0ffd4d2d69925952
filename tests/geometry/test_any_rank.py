"""The SVD section at deficient rank and at equal singular values: one representative per orbit."""

import warnings

import pytest
import torch

from quotientopt import sections
from quotientopt.groups import GL, O, RotaryCommutant, StabilizerOfOnes
from quotientopt.manifolds import FactorQuotient, GramQuotient, ProductManifold
from tests.geometry.cases import deviation, generator

R, N, M = 5, 7, 6


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def pair_of_ranks(a, b, rho, seed=0):
    """A pair with these ranks of A, B and AᵀB, in a random gauge."""
    A, B = torch.zeros(R, N).double(), torch.zeros(R, M).double()
    A[:rho], B[:rho] = randn(rho, N, seed=seed), randn(rho, M, seed=seed + 1)
    B[rho:b] = randn(b - rho, M, seed=seed + 2)
    A[b : b + a - rho] = randn(a - rho, N, seed=seed + 3)
    g = GL(R).random(cond=30.0, generator=generator(seed), dtype=torch.float64)
    return GL(R).act(g, (A, B))


RANKS = [
    (a, b, rho)
    for a in range(R + 1)
    for b in range(R + 1)
    for rho in range(max(0, a + b - R), min(a, b) + 1)
]


def all_ranks():
    pairs = [pair_of_ranks(*ranks, seed=7 * i) for i, ranks in enumerate(RANKS)]
    return tuple(torch.stack(side) for side in zip(*pairs, strict=True))


def twin(group, pair, cond=1000.0, seed=5):
    batch = pair[0].shape[:-2]
    g = group.random(batch, cond=cond, generator=generator(seed), dtype=torch.float64)
    return group.act(g, pair)


def test_every_combination_of_ranks_in_one_batch():
    x = all_ranks()
    (A, B), g, gap = sections.section("svd", *x, return_gap=True)
    assert len(RANKS) == 56
    assert torch.isfinite(g).all()
    assert not gap.isnan().any()
    # Reached by a group element: what the model computes is the same.
    GL(R).check_element(g.float())
    assert deviation(GL(R).act(g, x), (A, B)) < 1e-9
    scale = x[0].abs().max() * x[1].abs().max()
    assert (A.mT @ B - x[0].mT @ x[1]).abs().max() < 1e-12 * scale
    # The form: Σ and Σ, then what only one of the factors has, then zeros.
    values = torch.linalg.svdvals(x[0].mT @ x[1])
    for i, (a, b, rho) in enumerate(RANKS):
        left = torch.cat((values[i, :rho], torch.zeros(b - rho), torch.ones(a - rho)))
        right = torch.cat((values[i, :rho], torch.ones(b - rho)))
        for factor, squares in ((A[i], left), (B[i], right)):
            expected = torch.nn.functional.pad(squares, (0, R - len(squares)))
            assert (factor @ factor.mT - expected.double().diag()).abs().max() < 1e-10
            assert factor[expected == 0].abs().sum() == 0


def test_twins_and_idempotence_at_every_rank():
    x = all_ranks()
    dressed, _ = sections.section("svd", *x)
    other, _ = sections.section("svd", *twin(GL(R), x))
    for one, two in zip(dressed, other, strict=True):
        assert (one - two).abs().max() < 1e-9
    mild, _ = sections.section("svd", *twin(GL(R), x, cond=30.0))
    assert max((p - q).abs().max() for p, q in zip(dressed, mild, strict=True)) < 1e-10
    again, _ = sections.section("svd", *dressed)
    assert max((p - q).abs().max() for p, q in zip(dressed, again, strict=True)) < 1e-12
    # Controls: the twins themselves differ, and so do other orbits of the same invariant.
    assert (twin(GL(R), x)[1] - x[1]).abs().max() > 1
    A, B = (part[RANKS.index((0, 3, 0))] for part in x)
    (_, one), _ = sections.section("svd", A, B)
    (_, two), _ = sections.section("svd", A, randn(3, M, seed=99).new_zeros(R, M) + randn(R, M))
    assert (one - two).abs().max() > 0.1


@pytest.mark.parametrize("rank", range(R + 1))
def test_twins_of_equal_ranks_at_condition_1000(rank):
    x = tuple(
        torch.stack(side)
        for side in zip(
            *(
                (
                    torch.cat((randn(rank, N, seed=s), torch.zeros(R - rank, N).double())),
                    torch.cat((randn(rank, M, seed=s + 50), torch.zeros(R - rank, M).double())),
                )
                for s in range(4)
            ),
            strict=True,
        )
    )
    first, _ = sections.section("svd", *twin(GL(R), x, seed=1))
    second, _ = sections.section("svd", *twin(GL(R), x, seed=2))
    assert max((p - q).abs().max() for p, q in zip(first, second, strict=True)) < 1e-10
    squares = [factor @ factor.mT for factor in first]
    assert (squares[0] - squares[1]).abs().max() < 1e-10  # balanced: ranks agree everywhere
    assert (first[0][:, rank:].abs().sum(), first[1][:, rank:].abs().sum()) == (0, 0)


def test_a_deficient_head_leaves_the_others_and_their_gradients_alone():
    A, B = randn(3, R, N), randn(3, R, M, seed=1)
    A[1] = 0
    A.requires_grad_()
    (left, right), _ = sections.section("svd", A, B)
    (alone, _), _ = sections.section("svd", A[2], B[2])
    assert (left[2] - alone).abs().max() < 1e-13
    weights = randn(3, R, N, seed=2)
    loss = (left * weights).sum() + right.square().sum()
    (gradient,) = torch.autograd.grad(loss, A)
    assert torch.isfinite(gradient).all()
    (expected,) = torch.autograd.grad(
        (alone * weights[2]).sum() + sections.section("svd", A[2], B[2])[0][1].square().sum(),
        A,
    )
    assert (gradient[2] - expected[2]).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("kind", ["balanced", "orthonormal", "triangular"])
def test_the_other_sections_refuse(kind):
    A, B = randn(2, R, N), randn(2, R, M, seed=1)
    (A if kind == "balanced" else B)[1] = 0
    with pytest.raises(ValueError, match=r"rank-deficient \(batch index \(1,\)\)"):
        sections.section(kind, A, B)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_vanishing_planes_and_passing_rows(layout):
    group = RotaryCommutant(8, 4, layout=layout)
    A, B = randn(4, 8, 10), randn(4, 8, 9, seed=1)
    first, second = group.planes
    A[0, list(first)] = 0
    B[1, list(second)] = 0
    A[2], B[2] = 0, 0
    A[3, 5] = A[3, 4]
    dressed, g = sections.rotary_section("svd", group, A, B)
    group.check_element(g.float())
    assert deviation(group.act(g, (A, B)), dressed) < 1e-10
    other, _ = sections.rotary_section("svd", group, *twin(group, (A, B)))
    assert max((p - q).abs().max() for p, q in zip(dressed, other, strict=True)) < 1e-10
    again, _ = sections.rotary_section("svd", group, *dressed)
    assert max((p - q).abs().max() for p, q in zip(dressed, again, strict=True)) < 1e-12
    assert (twin(group, (A, B))[1] - B).abs().max() > 0.1


def test_deficient_float32():
    A, B = randn(R, N).float(), randn(R, M, seed=1).float()
    A[2:], B[1] = 0, B[0]
    dressed, g = sections.section("svd", A, B)
    assert dressed[0].dtype == g.dtype == torch.float32
    assert (dressed[0].mT @ dressed[1] - A.mT @ B).abs().max() < 1e-5
    exact, _ = sections.section("svd", A.double(), B.double())
    assert deviation(tuple(part.double() for part in dressed), exact) < 1e-5


# ---- equal singular values -----------------------------------------------------------------------


def with_equal_values(values, n=N, m=M, seed=0):
    r = len(values)
    left = torch.linalg.qr(randn(n, r, seed=seed)).Q.mT
    right = torch.linalg.qr(randn(m, r, seed=seed + 1)).Q.mT
    root = torch.tensor(values, dtype=torch.float64).sqrt().unsqueeze(-1)
    return root * left, root * right


@pytest.mark.parametrize("values", [(2.0, 2.0, 1.0), (1.0, 1.0, 1.0), (3.0, 1.0, 1.0)], ids=str)
def test_equal_singular_values_of_factor_pairs(values):
    Q = FactorQuotient(3, N, M)
    x = with_equal_values(values)
    dressed, g, gap = Q.section(x, "svd", return_gap=True)
    other, _ = Q.section(twin(GL(3), x), "svd")
    assert deviation(dressed, other) < 1e-10
    assert deviation(Q.act(g, x), dressed) < 1e-12
    assert gap < 1e-12
    assert deviation(Q.section(dressed, "svd")[0], dressed) < 1e-12
    # Control: without looking for equal values twins come out rotated.
    blind = FactorQuotient(3, N, M, check=False)
    twins = [twin(GL(3), x, seed=seed) for seed in range(5)]
    assert max(deviation(blind.section(y, "svd")[0], dressed) for y in twins) > 1e-2


@pytest.mark.parametrize("shape", [(7, 3), (3, 6)], ids=str)
@pytest.mark.parametrize("group", [O, StabilizerOfOnes])
def test_equal_singular_values_of_token_matrices(shape, group):
    rows, columns = shape
    columns += group is StabilizerOfOnes
    Q = GramQuotient(rows, columns, stabilizer=group(columns), batch_shape=(2,))
    size = min(shape)
    values = torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)
    left = torch.linalg.qr(randn(2, rows, size)).Q
    right = torch.linalg.qr(randn(2, shape[1], size, seed=1)).Q
    x = Q.group.from_moving_part(left * values @ right.mT)
    x = x + randn(2, rows, 1, seed=3) if group is StabilizerOfOnes else x
    dressed, g, gap = Q.section(x, "svd", return_gap=True)
    moved = x @ Q.group.random((2,), generator=generator(4), dtype=torch.float64).mT
    assert deviation(Q.section(moved, "svd")[0], dressed) < 1e-12
    assert deviation(Q.act(g, x), dressed) < 1e-12
    assert gap.abs().max() < 1e-12
    blind = GramQuotient(rows, columns, stabilizer=group(columns), batch_shape=(2,), check=False)
    assert deviation(blind.section(moved, "svd")[0], dressed) > 1e-2


def test_the_gap_is_reported():
    x = with_equal_values((4.0, 2.0, 1.9))
    Q = FactorQuotient(3, N, M)
    _, _, gap = Q.section(x, "svd", return_gap=True)
    assert gap.item() == pytest.approx(0.025)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Q.section(x, "svd", warn_below=0.02)
    with pytest.warns(UserWarning, match=r"relative gap of singular values 2\.5e-02, not above"):
        Q.section(x, "svd", warn_below=0.03)
    with pytest.raises(ValueError, match="'balanced' has no spectral gap"):
        Q.section(x, "balanced", return_gap=True)
    rotary = FactorQuotient(4, N, M, group=RotaryCommutant(4))
    assert rotary.section(rotary.random_point(), "svd", return_gap=True)[2] == torch.inf
    joint = FactorQuotient(3, N, M, group=O(3), metric="euclidean")
    point = joint.random_point(generator=generator(), dtype=torch.float64)
    values = torch.linalg.svdvals(torch.cat(point, dim=-1))
    gap = joint.section(point, "svd", return_gap=True)[2]
    assert gap.item() == pytest.approx(((values[:-1] - values[1:]).min() / values[0]).item())
    both = ProductManifold({"pair": Q, "tokens": GramQuotient(4, 2)})
    point = both.random_point(generator=generator())
    _, _, gaps = both.section(point, "svd", return_gap=True)
    assert set(gaps) == {"pair", "tokens"}
    assert len(both.section(point, "svd")) == 2


@pytest.mark.parametrize("cond", [1e7, 1e9, 1e11, 1e13])
def test_condition_numbers_that_gram_matrices_do_not_resolve(cond):
    """Full rank, in float64: their squares are beyond it, and no Cholesky factor is there."""
    generator_ = generator(3)
    M = FactorQuotient(4, 9, 7, batch_shape=(3,))
    A, B = M.random_point(generator=generator_, dtype=torch.float64)
    U, values, Vt = torch.linalg.svd(A, full_matrices=False)
    spread = torch.logspace(0, -torch.log10(torch.tensor(cond)).item(), 4, dtype=torch.float64)
    # One of the batch is an ordinary pair.
    A = torch.stack([A[0], *((U * spread) @ Vt)[1:]])
    (dressed_A, dressed_B), g = sections.section("svd", A, B)
    product = A.mT @ B
    assert deviation(dressed_A.mT @ dressed_B, product) < 1e-13
    grams = dressed_A @ dressed_A.mT, dressed_B @ dressed_B.mT
    assert deviation(grams[0], grams[1]) < 1e-8
    values = torch.linalg.svdvals(product)[:, :4]
    assert (grams[1].diagonal(dim1=-2, dim2=-1)[:, :3] / values[:, :3] - 1).abs().max() < 1e-4
    assert deviation(g @ B, dressed_B) < 1e-10
    again, _ = sections.section("svd", dressed_A, dressed_B)
    assert max(map(deviation, again, (dressed_A, dressed_B))) < 1e-7

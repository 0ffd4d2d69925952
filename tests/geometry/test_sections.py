"""Dressing fields of factor pairs, rotary heads and token matrices."""

import pytest
import torch

from quotientopt import sections
from quotientopt._linalg import polar_factor_by_inverses
from quotientopt.groups import GL, O, RotaryCommutant
from quotientopt.manifolds import FactorQuotient, GramQuotient
from quotientopt.sections.factor import balancing_pair
from tests.geometry.cases import BATCH_SHAPES, ONE_LINE, deviation, generator

FACTOR_KINDS = ("svd", "balanced", "orthonormal", "triangular")
batches = pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)


def random_pair(batch_shape=(), r=4, n=9, m=6, dtype=torch.float64, seed=0):
    source = generator(seed)
    return tuple(
        torch.randn(*batch_shape, r, columns, generator=source, dtype=torch.float64).to(dtype)
        for columns in (n, m)
    )


def grams(pair):
    return tuple(factor @ factor.mT for factor in pair)


def modulo_rotation(pair):
    """What two pairs that differ by one element of O(r) share."""
    return (*(factor.mT @ factor for factor in pair), pair[0].mT @ pair[1])


@batches
@pytest.mark.parametrize("kind", FACTOR_KINDS)
def test_factor_sections(kind, batch_shape):
    M = FactorQuotient(4, 9, 6, batch_shape=batch_shape)
    x = random_pair(batch_shape)
    dressed, g = M.section(x, kind)
    assert deviation(M.canonical_projection(dressed), M.canonical_projection(x)) < 1e-12
    assert deviation(M.act(g, x), dressed) < 1e-11
    assert deviation(M.section(dressed, kind)[0], dressed) < 1e-11
    h = GL(4).random(batch_shape, cond=100, generator=generator(3), dtype=torch.float64)
    redressed, _ = M.section(M.act(h, x), kind)
    if kind == "svd":
        assert deviation(redressed, dressed) < 1e-10
        singular = torch.linalg.svdvals(M.canonical_projection(x))[..., :4]
        for S in grams(dressed):
            assert deviation(S, torch.diag_embed(singular)) < 1e-11
    else:
        assert deviation(modulo_rotation(redressed), modulo_rotation(dressed)) < 1e-10
    # Control: the raw points of one orbit share none of this.
    assert deviation(modulo_rotation(M.act(h, x)), modulo_rotation(x)) > 1e-3


@batches
def test_what_each_section_normalises(batch_shape):
    SA, SB = grams(random_pair(batch_shape))
    identity = GL(4).identity(batch_shape, dtype=torch.float64)
    elements = {kind: sections.element(kind, SA, SB) for kind in FACTOR_KINDS}
    for g, contragredient in elements.values():
        assert deviation(g.mT @ contragredient, identity) < 1e-11
    g, contragredient = elements["balanced"]
    assert deviation(g @ SB @ g.mT, contragredient @ SA @ contragredient.mT) < 1e-11
    assert deviation(g, g.mT) < 1e-13
    assert torch.linalg.eigvalsh(g).min() > 0
    g, _ = elements["orthonormal"]
    assert deviation(g @ SB @ g.mT, identity) < 1e-11
    assert deviation(g, g.mT) < 1e-13
    g, _ = elements["triangular"]
    assert deviation(g @ SB @ g.mT, identity) < 1e-11
    assert g.triu(1).abs().max() == 0
    assert g.diagonal(dim1=-2, dim2=-1).min() > 0
    # Control: the orthonormal element does not balance.
    g, contragredient = elements["orthonormal"]
    assert deviation(g @ SB @ g.mT, contragredient @ SA @ contragredient.mT) > 1e-3


@pytest.mark.parametrize("kind", ["balanced", "orthonormal"])
def test_symmetric_sections_commute_with_rotations(kind):
    x = random_pair((3,))
    rotation = O(4).random((3,), generator=generator(2), dtype=torch.float64)
    rotated = tuple(rotation @ factor for factor in x)
    expected = tuple(rotation @ factor for factor in sections.section(kind, *x)[0])
    assert deviation(sections.section(kind, *rotated)[0], expected) < 1e-11
    triangular = tuple(rotation @ factor for factor in sections.section("triangular", *x)[0])
    assert deviation(sections.section("triangular", *rotated)[0], triangular) > 1e-3


def test_triangular_section_is_fixed_under_triangular_elements():
    x = random_pair()
    g = GL(4).random(generator=generator(1), dtype=torch.float64).tril()
    g = g * g.diagonal().sign()
    moved = GL(4).act(g, x)
    dressed = sections.section("triangular", *x)[0]
    assert deviation(sections.section("triangular", *moved)[0], dressed) < 1e-10


def test_svd_signs_survive_ties():
    A, right = random_pair(m=4)
    # Every entry of a dressed row occurs with both signs, and rounding decides which is larger.
    disturbed = right * (1 + 1e-15 * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=right.dtype))
    x = A, torch.cat((right, -disturbed), dim=-1)
    y = A, torch.cat((disturbed, -right), dim=-1)
    assert deviation(x, y) < 1e-14
    dressed, _ = sections.section("svd", *x)
    assert deviation(sections.section("svd", *y)[0], dressed) < 1e-10


def test_balanced_section_is_smooth_where_singular_values_coincide():
    eye = torch.eye(4, dtype=torch.float64)
    h = GL(4).random(cond=20, generator=generator(4), dtype=torch.float64)
    g, _ = sections.balanced_element(*grams(GL(4).act(h, (eye, eye))))
    assert deviation(g @ h @ h.mT @ g, eye) < 1e-12
    nearby = GL(4).act(h, (eye, eye + 1e-9 * random_pair(m=4)[1]))
    assert deviation(sections.balanced_element(*grams(nearby))[0], g) < 1e-8


@pytest.mark.parametrize("kind", ["orthonormal", "triangular"])
def test_right_sections_are_defined_where_the_left_factor_vanishes(kind):
    A, B = random_pair()
    dressed, _ = sections.section(kind, torch.zeros_like(A), B)
    assert deviation(dressed[1] @ dressed[1].mT, torch.eye(4, dtype=B.dtype)) < 1e-12
    assert dressed[0].abs().max() == 0


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [0, 4, 6])
@batches
def test_rotary_balanced_element(batch_shape, rotary_dim, layout):
    group = RotaryCommutant(6, rotary_dim, layout)
    x = random_pair(batch_shape, r=6, n=9, m=8)
    g, contragredient = sections.rotary_balanced_element(group, *grams(x))
    group.check_element(g)
    identity = group.identity(batch_shape, dtype=torch.float64)
    assert deviation(g.mT @ contragredient, identity) < 1e-11
    dressed = group.act(g, x)

    def imbalance(pair):
        left, right = grams(pair)
        rows = slice(rotary_dim, 6)
        parts = [(left - right)[..., rows, rows].abs().amax()] if rotary_dim < 6 else []
        for plane in group.planes:
            difference = sum((left - right)[..., row, row] for row in plane)
            parts.append(difference.abs().amax())
        return max(part.item() for part in parts)

    assert imbalance(dressed) < 1e-11
    h = group.random(batch_shape, cond=20, generator=generator(5), dtype=torch.float64)
    moved = group.act(h, x)
    redressed = group.act(sections.rotary_balanced_element(group, *grams(moved))[0], moved)
    for left, right in zip(grams(dressed), grams(redressed), strict=True):
        for plane in group.planes:
            trace = [sum(S[..., row, row] for row in plane) for S in (left, right)]
            assert (trace[0] - trace[1]).abs().max() < 1e-10
    # Control: neither the raw pair nor one dressed by a general element is balanced in this group.
    assert imbalance(x) > 1e-3
    if rotary_dim:
        with pytest.raises(ValueError, match="does not commute"):
            group.check_element(sections.balanced_element(*grams(x))[0])


@batches
@pytest.mark.parametrize("kind", ["svd", "polar", "triangular"])
@pytest.mark.parametrize("rows", [8, 3, 2])
def test_gram_sections(kind, rows, batch_shape):
    M = GramQuotient(rows, 3, batch_shape=batch_shape)
    x = M.random_point(generator=generator(), dtype=torch.float64)
    dressed, g = M.section(x, kind)
    O(3).check_element(g)
    assert deviation(M.canonical_projection(dressed), M.canonical_projection(x)) < 1e-12
    assert deviation(M.act(g, x), dressed) < 1e-12
    assert deviation(M.section(dressed, kind)[0], dressed) < 1e-11
    h = O(3).random(batch_shape, generator=generator(1), dtype=torch.float64)
    assert deviation(M.section(M.act(h, x), kind)[0], dressed) < 1e-10
    if kind == "svd":
        squares = torch.linalg.svdvals(x).square()
        squares = torch.nn.functional.pad(squares, (0, 3 - squares.shape[-1]))
        assert deviation(dressed.mT @ dressed, torch.diag_embed(squares)) < 1e-11
    elif kind == "triangular":
        assert dressed.triu(1).abs().max() == 0
        assert dressed.diagonal(dim1=-2, dim2=-1).min() > 0
    else:
        leading = dressed[..., :3, : min(rows, 3)]
        assert deviation(leading, leading.mT) < 1e-12
        assert torch.linalg.eigvalsh(leading).min() > 0
    # Control: the orbit's points differ, and so does the section of another orbit.
    assert deviation(M.act(h, x), x) > 1e-3
    stretched = x * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert deviation(M.section(stretched, kind)[0], dressed) > 1e-3


@pytest.mark.parametrize("kind", FACTOR_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(kind, dtype):
    x = random_pair((3,), dtype=dtype)
    dressed, g = sections.section(kind, *x)
    assert all(factor.dtype == dtype for factor in dressed)
    assert g.dtype == torch.float32
    exact, _ = sections.section(kind, *(factor.double() for factor in x))
    tolerance = 4 * torch.finfo(dtype).eps
    assert deviation(tuple(factor.double() for factor in dressed), exact) < tolerance
    half_gram, _ = sections.element(kind, *(S.to(dtype) for S in grams(random_pair((3,)))))
    assert half_gram.dtype == torch.float32


def test_rank_deficiency_is_named():
    A, B = random_pair((2, 3))
    A[1, 2, 3] = A[1, 2, :3].sum(dim=0)
    with pytest.raises(ValueError, match=r"left factor A is rank-deficient \(batch index \(1, 2\)"):
        sections.section("balanced", A, B)
    B[0, 1] = 0
    with pytest.raises(ValueError, match=r"right factor B is rank-deficient \(batch index \(0, 1"):
        sections.section("orthonormal", A, B)
    sections.section("svd", A, B)
    B[0, 1] = float("nan")
    with pytest.raises(ValueError, match=r"factor B has non-finite entries \(batch index \(0, 1"):
        sections.section("svd", A, B)
    with pytest.raises(ValueError, match=r"right factor B has non-finite entries \(batch index"):
        sections.section("triangular", A, B)
    sections.section("triangular", A, B, check=False)
    vanishing = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="left factor A has a vanishing"):
        sections.rotary_balanced_element(RotaryCommutant(4), vanishing, torch.eye(4))
    X = random_pair((3,))[0].mT
    X[1, :, 0] = 0
    with pytest.raises(ValueError, match=r"leading 4 tokens .* dependent \(batch index \(1,\)\)"):
        sections.gram_polar(X)


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: sections.element("qr", torch.eye(2), torch.eye(2)), ValueError),
        (lambda: sections.gram_section("qr", torch.ones(3, 2)), ValueError),
        (lambda: sections.gram_svd(torch.ones(2, 0)), ValueError),
        (lambda: sections.svd_element(torch.ones(2, 3), torch.eye(2)), ValueError),
        (lambda: sections.svd_element(torch.eye(2), torch.eye(3)), ValueError),
        (lambda: sections.svd_element(torch.eye(2).long(), torch.eye(2)), TypeError),
        (lambda: sections.section("svd", torch.ones(2, 3), torch.ones(3, 3)), ValueError),
        (lambda: sections.section("svd", [1.0], torch.ones(3, 3)), TypeError),
        (
            lambda: sections.rotary_balanced_element(GL(2), torch.eye(2), torch.eye(2)),
            TypeError,
        ),
        (
            lambda: sections.rotary_balanced_element(
                RotaryCommutant(4), torch.eye(2), torch.eye(2)
            ),
            ValueError,
        ),
    ],
)
def test_bad_input(build, error):
    with pytest.raises(error, match=ONE_LINE):
        build()


# ---- balanced without singular vectors -----------------------------------------------------------


RANK, COLUMNS = 6, 20


def ill_conditioned(shape, size, cond, dtype=torch.float64):
    """Random matrices whose singular values go geometrically from 1 to 1/cond."""
    values = torch.logspace(0, -torch.tensor(float(cond)).log10(), size, dtype=torch.float64)
    left, right = (
        torch.linalg.qr(torch.randn(*shape, size, size, dtype=torch.float64)).Q for _ in range(2)
    )
    return (left * values @ right).to(dtype)


def factors(shape, cond):
    """A pair moved by a group element of that condition, and the element."""
    A, B = torch.randn(2, *shape, RANK, COLUMNS, dtype=torch.float64)
    g = ill_conditioned(shape, RANK, cond)
    return torch.linalg.inv(g).mT @ A, g @ B, g


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("cond", [1, 1e3])
def test_both_grams_are_equal_afterwards(shape, cond):
    A, B, _ = factors(shape, cond)
    g, contragredient = balancing_pair(A @ A.mT, B @ B.mT)
    left, right = (X @ X.mT for X in (contragredient @ A, g @ B))
    identity = torch.eye(RANK, dtype=torch.float64)
    assert (left - right).norm() < 1e-10 * left.norm()
    assert (g @ contragredient.mT - identity).abs().max() < 1e-11
    # The control: as they come they are not equal.
    assert (A @ A.mT - B @ B.mT).norm() > 0.1 * (A @ A.mT).norm()


@pytest.mark.parametrize("cond", [1, 1e3])
def test_it_is_the_svd_section_up_to_a_rotation(cond):
    A, B, _ = factors((4,), cond)
    grams = A @ A.mT, B @ B.mT
    ours, section = balancing_pair(*grams)[0], sections.svd_element(*grams)[0]
    turn = section @ torch.linalg.inv(ours)
    identity = torch.eye(RANK, dtype=torch.float64)
    assert (turn @ turn.mT - identity).abs().max() < 1e-10
    # The control: another pair's element is no rotation of it.
    other = section.roll(1, 0) @ torch.linalg.inv(ours)
    assert (other @ other.mT - identity).abs().max() > 0.1


def test_it_goes_with_the_group_up_to_a_rotation():
    A, B, _ = factors((4,), 10)
    field = balancing_pair(A @ A.mT, B @ B.mT)[0]
    g = ill_conditioned((4,), RANK, 100)
    moved_A, moved_B = torch.linalg.inv(g).mT @ A, g @ B
    moved = balancing_pair(moved_A @ moved_A.mT, moved_B @ moved_B.mT)[0]
    turn = moved @ g @ torch.linalg.inv(field)
    identity = torch.eye(RANK, dtype=torch.float64)
    assert (turn @ turn.mT - identity).abs().max() < 1e-10
    # The control: the law of the other factor, u g⁻ᵀ.
    wrong = moved @ torch.linalg.inv(g).mT @ torch.linalg.inv(field)
    assert (wrong @ wrong.mT - identity).abs().max() > 1


@pytest.mark.parametrize(
    ("dtype", "cond"), [(torch.float64, 1), (torch.float64, 1e12), (torch.float32, 1e5)]
)
def test_newtons_iteration_has_ended(dtype, cond):
    matrix = ill_conditioned((5,), 64, cond, dtype)
    Q = polar_factor_by_inverses(1e3 * matrix)
    H = Q.mT.double() @ matrix.double()
    eps = torch.finfo(dtype).eps
    assert (Q.mT @ Q - torch.eye(64, dtype=dtype)).abs().max() < 20 * eps
    # The other factor is symmetric and, to rounding, positive.
    assert (H - H.mT).abs().max() < 100 * eps
    assert torch.linalg.eigvalsh((H + H.mT) / 2).min() > -100 * eps
    # The control: the matrix itself is not orthogonal, nor is any orthogonal factor symmetric.
    wrong = Q.roll(1, 0).mT.double() @ matrix.double()
    assert (wrong - wrong.mT).abs().max() > 0.01

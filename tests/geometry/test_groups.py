"""Group axioms, the action on points, vectors and gradients, and Lie algebras."""

import pytest
import torch

from quotientopt.groups import (
    GL,
    O,
    PlaneCommutant,
    RotaryCommutant,
    RotaryPhases,
    StabilizerOfOnes,
    StructureGroup,
    commutant_of,
)
from tests.geometry.cases import BATCH_SHAPES, ONE_LINE, deviation, generator

GROUPS = [
    GL(1),
    GL(4),
    O(4),
    RotaryCommutant(6),
    RotaryCommutant(6, layout="interleaved"),
    RotaryCommutant(7, rotary_dim=4),
    RotaryCommutant(7, rotary_dim=4, layout="interleaved"),
    RotaryCommutant(3, rotary_dim=2),
    RotaryCommutant(3, rotary_dim=0),
    PlaneCommutant(6, [[(0, 3), (1, 4), (2, 5)]]),
    PlaneCommutant(9, [[(5, 1)], [(0, 2), (8, 6)]]),
    StabilizerOfOnes(2),
    StabilizerOfOnes(4),
]
group_cases = pytest.mark.parametrize("group", GROUPS, ids=repr)
batch_cases = pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)


def elements(group, batch_shape, count, cond=10.0, dtype=torch.float64):
    source = generator()
    return [
        group.random(batch_shape, cond=cond, generator=source, dtype=dtype) for _ in range(count)
    ]


def pair(group, batch_shape, seed=1):
    source = generator(seed)
    return tuple(
        torch.randn(*batch_shape, group.r, columns, generator=source, dtype=torch.float64)
        for columns in (8, 5)
    )


def rotary_rotation(group, seed=2):
    """A rotation by generic angles in every plane of a rotary group."""
    rotation = torch.eye(group.r, dtype=torch.float64)
    angles = torch.rand(len(group.planes), generator=generator(seed), dtype=torch.float64)
    if isinstance(group, PlaneCommutant):
        sizes = torch.tensor([len(planes) for planes in group.frequencies])
        angles = angles[: len(sizes)].repeat_interleave(sizes)
    for (first, second), angle in zip(group.planes, angles, strict=True):
        rotation[first, first] = rotation[second, second] = angle.cos()
        rotation[second, first], rotation[first, second] = angle.sin(), -angle.sin()
    return rotation


@batch_cases
@group_cases
def test_axioms(group, batch_shape):
    g, h, k = elements(group, batch_shape, 3)
    identity = group.identity(batch_shape, dtype=torch.float64)
    assert g.shape == identity.shape == (*batch_shape, group.r, group.r)
    assert deviation(group.compose(g, group.inverse(g)), identity) < 1e-12
    assert deviation(group.compose(group.inverse(g), g), identity) < 1e-12
    assert deviation(group.compose(g, identity), g) < 1e-15
    left, right = group.compose(group.compose(g, h), k), group.compose(g, group.compose(h, k))
    assert deviation(left, right) < 1e-12
    for member in (g, identity, group.compose(g, h), group.inverse(g)):
        group.check_element(member)


@batch_cases
@group_cases
def test_act_is_a_left_action_that_keeps_the_invariant(group, batch_shape):
    g, h = elements(group, batch_shape, 2)
    x = pair(group, batch_shape)
    stepwise = group.act(g, group.act(h, x))
    assert deviation(group.act(group.compose(g, h), x), stepwise) < 1e-11
    moved = group.act(g, x)
    assert deviation(moved[0].mT @ moved[1], x[0].mT @ x[1]) < 1e-11
    assert deviation(group.act_tangent(g, x), moved) == 0
    if group.r > 1 and not isinstance(group, O):
        # Controls: the other order, and the contragredience forgotten.
        if not isinstance(group, RotaryCommutant) or len(group.pass_rows) > 1:
            assert deviation(group.act(group.compose(h, g), x), stepwise) > 1e-3
        assert deviation((g @ x[0]).mT @ (g @ x[1]), x[0].mT @ x[1]) > 1e-3


@batch_cases
@group_cases
def test_gradients_move_contragrediently(group, batch_shape):
    (g,) = elements(group, batch_shape, 1)
    tangent, gradient = pair(group, batch_shape), pair(group, batch_shape, seed=3)

    def pairing(u, v):
        return sum((a * b).sum(dim=(-2, -1)) for a, b in zip(u, v, strict=True))

    before = pairing(tangent, gradient)
    moved = pairing(group.act_tangent(g, tangent), group.act_gradient(g, gradient))
    assert (moved - before).abs().max() < 1e-10
    if not isinstance(group, O):
        wrong = pairing(group.act_tangent(g, tangent), group.act_tangent(g, gradient))
        assert (wrong - before).abs().max() > 1e-3


@batch_cases
@group_cases
@pytest.mark.parametrize("cond", [1.0, 1000.0])
def test_random_elements_have_the_condition_number_asked_for(group, batch_shape, cond):
    (g,) = elements(group, batch_shape, 1, cond=cond)
    group.check_element(g)
    expected = 1.0 if isinstance(group, O) or group.r == 1 else cond
    measured = torch.linalg.cond(g)
    assert ((measured - expected).abs() / expected).max() < 1e-10


def test_random_elements_repeat_with_the_generator_and_take_dtype():
    for group in GROUPS:
        assert torch.equal(*(group.random(generator=generator(5)) for _ in range(2)))
        assert group.random(dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "group",
    [g for g in GROUPS if isinstance(g, RotaryCommutant | PlaneCommutant)],
    ids=repr,
)
def test_commutant_commutes_with_rotations(group):
    rotation = rotary_rotation(group)
    (g,) = elements(group, (3,), 1)
    assert (g @ rotation - rotation @ g).abs().max() < 1e-12
    if group.planes:
        (stranger,) = elements(GL(group.r), (3,), 1)
        assert (stranger @ rotation - rotation @ stranger).abs().max() > 1e-3
        with pytest.raises(ValueError, match="does not commute"):
            group.check_element(stranger)


@pytest.mark.parametrize("group", [g for g in GROUPS if isinstance(g, PlaneCommutant)], ids=repr)
def test_nothing_else_commutes_with_repeated_frequencies(group):
    """The dimension is that of all matrices that commute with a generic rotation."""
    rotation = rotary_rotation(group)
    eye = torch.eye(group.r, dtype=torch.float64)
    equations = torch.kron(rotation, eye) - torch.kron(eye, rotation.mT.contiguous())
    assert group.r**2 - torch.linalg.matrix_rank(equations) == group.dim
    # Control: where every plane has a frequency of its own, a smaller group is left.
    single = PlaneCommutant(group.r, [[plane] for plane in group.planes])
    other = rotary_rotation(single)
    (g,) = elements(group, (), 1)
    assert (g @ other - other @ g).abs().max() > 1e-3
    with pytest.raises(ValueError, match="does not commute"):
        single.check_element(g)
    assert single.dim < group.dim
    (h,) = elements(single, (), 1)
    group.check_element(h)


@batch_cases
@pytest.mark.parametrize("group", [g for g in GROUPS if isinstance(g, PlaneCommutant)], ids=repr)
def test_blocks_of_repeated_frequencies_are_complex(group, batch_shape):
    g, _ = elements(group, batch_shape, 2)
    X, Y = pair(group, batch_shape), pair(group, batch_shape, seed=5)
    X, Y = X[0], Y[0]
    parts, block = group.parts(g)
    assert deviation(group.element(parts, block), g) == 0
    (rows, passing), (moved, moved_passing) = (group.complex_rows(Z) for Z in (X, g @ X))
    for part, own, new in zip(parts, rows, moved, strict=True):
        assert (part @ own - new).abs().max() < 1e-12
    assert deviation(block @ passing, moved_passing) < 1e-12
    products = group.row_products(X @ Y.mT)
    assert deviation(group.row_products(g @ X @ Y.mT), g @ products) < 1e-12
    assert deviation(group.row_products(g.mT @ X @ Y.mT), g @ products) > 1e-3
    # The nearest orthogonal element, and the Cholesky factor of rows in order.
    k = group.unitary_factor(g)
    O(group.r).check_element(k)
    group.check_element(k)
    gap = torch.linalg.matrix_norm(g - k)
    other = group.unitary_factor(g @ g)
    assert (torch.linalg.matrix_norm(g - other) > gap + 1e-6).all()
    order = list(group.row_order)
    gram = group.in_order().row_products((X @ X.mT)[..., order, :][..., order])
    group.in_order().check_element(torch.linalg.cholesky(gram))


def test_orthogonal_elements_of_repeated_frequencies():
    commutant = PlaneCommutant(9, [[(5, 1)], [(0, 2), (8, 6)]])
    group = RotaryPhases.of(commutant)
    assert group.dim == 1 + 4 + 3
    (g,) = elements(group, (3,), 1)
    group.check_element(g)
    matrices = torch.eye(81, dtype=torch.float64).view(81, 9, 9)
    projected = group.algebra_projection(matrices).flatten(1)
    assert torch.linalg.matrix_rank(projected) == group.dim
    with pytest.raises(ValueError, match="does not commute"):
        group.check_element(O(9).random(generator=generator(1), dtype=torch.float64))
    assert eval(repr(group)) == group != RotaryPhases(9, 6)


def test_the_simplest_commutant_is_taken():
    half = RotaryCommutant(8).planes
    assert commutant_of(8, half, [1.0, 0.1, 0.2, 0.3]) == RotaryCommutant(8)
    assert commutant_of(9, half[:3], [0.0] * 3) == GL(9)
    pairs = [(0, 1), (2, 3)]
    assert commutant_of(5, pairs, [2.0, 1.0]) == RotaryCommutant(5, 4, "interleaved")
    tail = [(4, 6), (5, 7)]
    assert commutant_of(8, tail, [2.0, 1.0]) == PlaneCommutant(8, [[plane] for plane in tail])
    assert commutant_of(8, half, [1.0, 0.1, 0.1, -0.1]) == PlaneCommutant(
        8, [[(0, 4)], [(1, 5), (2, 6), (7, 3)]]
    )
    # Angles along two axes of an image: equal on one of them alone is not equal.
    axes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert commutant_of(8, half, axes) == PlaneCommutant(8, [[(0, 4), (2, 6)], [(1, 5)]])
    # The same planes in another order, or all the other way round, are the same group.
    assert PlaneCommutant(4, [[(3, 1), (2, 0)]]) == PlaneCommutant(4, [[(0, 2), (1, 3)]])
    assert PlaneCommutant(4, [[(3, 1), (0, 2)]]) != PlaneCommutant(4, [[(0, 2), (1, 3)]])


def test_rotary_layouts():
    assert RotaryCommutant(6, 4).planes == ((0, 2), (1, 3))
    assert RotaryCommutant(6, 4, "interleaved").planes == ((0, 1), (2, 3))
    assert RotaryCommutant(6, 4).pass_rows == (4, 5)
    half, interleaved = RotaryCommutant(8), RotaryCommutant(8, layout="interleaved")
    rotation = rotary_rotation(interleaved)
    (g,) = elements(half, (), 1)
    assert (g @ rotation - rotation @ g).abs().max() > 1e-3


@batch_cases
@group_cases
def test_algebra_projection(group, batch_shape):
    source = generator(4)
    M, N = torch.randn(
        2, *batch_shape, group.r, group.r, generator=source, dtype=torch.float64
    ).unbind(0)
    projected = group.algebra_projection(M)
    assert deviation(group.algebra_projection(projected), projected) < 1e-15
    self_adjoint = (projected * N).sum() - (M * group.algebra_projection(N)).sum()
    assert self_adjoint.abs() < 1e-12
    basis = torch.eye(group.r**2, dtype=torch.float64).reshape(-1, group.r, group.r)
    image = group.algebra_projection(basis).reshape(-1, group.r**2)
    assert torch.linalg.matrix_rank(image) == group.dim
    group.check_element(torch.linalg.matrix_exp(projected))
    if group.dim < group.r**2:
        with pytest.raises(ValueError, match="not"):
            group.check_element(torch.linalg.matrix_exp(M))


def test_low_precision_pairs_keep_their_dtype():
    group = GL(4)
    (g,) = elements(group, (), 1)
    x = pair(group, ())
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        low = tuple(factor.to(dtype) for factor in x)
        moved = group.act(g.float(), low)
        assert all(factor.dtype == dtype for factor in moved)
        reference = group.act(g.float().double(), tuple(factor.double() for factor in low))
        assert deviation(tuple(factor.double() for factor in moved), reference) < tolerance


def test_equality_hash_and_repr():
    assert GL(3) == GL(3)
    assert GL(3) != O(3)
    assert GL(3) != GL(4)
    assert RotaryCommutant(4) != RotaryCommutant(4, layout="interleaved")
    assert len({GL(3), GL(3), O(3), RotaryCommutant(4), RotaryCommutant(4)}) == 3
    assert GL(3) != "GL(3)"
    for group in GROUPS:
        assert eval(repr(group)) == group


@pytest.mark.parametrize(
    "build",
    [
        lambda: GL(0),
        lambda: O(-1),
        lambda: GL(2.0),
        lambda: RotaryCommutant(6, 3),
        lambda: RotaryCommutant(6, 8),
        lambda: RotaryCommutant(6, -2),
        lambda: RotaryCommutant(5),
        lambda: RotaryCommutant(6, layout="quarter"),
        lambda: PlaneCommutant(4, [[(0, 4)]]),
        lambda: PlaneCommutant(4, [[(0, 1)], [(1, 2)]]),
        lambda: PlaneCommutant(4, [[]]),
        lambda: PlaneCommutant(4, [[(0, 1), (2, 3)]]).inverse(torch.zeros(4, 4)),
        lambda: GL(3).random(cond=0.5),
        lambda: GL(3).check_element(torch.ones(3, 3)),
        lambda: GL(3).check_element(torch.full((3, 3), float("nan"))),
        lambda: GL(3).inverse(torch.zeros(2, 3, 3)),
        lambda: RotaryCommutant(4).inverse(torch.zeros(4, 4)),
        lambda: GL(3).compose(torch.eye(3), torch.eye(4)),
        lambda: GL(3).act(torch.eye(3), (torch.ones(4, 2), torch.ones(3, 2))),
        lambda: O(3).check_element(2 * torch.eye(3)),
    ],
)
def test_bad_values(build):
    with pytest.raises(ValueError, match=ONE_LINE):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: GL(3).act(torch.eye(3), torch.ones(3, 2)),
        lambda: GL(2).check_element(torch.eye(2, dtype=torch.int64)),
        lambda: GL(2).act(torch.eye(2), (torch.ones(2, 2), torch.ones(2, 2).long())),
    ],
)
def test_bad_types(build):
    with pytest.raises(TypeError, match=ONE_LINE):
        build()


@batch_cases
@pytest.mark.parametrize("group", [g for g in GROUPS if isinstance(g, RotaryCommutant)], ids=repr)
def test_rotary_products_of_rows_are_complex(group, batch_shape):
    X, _ = pair(group, batch_shape)
    Y, _ = pair(group, batch_shape, seed=5)
    products = group.row_products(X @ Y.mT)
    assert deviation(group.algebra_projection(products), products) < 1e-14
    for j, k in group.planes:
        x, y = (torch.complex(Z[..., j, :], Z[..., k, :]) for Z in (X, Y))
        h = (y.conj() * x).sum(dim=-1)
        assert (products[..., j, j] - h.real).abs().max() < 1e-12
        assert (products[..., k, j] - h.imag).abs().max() < 1e-12
    rows = slice(group.rotary_dim, group.r)
    if group.pass_rows:
        assert deviation(products[..., rows, rows], (X @ Y.mT)[..., rows, rows]) < 1e-14
    planes, passing = group.complex_rows(X), X[..., rows, :]
    assert torch.equal(group.from_complex_rows(planes, passing), X)
    # They transform like the rows: h(y, c x) = c h(y, x).
    (g,) = elements(group, batch_shape, 1)
    assert deviation(group.row_products(g @ X @ Y.mT), g @ products) < 1e-12
    if group.planes:
        # Control: products of real rows do not.
        assert deviation(group.row_products(g.mT @ X @ Y.mT), g @ products) > 1e-3
        assert deviation(products, X @ Y.mT) > 1e-3


@batch_cases
@pytest.mark.parametrize("group", [g for g in GROUPS if isinstance(g, RotaryCommutant)], ids=repr)
def test_unitary_factor_is_the_nearest_compact_element(group, batch_shape):
    M = torch.randn(*batch_shape, group.r, group.r, generator=generator(6), dtype=torch.float64)
    k = group.unitary_factor(M)
    O(group.r).check_element(k)
    group.check_element(k)
    gap = torch.linalg.matrix_norm(M - k)
    for seed in range(5):
        Lambda = group.algebra_projection(
            torch.randn(k.shape, generator=generator(seed), dtype=torch.float64)
        )
        turned = k @ torch.linalg.matrix_exp(0.1 * (Lambda - Lambda.mT))
        assert (torch.linalg.matrix_norm(M - turned) >= gap - 1e-12).all()
    # Control: the opposite element is further away.
    assert (torch.linalg.matrix_norm(M + k) > gap + 1e-3).all()
    if group.planes:
        numbers = torch.polar(*torch.rand(2, len(group.planes), dtype=torch.float64))
        block = torch.eye(group.r - group.rotary_dim, dtype=torch.float64)
        group.check_element(group.element(numbers, block))


@batch_cases
@pytest.mark.parametrize("d", [2, 5])
def test_stabilizer_moves_what_is_orthogonal_to_ones(d, batch_shape):
    group = StabilizerOfOnes(d)
    X = torch.randn(*batch_shape, 6, d, generator=generator(7), dtype=torch.float64)
    (g,) = elements(group, batch_shape, 1)
    ones = torch.ones(d, 1, dtype=torch.float64)
    assert deviation(g @ ones, ones.expand(*batch_shape, d, 1)) < 1e-13
    centred = X - X.mean(dim=-1, keepdim=True)
    assert deviation(group.from_moving_part(group.moving_part(X)), centred) < 1e-13
    lengths = [torch.linalg.vector_norm(Z, dim=-1) for Z in (group.moving_part(X), centred)]
    assert (lengths[0] - lengths[1]).abs().max() < 1e-13
    h = O(d - 1).random(batch_shape, generator=generator(8), dtype=torch.float64)
    element = group.element_of_moving(h)
    group.check_element(element)
    assert deviation(group.moving_part(X @ element.mT), group.moving_part(X) @ h.mT) < 1e-12
    # Control: rotations of all of R^d move 1.
    with pytest.raises(ValueError, match="does not fix the all-ones vector"):
        group.check_element(-group.identity(batch_shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="d must be at least 2"):
        StabilizerOfOnes(1)


def test_a_group_that_draws_no_elements_says_so():
    class Silent(GL):
        _random = StructureGroup._random

    with pytest.raises(NotImplementedError, match="Silent draws no random elements"):
        Silent(3).random()

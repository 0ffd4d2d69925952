"""Balanced dressing without singular vectors, against the section that has them."""

import pytest
import torch

from quotientopt.optim.dressing import balancing_pair, polar_factor_by_inverses
from quotientopt.sections import svd_element

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
    ours, section = balancing_pair(*grams)[0], svd_element(*grams)[0]
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

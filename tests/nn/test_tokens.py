"""Dressed tokens: invariant, canonical, with gradients that are exact or finite."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from quotientopt import sections
from quotientopt.groups import O, StabilizerOfOnes
from quotientopt.models.gpt import GPTBlock
from quotientopt.nn.tokens import CausalDressing, DressedTokens, dress_tokens

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own
ONE_LINE = r"\A.+\Z"
BATCH_SHAPES = ((), (3,), (2, 3))
batches = pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)
kinds = pytest.mark.parametrize("kind", ["svd", "polar", "triangular"])
shapes = pytest.mark.parametrize("shape", [(7, 4), (4, 4), (3, 6)], ids=str)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def rotation(batch_shape, d, group=O, seed=9):
    return group(d).random(batch_shape, generator=generator(seed), dtype=torch.float64)


def with_values(values, rows, columns, batch_shape=(), seed=0):
    """Token matrices with given singular values."""
    k = len(values)
    left, _ = torch.linalg.qr(randn(*batch_shape, rows, k, seed=seed))
    right, _ = torch.linalg.qr(randn(*batch_shape, columns, k, seed=seed + 1))
    return left * torch.tensor(values, dtype=torch.float64) @ right.mT


@batches
@shapes
@kinds
def test_dressed_tokens_are_those_of_the_orbit(kind, shape, batch_shape):
    X = randn(*batch_shape, *shape)
    moved = X @ rotation(batch_shape, shape[-1])
    dressed = dress_tokens(X, kind)
    assert dressed.shape == X.shape
    assert (dress_tokens(moved, kind) - dressed).abs().max() < 1e-12
    assert (dressed @ dressed.mT - X @ X.mT).abs().max() < 1e-12
    assert (dress_tokens(dressed, kind) - dressed).abs().max() < 1e-12
    # Control: the tokens themselves differ, and another orbit is dressed to something else.
    assert (moved - X).abs().max() > 0.1
    assert (dress_tokens(X * torch.arange(1.0, 1 + shape[-1]), kind) - dressed).abs().max() > 0.1


@batches
@shapes
def test_what_each_section_normalises(shape, batch_shape):
    X, size = randn(*batch_shape, *shape), min(shape)
    svd = dress_tokens(X, "svd")
    values = torch.linalg.svdvals(X)
    squares = torch.zeros(*batch_shape, shape[-1], dtype=torch.float64)
    squares[..., :size] = values.square()
    assert (svd.mT @ svd - torch.diag_embed(squares)).abs().max() < 1e-12
    largest = svd.gather(-2, svd.abs().argmax(dim=-2, keepdim=True))
    assert largest[..., :size].min() > 0
    polar = dress_tokens(X, "polar")
    block = polar[..., :size, :size]
    assert (block - block.mT).abs().max() < 1e-12
    assert torch.linalg.eigvalsh(block).min() > 0
    assert polar[..., :size, size:].abs().sum() == 0
    assert (svd.mT @ svd - polar.mT @ polar).abs().max() > 0.1
    triangular = dress_tokens(X, "triangular")
    block = triangular[..., :size, :size]
    assert block.triu(1).abs().sum() == 0
    assert block.diagonal(dim1=-2, dim2=-1).min() > 0
    assert triangular[..., size:].abs().sum() == 0
    assert (block @ block.mT - (X @ X.mT)[..., :size, :size]).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["svd", "polar"])
def test_they_are_the_sections_of_the_gram_quotient(kind):
    X = randn(2, 7, 4)
    assert (dress_tokens(X, kind) - sections.gram_section(kind, X)[0]).abs().max() < 1e-12


@kinds
@shapes
def test_under_the_stabilizer_of_ones(kind, shape):
    X = randn(2, *shape)
    group = StabilizerOfOnes(shape[-1])
    dressed = dress_tokens(X, kind, stabilizer=group)
    moved = X @ rotation((2,), shape[-1], StabilizerOfOnes)
    assert (dress_tokens(moved, kind, stabilizer=group) - dressed).abs().max() < 1e-12
    assert (dressed.sum(-1) - X.sum(-1)).abs().max() < 1e-12
    assert (dressed @ dressed.mT - X @ X.mT).abs().max() < 1e-12
    other = X @ rotation((2,), shape[-1])
    assert (dress_tokens(other, kind, stabilizer=group) - dressed).abs().max() > 0.1
    assert (dress_tokens(moved, kind) - dress_tokens(X, kind)).abs().max() < 1e-12


@shapes
@kinds
@pytest.mark.parametrize("group", [O, StabilizerOfOnes])
def test_gradients(kind, shape, group):
    X = with_values((4.0, 2.0, 1.0, 0.4)[: min(shape)], *shape, batch_shape=(2,))
    if group is StabilizerOfOnes:
        X = X + 0.1 * randn(2, *shape, seed=4)
    X.requires_grad_()

    def dressed(X):
        return dress_tokens(X, kind, stabilizer=group(shape[-1]))

    assert gradcheck(dressed, (X,))
    assert gradgradcheck(dressed, (X,), fast_mode=True)


# ---- equal and nearly equal singular values -----------------------------------------------------

GAPS = (0.0, 1e-14, 1e-10, 1e-8, 3e-8, 1e-6)
STEPS = pytest.mark.parametrize("gap", GAPS)


def of_the_subspaces(dressed):
    """Sees the Gram matrix only: smooth, whatever the gaps."""
    G = dressed @ dressed.mT
    return (G.sin() * randn(*G.shape[-2:], seed=7)).sum() + (G @ G).square().sum() / 50


def naive(X):
    """The section "svd" with the derivative of torch.linalg.svd."""
    _, _, Vt = torch.linalg.svd(X, full_matrices=False)
    return X @ Vt.mT


@STEPS
@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (3, 3)], ids=str)
def test_functions_that_do_not_see_the_axes(shape, gap):
    X = with_values((2.0, 1.0 + gap, 1.0), *shape, batch_shape=(2,)).requires_grad_()
    direction = randn(2, *shape, seed=3)
    (gradient,) = torch.autograd.grad(of_the_subspaces(dress_tokens(X)), X)
    with torch.no_grad():
        at = {k: of_the_subspaces(dress_tokens(X + k * 1e-5 * direction)) for k in (-2, -1, 1, 2)}
        expected = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / 12e-5
    found = (gradient * direction).sum()
    assert expected.abs() > 0.1
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_functions_that_see_an_equal_block_as_a_whole():
    """Projections to a block of equal singular values, which its axes do not change.

    At equality the block is as smooth as the gap to the others allows.
    """

    def function(dressed):
        block = dressed[..., 1:3] @ dressed[..., 1:3].mT
        return (block.sin() * randn(*block.shape[-2:], seed=7)).sum()

    X = with_values((2.0, 1.0, 1.0, 0.3), 6, 4).requires_grad_()
    direction = randn(6, 4, seed=3)
    (gradient,) = torch.autograd.grad(function(dress_tokens(X)), X)
    with torch.no_grad():
        at = {k: function(dress_tokens(X + k * 1e-5 * direction)) for k in (-2, -1, 1, 2)}
    expected = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / 12e-5
    assert (gradient * direction).sum().item() == pytest.approx(expected.item(), rel=1e-6)


@kinds
@shapes
def test_forward_mode(kind, shape):
    """Jacobians, and Hessians forward over reverse, are those of reverse mode."""
    X = randn(*shape)

    def dressed(X):
        return dress_tokens(X, kind, check=False)

    forward, reverse = torch.func.jacfwd(dressed)(X), torch.func.jacrev(dressed)(X)
    assert (forward - reverse).abs().max() < 1e-10 * reverse.abs().max()

    def number(X):
        return dressed(X).pow(3).sum()

    hessian = torch.func.hessian(number)(X)
    expected = torch.autograd.functional.hessian(number, X)
    assert expected.abs().max() > 1e-2
    assert (hessian - expected).abs().max() < 1e-9 * expected.abs().max()
    batch = torch.stack((X, 2 * X))
    assert (torch.func.vmap(dressed)(batch) - dressed(batch)).abs().max() < 1e-12


@pytest.mark.parametrize("gap", [0.0, 1e-15])
def test_the_derivative_of_torch_fails_there(gap):
    X = with_values((2.0, 1.0 + gap, 1.0), 6, 3)
    if gap == 0:
        X = torch.cat((torch.eye(3), torch.zeros(3, 3))).double()
    X.requires_grad_()
    weights = randn(6, 3, seed=5)
    (theirs,) = torch.autograd.grad((naive(X) * weights).sum(), X)
    assert not torch.isfinite(theirs).all() or theirs.abs().max() > 1e10
    (ours,) = torch.autograd.grad((dress_tokens(X) * weights).sum(), X)
    assert torch.isfinite(ours).all()
    assert ours.abs().max() < 1e3


@STEPS
@pytest.mark.parametrize("shape", [(6, 3), (3, 6)], ids=str)
def test_gradients_are_finite_twice(shape, gap):
    X = with_values((2.0, 1.0 + gap, 1.0), *shape).requires_grad_()
    loss = (dress_tokens(X) * randn(*shape, seed=5)).sum()
    (gradient,) = torch.autograd.grad(loss, X, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), X)
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(second).all()


def test_the_tolerance_bounds_the_gradient():
    X = with_values((2.0, 1.0 + 1e-6, 1.0), 6, 3).requires_grad_()
    weights = randn(6, 3, seed=5)
    sizes = []
    for tolerance in (1e-8, 1e-4, 1e-2):
        loss = (dress_tokens(X, tolerance=tolerance) * weights).sum()
        sizes.append(torch.autograd.grad(loss, X)[0].norm().item())
    assert sizes[0] > 1e5 > 1e3 > sizes[1] > sizes[2]
    # Below every gap the tolerance does not enter.
    first, second = (
        torch.autograd.grad((dress_tokens(X, tolerance=t) * weights).sum(), X)[0]
        for t in (1e-8, 1e-7)
    )
    assert torch.equal(first, second)


def test_the_gap_is_told():
    X = torch.stack([with_values((2.0, 1.5, v), 6, 3, seed=2) for v in (1.2, 1.5 - 1e-9)])
    tokens, gap = dress_tokens(X, return_gap=True)
    assert torch.equal(tokens, dress_tokens(X))
    assert gap.tolist() == pytest.approx([0.15, 0.5e-9], rel=1e-5)
    with pytest.raises(ValueError, match=r"gap of X is 5.0e-10 \(batch index \(1,\)\).*polar"):
        dress_tokens(X, strict=True)
    assert torch.equal(dress_tokens(X, strict=True, tolerance=1e-10), tokens)
    assert dress_tokens(torch.ones(4, 1), return_gap=True).gap == torch.inf
    X = with_values((2.0, 0.5), 2, 5)
    assert isinstance(dress_tokens(X, return_gap=True), DressedTokens)
    assert dress_tokens(X, return_gap=True).gap.item() == pytest.approx(0.75)
    assert dress_tokens(X, "polar", return_gap=True).gap.item() == pytest.approx(0.25)


# ---- ranks and dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (4, 4)], ids=str)
def test_deficient_ranks(shape):
    X = with_values((3.0, 1.0), *shape, batch_shape=(2,)).requires_grad_()
    dressed = dress_tokens(X)
    assert dressed[..., 2:].abs().max() == 0
    assert (dressed @ dressed.mT - X @ X.mT).abs().max() < 1e-12
    moved = X @ rotation((2,), shape[-1])
    assert (dress_tokens(moved) - dressed).abs().max() < 1e-12
    (gradient,) = torch.autograd.grad((dressed * randn(2, *shape, seed=2)).sum(), X)
    assert torch.isfinite(gradient).all()
    # Exact along changes that keep the rank: (X + tY)-s with the same row and column spaces.
    change = X.detach() @ X.detach().mT @ X.detach()
    with torch.no_grad():
        ends = [dress_tokens(X + t * change) for t in (1e-5, -1e-5)]
    slope = ((ends[0] - ends[1]) / 2e-5 * randn(2, *shape, seed=2)).sum()
    assert (gradient * change).sum().item() == pytest.approx(slope.item(), rel=1e-6)
    with pytest.raises(ValueError, match="leading 4 tokens of X are linearly dependent"):
        dress_tokens(X, "polar")


def test_zero_tokens():
    X = torch.zeros(3, 2, requires_grad=True)
    dressed, gap = dress_tokens(X, return_gap=True)
    assert dressed.abs().max() == 0
    assert gap == torch.inf
    (gradient,) = torch.autograd.grad(dressed.sum(), X)
    assert gradient.abs().max() == 0


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(kind, dtype):
    X = with_values((4.0, 2.0, 1.0), 6, 3, batch_shape=(2,)).to(dtype).requires_grad_()
    dressed, gap = dress_tokens(X, kind, return_gap=True)
    assert dressed.dtype == dtype
    assert gap.dtype == torch.float32
    exact = X.detach().double().requires_grad_()
    expected = dress_tokens(exact, kind)
    scale = expected.abs().max()
    assert (dressed.double() - expected).abs().max() < torch.finfo(dtype).eps * scale
    weights = randn(2, 6, 3).to(dtype)
    (gradient,) = torch.autograd.grad((dressed * weights).sum(), X)
    (true,) = torch.autograd.grad((expected * weights.double()).sum(), exact)
    assert gradient.dtype == dtype
    assert (gradient.double() - true).abs().max() < torch.finfo(dtype).eps * true.abs().max()


def test_a_batch_is_a_loop():
    X = randn(2, 3, 5, 4)
    loop = torch.stack([dress_tokens(x) for x in X.flatten(0, 1)]).unflatten(0, (2, 3))
    assert (dress_tokens(X) - loop).abs().max() < 1e-13


def test_condition_is_not_squared():
    """Short columns keep their precision: a Gram matrix would lose those below 1e-8."""
    X = with_values((1.0, 1e-5, 1e-10), 6, 3)
    dressed = dress_tokens(X)
    assert dressed.norm(dim=0).tolist() == pytest.approx([1, 1e-5, 1e-10], rel=1e-4)


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: dress_tokens(torch.ones(3, 2), "qr"), ValueError),
        (lambda: dress_tokens(torch.ones(3)), ValueError),
        (lambda: dress_tokens(torch.ones(0, 3)), ValueError),
        (lambda: dress_tokens([1.0]), TypeError),
        (lambda: dress_tokens(torch.ones(3, 2).long()), TypeError),
        (lambda: dress_tokens(torch.ones(3, 2).cfloat()), TypeError),
        (lambda: dress_tokens(torch.ones(3, 2, device="meta")), ValueError),
        (lambda: dress_tokens(torch.full((3, 2), torch.nan)), ValueError),
        (lambda: dress_tokens(torch.ones(3, 2), stabilizer=O(3)), ValueError),
        (lambda: dress_tokens(torch.ones(3, 2), stabilizer="ones"), ValueError),
        (lambda: dress_tokens(torch.ones(3, 2), tolerance=0.0), ValueError),
        (lambda: dress_tokens(torch.ones(3, 2), tolerance=2.0), ValueError),
    ],
)
def test_bad_input(build, error):
    with pytest.raises(error, match=ONE_LINE):
        build()


# ---- causality -----------------------------------------------------------------------------------

CAUSAL_SHAPES = pytest.mark.parametrize("shape", [(12, 5), (9, 9), (6, 20), (150, 12)], ids=str)


def with_repeats(X):
    """A token twice, one of zeros and one in the span of others, in the first batch item only."""
    X = X.clone()
    X[0, 1], X[0, 3], X[0, 4] = -2 * X[0, 0], 0, X[0, 2] + 3 * X[0, 0]
    return X


@CAUSAL_SHAPES
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_later_tokens_change_nothing_to_the_last_bit(shape, repeats, dtype):
    X, other = randn(3, *shape), randn(3, *shape, seed=5)
    X = (with_repeats(X) if repeats else X).to(dtype)
    dressed = dress_tokens(X, "triangular", causal=True)
    for t in {1, 2, 4, 5, shape[0] // 2, shape[0] - 1}:
        changed = torch.cat((X[:, :t], 1e3 * other[:, t:].to(dtype)), dim=1)
        assert torch.equal(dress_tokens(changed, "triangular")[:, :t], dressed[:, :t])
        assert torch.equal(dress_tokens(X[:, :t], "triangular"), dressed[:, :t])
    # Neither does the rest of the batch, nor whether anything is checked on the way.
    assert torch.equal(dress_tokens(X[0], "triangular"), dressed[0])
    assert torch.equal(dress_tokens(X, "triangular", check=False), dressed)


@pytest.mark.parametrize("kind", ["svd", "polar"])
def test_the_other_sections_leak(kind):
    X = randn(12, 20)
    changed = torch.cat((X[:8], randn(4, 20, seed=1)))
    difference = dress_tokens(changed, kind)[:8] - dress_tokens(X, kind)[:8]
    assert difference.abs().max() > 0.5
    with pytest.raises(ValueError, match=f"section '{kind}' lets tokens depend on later ones"):
        dress_tokens(X, kind, causal=True)


@CAUSAL_SHAPES
@pytest.mark.parametrize("repeats", [False, True])
def test_the_triangular_section_is_invariant(shape, repeats):
    X = randn(3, *shape)
    X = with_repeats(X) if repeats else X
    moved = X @ rotation((3,), shape[-1])
    dressed = dress_tokens(X, "triangular")
    # The smallest distance from a span is what rounding is divided by.
    X_gap = dress_tokens(X[1:], "triangular", return_gap=True).gap.min()
    bound = 1e-14 * X.norm(dim=-1).max() / X_gap.clamp(max=1)
    assert (dress_tokens(moved, "triangular") - dressed).abs().max() < max(bound, 1e-13)
    assert (dressed @ dressed.mT - X @ X.mT).abs().max() < 1e-12
    assert torch.equal(dress_tokens(dressed, "triangular").sign(), dressed.sign())


def test_dependent_tokens_have_no_column():
    dressed, gap = dress_tokens(with_repeats(randn(2, 7, 5)), "triangular", return_gap=True)
    assert gap[0] == 0
    assert gap[1] > 1e-3
    first = dressed[0]
    assert torch.equal(first[3], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(first[1, 1:], torch.zeros(4, dtype=torch.float64))
    assert first[[0, 2, 5, 6], [0, 1, 2, 3]].min() > 0  # echelon form
    with pytest.raises(ValueError, match=r"relative gap of X is 0\.0e"):
        dress_tokens(with_repeats(randn(2, 7, 5)), "triangular", strict=True)


@CAUSAL_SHAPES
def test_a_cache_gives_the_same_rows(shape):
    X = with_repeats(randn(3, *shape)).float()
    whole = dress_tokens(X, "triangular")
    for group in (None, StabilizerOfOnes(shape[-1])):
        dressing = CausalDressing(stabilizer=group)
        rows = [dressing.append(X[:, :3]), dressing.append(X[:, 3:4])]
        rows += [dressing.append(X[:, i : i + 2]) for i in range(4, shape[0], 2)]
        rows = torch.cat(rows, dim=1)
        assert dressing.axes.reflectors.shape[-2] <= shape[1]
        if group is None:
            assert torch.equal(rows, whole)
        else:
            expected = dress_tokens(X, "triangular", stabilizer=group)
            assert (rows - expected).abs().max() < 1e-5
            assert (rows - whole).abs().max() > 0.1
    dressing = CausalDressing()
    dressing.append(X[:, :4])
    dressing.select(torch.tensor([2, 0]))
    assert torch.equal(dressing.append(X[[2, 0], 4:]), whole[[2, 0], 4:])
    with pytest.raises(ValueError, match=r"tokens before these have shape \(2, 'M', .*float32"):
        dressing.append(X[:, :1])


def test_gradients_of_a_prefix_are_zero_later():
    X = with_repeats(randn(2, 8, 6)).requires_grad_()
    loss = (dress_tokens(X, "triangular")[:, :4] * randn(2, 4, 6, seed=1)).sum()
    (gradient,) = torch.autograd.grad(loss, X)
    assert gradient[:, 4:].abs().sum() == 0
    assert gradient[1, :4].abs().min() > 0
    assert torch.isfinite(gradient).all()
    loss = (dress_tokens(X, "svd")[:, :4] * randn(2, 4, 6, seed=1)).sum()
    assert torch.autograd.grad(loss, X)[0][:, 4:].abs().max() > 1e-2


def test_a_causal_transformer_on_dressed_tokens():
    """It trains, does not see rotations, and does not see what comes later; undressed it does."""
    torch.manual_seed(0)
    width, length = 12, 10
    blocks = torch.nn.Sequential(GPTBlock(width, 3), GPTBlock(width, 3)).double()
    head = torch.nn.Linear(width, 1).double()

    def predict(X, dressed=True):
        X = dress_tokens(X, "triangular", causal=True) if dressed else X
        return head(blocks(X)).squeeze(-1)

    X = randn(64, length, width)
    target = (X[:, :, None] * X[:, None, :1]).sum(-1).squeeze(-1).tanh()  # <x_i, x_1>
    parameters = [*blocks.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (predict(X) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    with torch.no_grad():
        Q = rotation((64,), width)
        assert (predict(X @ Q) - predict(X)).abs().max() < 1e-11
        assert (predict(X @ Q, dressed=False) - predict(X, dressed=False)).abs().max() > 0.1
        changed = torch.cat((X[:, :6], randn(64, 4, width, seed=3)), dim=1)
        assert (predict(changed) - predict(X))[:, :6].abs().max() < 1e-14
        assert (predict(changed) - predict(X))[:, 6:].abs().max() > 0.1

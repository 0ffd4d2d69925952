"""Frames of hidden units: what they follow, what moves them, where they are kept."""

import copy
import io

import pytest
import torch

import quotientopt as qo
from quotientopt.models import reference_model
from quotientopt.optim.bookkeeping.slices import Slice
from quotientopt.optim.eigenframes import hidden_eigenframes, orthonormalise_by_cholesky
from quotientopt.optim.leading import first_leading_frame, next_leading_frame
from tests.optim.test_oracle import SETTINGS, oracle_losses
from tests.optim.test_twins import adamw, deviation, folded_llama
from tests.optim.training import small_model, train, twin_of

STEPS = 25


kinds = pytest.mark.parametrize("kind", ["per_matrix", "leading"])


def with_hidden(model, kind="per_matrix", **options):
    return qo.QuotientAdam(model, **SETTINGS, hidden_frame=kind, **options)


@kinds
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("polar", [True, False])
def test_equals_the_oracle_in_float64(kind, polar, factored):
    model = small_model("gpt")
    options = {"nesterov": True, "polar": polar, "row_frame": "per_matrix", "factored": factored}
    expected = oracle_losses(copy.deepcopy(model), hidden=kind, **options)
    without = oracle_losses(copy.deepcopy(model), **options)
    moment = {"second_moment": "factored" if factored else "full"}
    for foreach in (None, False):
        fast = copy.deepcopy(model)
        losses = train(fast, with_hidden(fast, kind, polar=polar, foreach=foreach, **moment), STEPS)
        assert (losses - expected).abs()[:10].max() < 1e-11
        assert (losses - expected).abs().max() < 1e-9
        # The control: frames of columns alone are another optimizer.
        assert (losses - without).abs().max() > 1e-4


def test_rows_of_a_head_that_follows():
    """Its tokens get a frame too, where they are few; the control has frames of its columns."""
    model = small_model("gpt")
    options = {"embedding_frame": "fixed_but_head"}
    own = options | {"nesterov": True, "polar": True, "row_frame": "per_matrix"}
    expected = oracle_losses(copy.deepcopy(model), hidden="per_matrix", **own)
    fast, control = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = with_hidden(fast, **options)
    apart = (train(fast, optimizer, STEPS) - expected).abs()
    assert apart[:10].max() < 1e-11
    assert apart.max() < 1e-9
    assert "hidden_frame" in optimizer.state[fast.head.weight]
    without = qo.QuotientAdam(control, **SETTINGS, **options)
    assert (train(control, without, STEPS) - expected).abs().max() > 1e-4
    assert "hidden_frame" not in without.state[control.head.weight]
    # A factored second moment frames its columns alone.
    expected = oracle_losses(copy.deepcopy(model), hidden="per_matrix", factored=True, **own)
    fast = copy.deepcopy(model)
    optimizer = with_hidden(fast, **options, second_moment="factored")
    assert (train(fast, optimizer, STEPS) - expected).abs().max() < 1e-9
    assert "hidden_frame" not in optimizer.state[fast.head.weight]
    many = reference_model("gpt", 0, vocabulary=129, layers=1, width=32, heads=4, context=8)
    optimizer = with_hidden(many, **options)
    for parameter in many.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert "hidden_frame" not in optimizer.state[many.head.weight]
    assert "hidden_frame" in optimizer.state[many.blocks[0].mlp.up.weight]


@pytest.mark.parametrize("framed_rows", [False, True])
def test_a_factored_head_takes_no_step_too_long(framed_rows, monkeypatch):
    """The control: with frames on both sides of the head its first updates are many times Adam's.

    v is nearly diagonal there, whose mean of rows times mean of columns is far below its diagonal.
    """
    if framed_rows:
        monkeypatch.setattr(
            Slice, "hidden_directions", lambda self, group: self.shape[2] if self.output else 0
        )
    model = small_model("gpt")
    before = model.head.weight.detach().clone()
    options = {"embedding_frame": "fixed_but_head", "second_moment": "factored"}
    train(model, with_hidden(model, **options), 3)
    of_adam = 3 * SETTINGS["lr"] * 4.0 * before.numel() ** 0.5
    assert (((model.head.weight - before).norm() / of_adam) > 2) == framed_rows


@kinds
@pytest.mark.parametrize("build", [small_model, folded_llama])
def test_twins_with_all_frames(build, kind):
    model = build()
    twin, element = twin_of(model, cond=1000.0)
    assert "residual" in element
    options = {"embedding_frame": "fixed_but_head", "refresh_every": 5}
    assert deviation(model, twin, lambda m: with_hidden(m, kind, **options)) < 1e-10
    assert deviation(model, twin, adamw) > 1e-4


@kinds
@pytest.mark.parametrize("build", [small_model, folded_llama])
def test_twins_of_heads_and_stream(build, kind):
    model = build()
    twin, element = twin_of(model, cond=1000.0)
    assert "residual" in element
    assert deviation(model, twin, lambda m: with_hidden(m, kind)) < 1e-10
    assert deviation(model, twin, adamw) > 1e-4


@kinds
def test_twins_of_permuted_hidden_units(kind):
    """The order of hidden units is a symmetry too, which eigenframes keep and no shear does."""
    curves = []
    for change in ("none", "permuted", "scaled"):
        model = small_model("gpt")
        with torch.no_grad():
            for block in model.blocks:
                up, down = block.mlp.up.weight, block.mlp.down.weight
                order = torch.randperm(len(up), generator=torch.Generator().manual_seed(3))
                if change == "permuted":
                    up.copy_(up[order])
                    down.copy_(down[:, order])
                elif change == "scaled":
                    up.mul_(1.01)
        curves.append(train(model, with_hidden(model, kind), 30))
    assert (curves[0] - curves[1]).abs().max() < 1e-10
    assert (curves[0] - curves[2]).abs().max() > 1e-4


@pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
def test_leading_frames_follow_the_largest_covariance(batch):
    generator = torch.Generator().manual_seed(0)
    rows, columns, directions = 12, 8, 3
    shape = (*batch, rows, columns)
    weights, gradients = (
        torch.randn(shape, generator=generator, dtype=torch.float64).view(-1, rows, columns)
        for _ in range(2)
    )
    gradients = gradients * torch.logspace(1, -1, rows, dtype=torch.float64)[:, None]
    first = first_leading_frame(gradients, weights, directions)
    covariance, frame = gradients @ gradients.mT, first
    for _ in range(200):
        frame = next_leading_frame(covariance @ frame, frame)
    identity = torch.eye(directions, dtype=torch.float64)
    leading = torch.linalg.eigh(covariance).eigenvectors.flip(-1)[..., :directions]
    for own in (first, frame):
        assert (own.mT @ own - identity).abs().max() < 1e-12
    assert ((leading.mT @ frame).abs() - identity).abs().max() < 1e-6
    # The control: the first frame is none of eigenvectors.
    assert ((leading.mT @ first).abs() - identity).abs().max() > 1e-2
    # Units in another order move it along, and a rotated stream leaves it.
    order = torch.randperm(rows, generator=generator)
    rotation = torch.linalg.qr(torch.randn(columns, columns, generator=generator).double()).Q
    moved = first_leading_frame(gradients[:, order] @ rotation, weights[:, order] @ rotation, 3)
    assert ((moved.mT @ first[:, order]).abs() - identity).abs().max() < 1e-10
    # What neither has stays zero, and a frame without gradients stays as it is.
    rank_two = torch.zeros_like(gradients)
    rank_two[:, :2] = gradients[:, :2]
    poor = first_leading_frame(rank_two, torch.zeros_like(weights), directions)
    assert (poor[..., 2] == 0).all()
    assert (poor[..., :2] != 0).any()
    turned = next_leading_frame(rank_two @ (rank_two.mT @ poor), poor)
    assert (turned[..., 2] == 0).all()
    for own in (poor, turned):
        assert (own.mT @ own - torch.tensor([1.0, 1.0, 0.0]).diag()).abs().max() < 1e-12
        # As on an accelerator.
        assert (orthonormalise_by_cholesky(3 * own) - own).abs().max() < 1e-12
    assert torch.equal(next_leading_frame(torch.zeros_like(frame), frame), frame)


@pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
def test_frames_are_orthogonal_and_move_with_the_units(batch):
    generator = torch.Generator().manual_seed(0)
    rows, columns = 7, 4
    shape = (*batch, rows, columns)
    gradients = torch.randn(shape, generator=generator, dtype=torch.float64).view(-1, rows, columns)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64).view(-1, rows, columns)
    covariance, zero = gradients @ gradients.mT, torch.zeros(len(weights), rows, rows).double()
    new = [True] * len(weights)
    norms = weights.square().sum(-1)
    first = hidden_eigenframes(covariance, zero, norms, new)
    later = hidden_eigenframes(covariance, first, None, [False] * len(weights))
    order = torch.randperm(rows, generator=generator)
    there = covariance[:, order][:, :, order]
    moved = hidden_eigenframes(there, zero, norms[:, order], new)
    left_behind = hidden_eigenframes(there, zero, norms, new)
    for frame in (first, later):
        identity = torch.eye(rows, dtype=torch.float64)
        assert (frame.mT @ frame - identity).abs().max() < 1e-12
    assert ((moved.mT @ first[:, order]).abs() - torch.eye(rows)).abs().max() < 1e-10
    # The control: norms in their old order break ties otherwise.
    assert ((left_behind.mT @ first[:, order]).abs() - torch.eye(rows)).abs().max() > 1e-3
    # Where all have frames, orthogonal iteration brings them nearer to eigenvectors.
    off = [
        (frame.mT @ covariance @ frame).tril(-1).abs().max()
        for frame in (zero + torch.eye(rows), first, later)
    ]
    assert off[2] < off[1] < off[0]


SHAPES = {
    "per_matrix": {"hidden_frame": (128, 128), "hidden_covariance": (128, 128)},
    "leading": {
        "hidden_frame": (128, 16),
        "hidden_image": (128, 16),
        "hidden_exp_avg": (1, 1, 16, 32),
        "hidden_exp_avg_sq": (1, 1, 16, 32),
    },
}


@kinds
def test_state_is_saved_and_goes_on_bit_for_bit(kind):
    model = small_model("gpt", dtype=torch.float32)
    optimizer = with_hidden(model, kind)
    train(model, optimizer, 5)
    own = optimizer.state[model.blocks[0].mlp.up.weight]
    assert {key: own[key].shape for key in own if key.startswith("hidden_")} == SHAPES[kind]
    assert "hidden_frame" not in optimizer.state[model.blocks[0].attention.query.weight]
    assert "hidden_frame" not in optimizer.state[model.embedding.weight]
    other = copy.deepcopy(model)
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    loaded = with_hidden(other, kind)
    loaded.load_state_dict(torch.load(stored))
    assert torch.equal(train(model, optimizer, 12), train(other, loaded, 12))
    plain = qo.QuotientAdam(copy.deepcopy(model), **SETTINGS)
    plain.load_state_dict(optimizer.state_dict())  # its options travel with the state
    assert plain.param_groups[0]["hidden_frame"] == kind
    damaged = optimizer.state_dict()
    damaged["state"][6]["hidden_frame"] *= 1.1
    with pytest.raises(ValueError, match=r"'hidden_frame' of .* is not orthogonal"):
        with_hidden(copy.deepcopy(model), kind).load_state_dict(damaged)


@kinds
def test_state_moves_with_a_rotation_of_the_stream(kind):
    model = small_model("gpt")
    optimizer = with_hidden(model, kind)
    train(model, optimizer, 5)
    pairs = [copy.deepcopy((model, optimizer)) for _ in range(2)]
    curves = [train(model, optimizer, 12, seed=3)]
    for moves, (twin, state) in zip((True, False), pairs, strict=True):
        element = state.symmetries.random_element(generator=torch.Generator().manual_seed(1))
        state.symmetries.act_(element)
        if moves:
            state.move_state_(element)
        curves.append(train(twin, state, 12, seed=3))
    assert (curves[0] - curves[1]).abs().max() < 1e-10
    # The control: the state stays where it was.
    assert (curves[0] - curves[2]).abs().max() > 1e-4


@kinds
def test_a_step_that_is_recorded_takes_every_gradient(kind):
    model = small_model("gpt")
    curves = [
        train(own, with_hidden(own, kind, capturable=capturable, foreach=foreach), 12)
        for own, capturable, foreach in (
            (copy.deepcopy(model), True, None),
            (copy.deepcopy(model), True, False),
        )
    ]
    assert (curves[0] - curves[1]).abs().max() < 1e-12
    assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hidden_frame": "shared"},
            "hidden_frame must be 'leading', 'per_matrix' or None, got 'shared'",
        ),
        ({"hidden_frame": "per_matrix", "residual_frame": None}, "needs a residual_frame"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        qo.QuotientAdam(small_model("gpt"), **options)

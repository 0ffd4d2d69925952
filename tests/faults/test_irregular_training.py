"""Training out of the ordinary: missing gradients and directions, odd layouts, changed options."""

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.optim import leading
from quotientopt.optim.bookkeeping.slices import matrices_on
from quotientopt.optim.engine import Engine
from quotientopt.optim.update import Sampling, adamw_step
from tests.optim.training import GROWN, batches, loss_of, small_model, train


def one_step(model, optimizer, tokens, without=()):
    """A step in which some parameters have no gradient."""
    optimizer.zero_grad()
    loss_of(model, tokens).backward()
    for parameter in without:
        parameter.grad = None
    optimizer.step()


# ---- leading directions that the first gradient does not tell -----------------------------------


def started_at_zero(dtype=torch.float64):
    """A model whose first gradients of `down` have the rank of five tokens, its weights none."""
    model = small_model(dtype=dtype)
    for block in model.blocks:
        nn.init.zeros_(block.mlp.down.weight)
    optimizer = qo.QuotientAdam(model, lr=1e-3, hidden_frame="leading")
    for tokens in batches(3, size=1):
        one_step(model, optimizer, tokens[:, :6])
    return model, optimizer


def missing(optimizer):
    return [
        int((own["hidden_frame"] == 0).all(-2).sum())
        for own in optimizer.state.values()
        if "hidden_frame" in own
    ]


def test_leading_directions_that_are_missing_are_filled_in(monkeypatch):
    model, optimizer = started_at_zero()
    train(model, optimizer, 3)
    assert len(missing(optimizer)) == 4
    assert sum(missing(optimizer)) == 0
    for own in optimizer.state.values():
        if "hidden_frame" in own:
            E = own["hidden_frame"]
            identity = torch.eye(E.size(-1), dtype=E.dtype)
            assert (E.mT @ E - identity).abs().max() < 1e-10
    # Control: nothing else fills them in.
    monkeypatch.setattr(leading, "completed", lambda frame, *_: frame)
    model, optimizer = started_at_zero()
    train(model, optimizer, 3)
    assert sum(missing(optimizer)) > 0


def test_a_state_in_which_directions_are_missing_goes_on_bit_for_bit(monkeypatch):
    monkeypatch.setattr(leading, "completed", lambda frame, *_: frame)
    model, optimizer = started_at_zero()
    assert sum(missing(optimizer)) > 0
    monkeypatch.undo()
    other = small_model()
    other.load_state_dict(model.state_dict())
    loaded = qo.QuotientAdam(other, lr=1e-3, hidden_frame="leading")
    loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(train(other, loaded, 4), train(model, optimizer, 4))
    # Control: a frame of which one direction is a half is no frame.
    damaged = optimizer.state_dict()
    frames = [own["hidden_frame"] for own in damaged["state"].values() if "hidden_frame" in own]
    frames[0][:, 0] /= 2
    with pytest.raises(ValueError, match=r"'hidden_frame' of .* is not orthogonal"):
        qo.QuotientAdam(other, hidden_frame="leading").load_state_dict(damaged)


def test_directions_beside_a_frame_are_equivariant():
    generator = torch.Generator().manual_seed(0)
    gradient, weights = torch.randn(2, 3, 24, 8, generator=generator, dtype=torch.float64)
    gradient = gradient[..., :2] @ gradient[:, :2]  # of rank two
    frame = leading.first_leading_frame(gradient, 0 * weights, 4)
    assert ((frame == 0).all(-2).sum(-1) == 2).all()
    filled = leading.completed(frame, gradient, weights)
    assert (filled - frame)[..., :2].abs().max() < 1e-12
    assert (filled.mT @ filled - torch.eye(4, dtype=torch.float64)).abs().max() < 1e-12
    order = torch.randperm(24, generator=generator)
    Q = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    moved = leading.completed(frame[:, order], gradient[:, order] @ Q, weights[:, order] @ Q)
    signs = (moved * filled[:, order]).sum(-2, keepdim=True).sign()
    assert (moved * signs - filled[:, order]).abs().max() < 1e-10
    assert torch.equal(leading.completed(filled, gradient, weights), filled)


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"residual_frame": "shared"}])
def test_covariances_take_gradients_of_parameters_that_have_them_in_odd_steps_alone(options):
    """Alternating tasks: from some age on every second gradient is taken, by a count of its own."""
    model = small_model(dtype=torch.float32)
    optimizer = qo.QuotientAdam(model, lr=1e-3, **options)
    own = model.blocks[1].mlp.up.weight
    before, changed = None, 0
    for t, tokens in enumerate(batches(GROWN + 30), 1):
        one_step(model, optimizer, tokens, without=() if t % 2 else (own,))
        covariance = optimizer.state[own]["residual_covariance"].clone()
        if t > GROWN + 10 and t % 2:
            changed += not torch.equal(covariance, before)
        before = covariance
    assert changed >= 5


def test_covariances_take_every_second_gradient_of_an_ordinary_run(monkeypatch):
    model = small_model(dtype=torch.float32)
    optimizer = qo.QuotientAdam(model, lr=1e-3)
    train(model, optimizer, GROWN)
    calls = []
    taken = Sampling.takes

    def takes(sample, updates):
        calls.append((updates, taken(sample, updates)))
        return calls[-1][1]

    monkeypatch.setattr(Sampling, "takes", takes)
    train(model, optimizer, 4)
    assert dict(calls) == {80: False, 81: True, 82: False, 83: True}


def test_a_first_step_that_is_skipped_on_the_device_changes_nothing():
    """Counts are on the device with capturable=True, and stay zero behind a closed gate."""
    for capturable in (False, True):
        model = small_model(dtype=torch.float32)
        optimizer = qo.QuotientAdam(model, lr=1e-3, capturable=capturable)
        optimizer._nonfinite.is_needed = bool  # As on an accelerator.
        start = [parameter.clone() for parameter in model.parameters()]
        loss_of(model, next(batches(1))).backward()
        model.blocks[0].mlp.up.weight.grad[0, 0] = torch.nan
        optimizer.step()
        pairs = zip(model.parameters(), start, strict=True)
        assert all(torch.equal(parameter, old) for parameter, old in pairs)
        model.blocks[0].mlp.up.weight.grad[0, 0] = 0
        optimizer._nonfinite._skipped.zero_()
        optimizer.step()
        pairs = zip(model.parameters(), start, strict=True)
        assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in pairs)


def test_counts_of_plain_parameters_go_where_the_fused_form_needs_them():
    """A state that was loaded to the host, or of torch's own AdamW with counts in float64."""
    own = nn.Parameter(torch.randn(4))
    own.grad = torch.ones(8)[::2]  # Laid out otherwise, too.
    state = {own: {"step": torch.tensor(3.0, dtype=torch.float64)}}
    state[own] |= {key: torch.zeros(4) for key in ("exp_avg", "exp_avg_sq")}
    group = qo.QuotientAdam([own], symmetries=()).param_groups[0]
    with torch.no_grad():
        adamw_step(group, [own], state, None, torch.ones(()))
    assert state[own]["step"].dtype == torch.float32
    assert state[own]["step"] == 4


# ---- layouts -----------------------------------------------------------------------------------


def test_axes_that_no_view_takes_together_have_no_matrix():
    parameter = torch.randn(2, 3, 5, 4)
    assert matrices_on(parameter, 2, "mlp.gate") is None
    view = matrices_on(parameter, 3, "mlp.gate")
    assert view.shape == (2, 15, 4)
    assert view.data_ptr() == parameter.data_ptr()
    assert matrices_on(parameter.permute(0, 1, 3, 2), 3, "mlp.gate") is None


class Bank(nn.Module):
    """Two weights of every expert in one parameter, the stream on an inner axis."""

    def __init__(self, width):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(2, 3, width, 8, dtype=torch.float64) / width)
        self.down = nn.Parameter(torch.randn(3, 8, width, dtype=torch.float64) / 8)

    def forward(self, x):
        gate, up = torch.einsum("...d,kedh->k...eh", x, self.gate)
        return torch.einsum("...eh,ehd->...d", gate.sigmoid() * up, self.down)


def test_a_model_with_such_axes_trains():
    model = small_model()
    for block in model.blocks:
        block.mlp = Bank(32)
    optimizer = qo.QuotientAdam(model, lr=2e-3, example_inputs=next(batches(1))[:, :-1])
    losses = train(model, optimizer, 30)
    assert losses[-1] < losses[0] - 0.5
    assert optimizer.state[model.blocks[0].mlp.gate]["exp_avg"].shape == (2, 3, 32, 8)  # AdamW's
    assert "residual_frame" in optimizer.state[model.blocks[0].mlp.down]


def test_tables_of_biases_are_no_matrices():
    table = torch.randn(4, 32)
    assert matrices_on(table, 1, "mlp.experts.down_proj_bias") is None
    assert matrices_on(table, 1, "mlp.router.weight").shape == (1, 4, 32)


class Attention(nn.Module):
    """One attention with biases, whose output matrix may be a slice of something larger."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


def with_a_slice(sliced):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 32), Attention(), nn.Linear(32, 32)).double()
    nn.init.normal_(model[1].qkv.bias)
    if sliced:
        wide = torch.zeros(32, 64, dtype=torch.float64)
        wide[:, :32] = model[1].out.weight.detach()
        model[1].out.weight = nn.Parameter(wide[:, :32])
    optimizer = qo.QuotientAdam(model, lr=2e-3, example_inputs=next(batches(1))[:, :-1])
    assert optimizer._absorbed
    return train(model, optimizer, 10)


def test_gradients_at_fixed_output_bias_of_a_slice_of_something_larger():
    assert (with_a_slice(True) - with_a_slice(False)).abs().max() < 1e-12


@pytest.mark.parametrize("embedding_frame", ["fixed_but_head", "per_matrix"])
def test_no_frames_of_vocabularies(embedding_frame):
    model = small_model()
    model.head = nn.Linear(32, 300, bias=False, dtype=torch.float64)
    optimizer = qo.QuotientAdam(
        model, lr=1e-3, hidden_frame="per_matrix", embedding_frame=embedding_frame
    )
    train(model, optimizer, 2)
    assert "hidden_frame" not in optimizer.state[model.head.weight]
    assert "residual_frame" in optimizer.state[model.head.weight]
    assert "hidden_frame" in optimizer.state[model.blocks[0].mlp.up.weight]  # Of as many rows.
    framed = "hidden_frame" in optimizer.state[model.embedding.weight]
    assert framed == (embedding_frame == "per_matrix")  # 32 tokens


# ---- plans that are made anew ------------------------------------------------------------------


def step_after(write, freeze):
    model = small_model()
    optimizer = qo.QuotientAdam(model, lr=1e-3)
    train(model, optimizer, GROWN + 21)
    attention = model.blocks[0].attention
    if write:
        with torch.no_grad():
            attention.value.weight[:8] *= 30
            attention.output.weight[:, :8] /= 30
    if freeze:
        model.embedding.weight.requires_grad_(False)
    before = attention.value.weight.detach().clone(), attention.output.weight.detach().clone()
    one_step(model, optimizer, next(batches(1, 5)))
    return torch.stack(
        [
            (attention.value.weight - before[0])[:8].norm(),
            (attention.output.weight - before[1])[:, :8].norm(),
        ]
    ).detach()


def test_what_others_wrote_is_seen_although_a_parameter_is_frozen_at_once(monkeypatch):
    expected = step_after(True, freeze=False)
    assert (step_after(True, freeze=True) / expected - 1).abs().max() < 1e-10
    # Where nobody wrote, the frames in use stay.
    assert (step_after(False, True) / step_after(False, False) - 1).abs().max() < 1e-10
    monkeypatch.setattr(Engine, "were_written", lambda self: False)
    assert (step_after(True, freeze=True) / expected).max() > 10


def test_a_param_group_that_was_refused_leaves_the_plan_as_it_was():
    model = small_model()
    query = model.blocks[0].attention.query.weight
    rest = [p for p in model.parameters() if p is not query]
    optimizer = qo.QuotientAdam(rest, lr=1e-3, symmetries=qo.find_symmetries(model))
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="split over param groups"):
        optimizer.add_param_group({"params": [query], "lr": 1e-4})
    model.head.weight.requires_grad_(False)  # The plan is made anew.
    start = model.blocks[0].attention.key.weight.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(model.blocks[0].attention.key.weight, start)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("precision", "medium"),
        ("polar", "steps"),
        ("nesterov", "no"),
        ("embedding_frame", "Fixed"),
        ("residual_frame", "per-matrix"),
        ("hidden_frame", "all"),
        ("update_scale", 0.0),
    ],
)
def test_options_that_do_not_exist_are_refused_in_mid_training(option, value):
    model = small_model()
    optimizer = qo.QuotientAdam(model, lr=1e-3)
    train(model, optimizer, 1)
    good = optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    start = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"^{option} must be"):
        train(model, optimizer, 1)
    assert all(map(torch.equal, start, model.parameters()))
    optimizer.param_groups[0][option] = good
    train(model, optimizer, 1)
    assert not torch.equal(start[-1], list(model.parameters())[-1])

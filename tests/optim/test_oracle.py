"""The batched path against the plainest form of the algorithm, and against itself one by one."""

import copy

import pytest
import torch

import quotientopt as qo
from quotientopt.optim.reference import PlainQuotientAdam
from tests.optim.training import batches, loss_of, small_model, train

STEPS = 25
SETTINGS = {"lr": 7.5e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def oracle_losses(model, embedding_frame="fixed", steps=STEPS, **options):
    """Train copies of the parameters by the oracle, writing them back at every step."""
    heads, r = 4, 8
    views, matrices = [], []
    for block in model.blocks:
        a = block.attention
        rows = [(linear.weight, None) for linear in (a.query, a.key)]
        rows += [(a.output.weight, 1), (a.value.weight, None)]
        views += rows
        matrices += [(block.mlp.up.weight, None), (block.mlp.down.weight, 1)]
    matrices += [(m.weight, None) for m in (model.head, model.embedding, model.positions)]

    def read(tensor, axis):
        return tensor if axis is None else tensor.mT

    def factor(tensor, axis):
        return read(tensor, axis).reshape(heads, r, -1)

    copies = [factor(p.detach(), axis).clone() for p, axis in views]
    copies += [read(p.detach(), axis).clone() for p, axis in matrices]
    pairs = [tuple(copies[i : i + 2]) for i in range(0, len(views), 2)]
    inner, fixed = {
        "per_matrix": (len(copies), len(copies)),
        "fixed_but_head": (len(copies) - 3, len(copies) - 2),
        "fixed": (len(copies) - 3, len(copies) - 3),
    }[embedding_frame]
    options |= {"outputs": copies[inner:fixed], "embeddings": copies[fixed:]}
    oracle = PlainQuotientAdam(pairs, copies[len(views) : inner], **SETTINGS, **options)
    losses = []
    for tokens in batches(steps):
        model.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        losses.append(loss.item())
        for i, (p, axis) in enumerate(views + matrices):
            oracle.params[i].grad = (factor if i < len(views) else read)(p.grad, axis)
        oracle.step()
        with torch.no_grad():
            for i, (p, axis) in enumerate(views + matrices):
                read(p, axis).copy_(oracle.params[i].reshape(read(p, axis).shape))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize(
    ("residual", "nesterov", "polar", "embedding_frame"),
    [
        (True, False, False, "per_matrix"),
        (True, True, False, "fixed"),
        (False, False, False, "fixed"),
        (True, True, "step", "per_matrix"),
        (True, True, True, "per_matrix"),
        (True, True, True, "fixed"),
        (True, True, True, "fixed_but_head"),
    ],
)
@pytest.mark.parametrize("row_frame", ["per_head", "per_matrix"])
def test_equals_the_oracle_in_float64(residual, nesterov, polar, embedding_frame, row_frame):
    model = small_model("gpt")
    options = {"nesterov": nesterov, "polar": polar, "row_frame": row_frame}
    options["embedding_frame"] = embedding_frame
    expected = oracle_losses(copy.deepcopy(model), residual=residual, **options)
    frame = "per_matrix" if residual else None
    for foreach in (None, False):
        fast = copy.deepcopy(model)
        optimizer = qo.QuotientAdam(
            fast, **SETTINGS, **options, residual_frame=frame, foreach=foreach
        )
        deviation = (train(fast, optimizer, STEPS) - expected).abs()
        # Frames amplify rounding by the inverse gaps of the covariances, at step 10 once more;
        # the polynomial amplifies that of small singular values by its slope.
        assert deviation[:10].max() < 1e-11
        assert deviation.max() < 1e-9


@pytest.mark.parametrize("refresh", [3, 10])
def test_equals_the_oracle_until_frames_last_longest(refresh):
    """The control: another longest interval is another trajectory, from the step it is reached."""
    model = small_model("gpt")
    own = {"nesterov": True, "polar": True, "row_frame": "per_matrix"}
    steps = 95
    expected = oracle_losses(copy.deepcopy(model), steps=steps, refresh=refresh, **own)
    for longest in (refresh, refresh + 1):
        fast = copy.deepcopy(model)
        optimizer = qo.QuotientAdam(fast, **SETTINGS, **own, refresh_every=longest)
        deviation = (train(fast, optimizer, steps) - expected).abs()
        reached = 8 * (refresh + 1)  # Up to here an eighth of the steps is less than both.
        assert deviation[:reached].max() < 1e-9
        assert (deviation.max() < 1e-9) == (longest == refresh)


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("residual_frame", ["per_matrix", "shared", None])
def test_batched_equals_one_by_one(name, residual_frame):
    model = small_model(name)
    losses = []
    for foreach in (True, False):
        own = copy.deepcopy(model)
        optimizer = qo.QuotientAdam(own, **SETTINGS, residual_frame=residual_frame, foreach=foreach)
        losses.append(train(own, optimizer, STEPS))
    assert (losses[0] - losses[1]).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("residual_frame", ["per_matrix", "shared", None])
def test_batched_equals_one_by_one_in_float32_between_fresh_frames(name, residual_frame):
    """Fresh frames amplify rounding by the inverse gaps of covariances, so both share theirs."""
    options = SETTINGS | {"residual_frame": residual_frame, "refresh_every": 12}
    model = small_model(name, dtype=torch.float32)
    optimizer = qo.QuotientAdam(model, **options)
    train(model, optimizer, 80)  # An eighth of them is more than the steps that follow.
    weights = []
    for foreach in (True, False):
        own = copy.deepcopy(model)
        other = qo.QuotientAdam(own, **options, foreach=foreach)
        other.load_state_dict(
            optimizer.state_dict() | {"param_groups": other.state_dict()["param_groups"]}
        )
        train(own, other, 3)
        weights.append(torch.cat([p.detach().flatten() for p in own.parameters()]))
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (weights[0] - weights[1]).norm() / weights[0].norm() < 1e-6
    assert (weights[0] - start).norm() / weights[0].norm() > 1e-3

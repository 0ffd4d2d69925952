"""dress_ in the middle of training: the loss curve does not notice."""

import copy

import pytest
import torch

import quotientopt as qo
from quotientopt.canonical import dress_
from tests.optim.training import batches, loss_of, random_gains_, small_model, train

STEPS = 12


def curves(make, dressing, model_name="gpt"):
    """Loss curves with and without a dressing after the first half of the steps."""
    model = small_model(model_name)
    if model_name == "llama":
        random_gains_(model)
    other = copy.deepcopy(model)
    one, two = make(model), make(other)
    start = train(model, one, STEPS)
    assert torch.equal(start, train(other, two, STEPS))
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    dressing(other, two)
    moved = max((p - before[name]).abs().max() for name, p in other.named_parameters())
    assert moved > 1e-2
    return train(model, one, STEPS, seed=2), train(other, two, STEPS, seed=2)


def quotient_adam(model, **options):
    return qo.QuotientAdam(model, lr=1e-2, weight_decay=0.1, refresh_every=5, **options)


@pytest.mark.parametrize("section", ["svd", "balanced", "orthonormal", "triangular"])
@pytest.mark.parametrize("model_name", ["gpt", "llama"])
def test_the_loss_curve_does_not_notice(model_name, section):
    undisturbed, dressed = curves(
        quotient_adam, lambda m, o: dress_(m, section, optimizer=o), model_name
    )
    assert (undisturbed - dressed).abs().max() < 1e-8


@pytest.mark.parametrize("residual_frame", ["per_matrix", "shared"])
def test_with_the_residual_stream(residual_frame):
    undisturbed, dressed = curves(
        lambda model: quotient_adam(model, residual_frame=residual_frame),
        lambda m, o: dress_(m, optimizer=o, residual=True),
    )
    assert (undisturbed - dressed).abs().max() < 1e-8


def test_state_left_behind_changes_the_curve():
    undisturbed, dressed = curves(quotient_adam, lambda m, _: dress_(m))
    assert (undisturbed - dressed).abs().max() > 1e-4


def test_plain_adam_notices():
    undisturbed, dressed = curves(
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2), lambda m, _: dress_(m)
    )
    assert (undisturbed - dressed).abs().max() > 1e-4


def between_backward_and_step(move_gradients):
    model = small_model()
    other = copy.deepcopy(model)
    losses = []
    for trained, dressed in ((model, False), (other, True)):
        optimizer = quotient_adam(trained)
        train(trained, optimizer, 6)
        tokens = next(iter(batches(1, seed=3)))
        optimizer.zero_grad()
        loss_of(trained, tokens).backward()
        # As compiled models leave it: with other strides than its parameter.
        weight = trained.blocks[0].attention.query.weight
        weight.grad = weight.grad.mT.contiguous().mT
        gradients = {n: p.grad.clone() for n, p in trained.named_parameters()}
        if dressed:
            dress_(trained, optimizer=optimizer, residual=True)
            if not move_gradients:
                for name, parameter in trained.named_parameters():
                    parameter.grad = gradients[name]
        optimizer.step()
        losses.append(train(trained, optimizer, 4, seed=4))
    return (losses[0] - losses[1]).abs().max()


def test_gradients_move_along():
    assert between_backward_and_step(True) < 1e-8
    assert between_backward_and_step(False) > 1e-4

"""The norm of the gradient that no gauge changes."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import quotientopt as qo
from quotientopt.optim.invariant_norm import invariant_grad_norm
from quotientopt.optim.sgd.quotient_sgd import QuotientSGD
from tests.optim.training import batches, loss_of, random_gains_, small_model, train, twin_of

PAIR_METRICS = ["preconditioned", "right-invariant", "balanced", "orthonormal", "svd"]


def with_gradients(model):
    model.zero_grad()
    loss_of(model, next(batches(1))).backward()
    return model


def euclidean(model):
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("metric", PAIR_METRICS)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_it_is_invariant_and_the_euclidean_norm_is_not(name, metric):
    model = small_model(name)
    if name == "llama":
        qo.fold_norms_(random_gains_(model))
    twin, element = twin_of(model, cond=1000.0)
    assert "residual" in element
    with_gradients(model), with_gradients(twin)
    norm, other = (invariant_grad_norm(m, metric=metric) for m in (model, twin))
    assert abs(norm / other - 1) < 1e-10
    assert abs(euclidean(model) / euclidean(twin) - 1) > 0.1


def test_it_is_invariant_with_biases():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        layer.in_proj_bias.normal_()
    twin, _ = twin_of(layer, cond=1000.0)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    for own in (layer, twin):
        own(x, x, x)[0].sin().sum().backward()
    assert abs(invariant_grad_norm(layer) / invariant_grad_norm(twin) - 1) < 1e-10
    assert abs(euclidean(layer) / euclidean(twin) - 1) > 0.1


def test_it_is_the_dual_norm_by_its_formula():
    model = with_gradients(small_model())
    total = 0.0
    for symmetry in qo.find_symmetries(model).heads:
        A, B = symmetry.left[0], symmetry.right[0]
        dA, dB = (block.view(block.parameter.grad) for block in symmetry.blocks)
        for X, d in ((B, dA), (A, dB)):
            total += torch.linalg.solve(X @ X.mT, d @ d.mT).diagonal(dim1=-2, dim2=-1).sum()
    for name, parameter in model.named_parameters():
        if "attention" not in name:
            total += parameter.grad.square().sum()
    assert abs(invariant_grad_norm(model) / total.sqrt() - 1) < 1e-12


def test_it_is_the_norm_of_the_step():
    """In the metric, QuotientSGD's first step is lr times as long."""
    model = with_gradients(small_model())
    before, lr = copy.deepcopy(model), 1e-3
    QuotientSGD(model, lr=lr).step()
    total = 0.0
    old, new = qo.find_symmetries(before), qo.find_symmetries(model)
    for first, second in zip(old.heads, new.heads, strict=True):
        x = first.left[0], first.right[0]
        step = second.left[0] - x[0], second.right[0] - x[1]
        manifold = qo.manifolds.FactorQuotient(8, 32, 32, batch_shape=(4,))
        total += manifold.inner(x, step, step).sum()
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        if "attention" not in name:
            total += (p - q).square().sum()
    assert abs(total.sqrt() / (lr * invariant_grad_norm(model_of(before, model))) - 1) < 1e-10


def model_of(weights, gradients):
    """The first model with the gradients of the second."""
    for p, q in zip(weights.parameters(), gradients.parameters(), strict=True):
        p.grad = q.grad
    return weights


@pytest.mark.parametrize("head_frame", ["balanced", "orthonormal", "svd"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_it_is_what_quotient_adam_clips_by(name, head_frame):
    """Scaling gradients beforehand is the same as max_grad_norm; with another norm it is not."""

    def quotient_adam(model, **options):
        return qo.QuotientAdam(
            model, lr=1e-2, head_frame=head_frame, residual_frame=None, refresh_every=1, **options
        )

    limit = 0.7
    start = small_model(name, key_value_heads=2) if name == "llama" else small_model(name)
    with torch.no_grad():  # Away from balance, where the metrics differ.
        for block in start.blocks:
            block.attention.key.weight.mul_(3)
    clipped = copy.deepcopy(start)
    own = quotient_adam(clipped, max_grad_norm=limit)
    others = {metric: copy.deepcopy(start) for metric in (head_frame, "right-invariant")}
    optimizers = {metric: quotient_adam(model) for metric, model in others.items()}
    for tokens in batches(4):
        own.zero_grad()
        loss_of(clipped, tokens).backward()
        own.step()
        for metric, model in others.items():
            optimizers[metric].zero_grad()
            loss_of(model, tokens).backward()
            norm = invariant_grad_norm(optimizers[metric], metric=metric)
            assert norm > limit
            for parameter in model.parameters():
                parameter.grad.mul_(limit / (norm + 1e-6))
            optimizers[metric].step()
    apart = {
        metric: max(
            (p - q).abs().max().item()
            for p, q in zip(clipped.parameters(), model.parameters(), strict=True)
        )
        for metric, model in others.items()
    }
    assert apart[head_frame] < 1e-10
    assert apart["right-invariant"] > 1e-6


def test_clipping_by_it_keeps_twins_together():
    model = small_model()
    twin, _ = twin_of(model, cond=100.0, only=lambda name: name != "residual")

    def losses(start, clip):
        own = copy.deepcopy(start)

        class Clipped(QuotientSGD):
            def step(self, closure=None):
                clip(self)
                return super().step(closure)

        return train(own, Clipped(own, lr=0.05, momentum=0.9), 20)

    def invariantly(optimizer):
        parameters = optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grads_with_norm_(parameters, 0.5, invariant_grad_norm(optimizer))

    def plainly(optimizer):
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)

    def deviation(clip):
        return (losses(model, clip) - losses(twin, clip)).abs().max()

    assert deviation(invariantly) < 1e-12
    assert deviation(plainly) > 1e-4
    assert (losses(model, invariantly) - losses(model, lambda _: None)).abs().max() > 1e-3


def test_model_optimizer_and_parameters_agree():
    model = with_gradients(small_model("llama", key_value_heads=2))
    symmetries = qo.find_symmetries(model)
    expected = invariant_grad_norm(model)
    assert expected.shape == ()
    groups = [{"params": list(model.parameters())[:3]}, {"params": list(model.parameters())[3:]}]
    for target in (
        QuotientSGD(model, 0.1),
        qo.QuotientAdam(model),
        torch.optim.SGD(model.parameters(), 0.1),
        model.parameters(),
        list(model.named_parameters()),
        groups,
    ):
        own = symmetries if not hasattr(target, "symmetries") else None
        assert torch.equal(invariant_grad_norm(target, own), expected)
    assert torch.equal(invariant_grad_norm(model, list(symmetries.heads)), expected)
    assert abs(invariant_grad_norm(model, ()) / euclidean(model) - 1) < 1e-14
    assert abs(expected / euclidean(model) - 1) > 1e-3


def test_a_part_of_the_parameters_counts_alone():
    model = with_gradients(small_model())
    symmetries = qo.find_symmetries(model)
    query, key = (getattr(model.blocks[0].attention, n).weight for n in ("query", "key"))
    rest = [p for p in model.parameters() if p is not query]
    alone, without, whole = (
        invariant_grad_norm(part, symmetries) for part in ([query], rest, list(model.parameters()))
    )
    assert abs((alone**2 + without**2).sqrt() / whole - 1) < 1e-12
    key.grad = None
    assert torch.equal(invariant_grad_norm([query], symmetries), alone)
    assert invariant_grad_norm([key], symmetries) == 0
    model.zero_grad()
    assert invariant_grad_norm(model) == 0


def test_rests_of_fused_parameters_count_plainly():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(32, 2, kdim=4, vdim=32, batch_first=True)
    layer(torch.randn(2, 5, 32), torch.randn(2, 5, 4), torch.randn(2, 5, 32))[0].sum().backward()
    symmetries = qo.find_symmetries(layer)
    before = invariant_grad_norm(layer, symmetries)
    size = layer.in_proj_bias.grad[:64].norm()
    layer.in_proj_bias.grad[:64] = 0
    after = invariant_grad_norm(layer, symmetries)
    assert size > 0
    assert abs(before**2 - after**2 - size**2) < 1e-5 * before**2


def test_batched_is_one_by_one():
    model = with_gradients(small_model("llama", key_value_heads=2))
    symmetries = qo.find_symmetries(model)
    covered = {id(b.parameter) for s in symmetries.heads for b in s.blocks}
    total = sum(p.grad.square().sum() for p in model.parameters() if id(p) not in covered)
    for symmetry in symmetries.heads:
        own = [block.parameter for block in symmetry.blocks]
        total += invariant_grad_norm(own, [symmetry]) ** 2
    assert abs(invariant_grad_norm(model) / total.sqrt() - 1) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    model = with_gradients(small_model(dtype=dtype))
    wide = copy.deepcopy(model).double()
    for p, q in zip(wide.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.double()
    norm = invariant_grad_norm(model)
    assert norm.dtype == torch.float32
    assert abs(norm / invariant_grad_norm(wide) - 1) < 1e-5
    assert invariant_grad_norm(wide).dtype == torch.float64


def test_sparse_gradients_count_their_sum():
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 1, 7])).square().sum().backward()
    dense = embedding.weight.grad.to_dense().norm()
    assert abs(invariant_grad_norm(embedding.parameters(), ()) / dense - 1) < 1e-6


@pytest.mark.parametrize("metric", PAIR_METRICS)
def test_a_rank_deficient_factor_counts_as_it_is_stepped(metric):
    model = small_model()
    attention = model.blocks[1].attention
    with torch.no_grad():
        attention.output.weight[:, 8:16] = 0
    with_gradients(model)
    norm = invariant_grad_norm(model, metric=metric)
    own = torch.cat([attention.value.weight.grad[8:16], attention.output.weight.grad.mT[8:16]])
    own = own.square().sum()
    attention.value.weight.grad[8:16] = 0
    attention.output.weight.grad[:, 8:16] = 0
    others = invariant_grad_norm(model, metric=metric)
    assert (norm.square() - others.square() - own).abs() < 1e-12 * norm.square()
    with torch.no_grad():
        attention.output.weight[3, 8] = float("nan")
    assert invariant_grad_norm(model, metric=metric).isnan()


class HostReads(TorchDispatchMode):
    """Counts operations that wait for the device to hand a value to the host."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique")
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("metric", ["preconditioned", "right-invariant"])
def test_the_host_does_not_wait(metric):
    model = with_gradients(small_model("llama", key_value_heads=2))
    symmetries = qo.find_symmetries(model)
    invariant_grad_norm(model, symmetries, metric=metric)  # finds what is left uncovered
    with HostReads() as reads:
        norm = invariant_grad_norm(model, symmetries, metric=metric)
    assert reads.count == 0
    with HostReads() as reads:
        norm.item()
    assert reads.count == 1


def test_what_is_missing_or_wrong_is_refused():
    model = with_gradients(small_model())
    with pytest.raises(ValueError, match="symmetries are not known"):
        invariant_grad_norm(model.parameters())
    with pytest.raises(ValueError, match="symmetries are not known"):
        invariant_grad_norm(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="belong to another model"):
        invariant_grad_norm(model, qo.find_symmetries(small_model()))
    with pytest.raises(ValueError, match="metric must be one of 'preconditioned'"):
        invariant_grad_norm(model, metric="euclidean")
    with pytest.raises(TypeError, match="got int"):
        invariant_grad_norm([3], ())

"""Narrow parameters, steps whose checks are deferred, and steps that can be captured."""

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import quotientopt as qo
from quotientopt.optim.dressing import smallest_ratio
from quotientopt.optim.eigenframes import (
    next_eigenframe,
    orthonormalise,
    orthonormalise_by_cholesky,
)
from quotientopt.optim.engine import frames_are_due
from quotientopt.optim.update import PART_OF_AGE, round_stochastically, sampling
from tests.optim.training import (
    GROWN,
    batches,
    loss_of,
    random_heads_and_rotation,
    small_model,
    train,
    twin_of,
)

STEPS = 30


def needs_gpu(test):
    """Mark a test that needs a CUDA device; without one it says how to run it."""
    reason = "needs a GPU: python -m pytest -m gpu on one"
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)(test))


def quotient_adam(model, **options):
    options = {"lr": 7.5e-4, "betas": (0.9, 0.95), "weight_decay": 0.1} | options
    return qo.QuotientAdam(model, **options)


def flat_parameters(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_the_mean(dtype):
    torch.manual_seed(0)
    part = 0.3 * torch.finfo(dtype).eps
    values = torch.tensor([1 + part, -0.25 * (1 + part), 2**-8 * (1 - part), 0.0, 1.0, 6e-8])
    rounded = torch.stack([round_stochastically(values, dtype).float() for _ in range(4000)])
    gap = torch.finfo(dtype).eps * values.abs().clamp_min(torch.finfo(dtype).tiny)
    assert ((rounded - values).abs() <= gap).all()
    assert ((rounded.mean(0) - values).abs() < 0.05 * gap).all()
    exact = values.to(dtype).float() == values
    assert torch.equal(rounded[0][exact], values[exact])
    # The control: rounding to nearest is off by more on these values.
    nearest = (values.to(dtype).float() - values).abs()
    assert (nearest[:3] > 0.1 * gap[:3]).all()


def test_stochastic_rounding_of_what_is_not_finite():
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38])
    rounded = round_stochastically(values, torch.bfloat16)
    assert torch.equal(rounded[:2], values[:2].bfloat16())
    assert rounded[2].isnan()
    assert rounded[3] == values[3].bfloat16()


@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
def test_small_updates_of_narrow_parameters_count(option):
    """With updates below half a unit of bfloat16, rounding to nearest goes nowhere."""
    wide = small_model(dtype=torch.float32)
    model = copy.deepcopy(wide).bfloat16()
    wide.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    start = flat_parameters(wide)
    gradients = []
    for tokens in batches(60):
        gradients.append(torch.autograd.grad(loss_of(model, tokens), list(model.parameters())))
    torch.manual_seed(0)
    moved = {}
    for name, own, options in (
        ("float32", wide, {}),
        ("nearest", copy.deepcopy(model), {}),
        (option, model, {option: True}),
    ):
        optimizer = quotient_adam(own, lr=1e-5, weight_decay=0.0, **options)
        for sample in gradients:
            for p, gradient in zip(own.parameters(), sample, strict=True):
                p.grad = gradient.to(p.dtype)
            optimizer.step()
        moved[name] = flat_parameters(own) - start
    truth = moved["float32"]

    def covered(name):
        return (moved[name] @ truth / (truth @ truth)).item()

    assert covered("nearest") < 0.6
    if option == "master_weights":
        # What is stored is the master rounded; the master itself misses nothing.
        first, second = wide.embedding.weight.detach(), optimizer.state[model.embedding.weight]
        assert (second["master"].view_as(first) - first).abs().max() < 1e-6
    else:
        assert 0.95 < covered(option) < 1.05


def test_master_weights_follow_what_others_write():
    model = small_model(dtype=torch.bfloat16)
    optimizer = quotient_adam(model, master_weights=True)
    train(model, optimizer, 3)
    written = model.blocks[0].mlp.up.weight
    with torch.no_grad():
        # Beyond all weights: a master that rounds to what was written goes on.
        written.fill_(3.0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    train(model, optimizer, 1)
    assert torch.equal(written, torch.full_like(written, 3.0))
    state = optimizer.state[written]["master"]
    assert 0 < (state - 3.0).abs().max() < 1e-3


def test_master_weights_are_saved_and_loaded():
    model = small_model(dtype=torch.bfloat16)
    optimizer = quotient_adam(model, master_weights=True)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    loaded = quotient_adam(other, master_weights=True)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer, 3, seed=7)
    train(other, loaded, 3, seed=7)
    assert torch.equal(flat_parameters(model), flat_parameters(other))
    embedding = other.embedding.weight
    assert loaded.state[embedding]["master"].dtype == torch.float32


@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
def test_plain_parameters_have_wide_state_too(option):
    """Two optimizers on a linear layer: bfloat16 with the option follows float32."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 30).bfloat16()
    wide = copy.deepcopy(layer).float()
    options = {"lr": 1e-5, "weight_decay": 0.0}
    optimizer = quotient_adam(layer, **options, **{option: True})
    reference = torch.optim.AdamW(wide.parameters(), betas=(0.9, 0.95), **options)
    generator = torch.Generator().manual_seed(0)
    start = wide.weight.detach().clone()
    for step in range(60):
        if step == 30:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = quotient_adam(layer, **options, **{option: True})
            optimizer.load_state_dict(saved)
        for p, q in zip(layer.parameters(), wide.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).add_(0.5).bfloat16()
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
    own = optimizer.state[layer.weight]
    assert own["exp_avg"].dtype == torch.float32
    truth = wide.weight.detach() - start
    if option == "master_weights":
        assert (own["master"] - wide.weight).abs().max() < 1e-7
    else:
        moved = layer.weight.detach().float() - start
        assert 0.9 < (moved * truth).sum() / truth.square().sum() < 1.1


def test_master_and_stochastic_together_are_refused():
    with pytest.raises(ValueError, match="master_weights or stochastic_rounding, not both"):
        quotient_adam(small_model(), master_weights=True, stochastic_rounding=True)


def deferring(optimizer):
    """Let checks wait, as they do on an accelerator."""
    optimizer._nonfinite.is_needed = lambda norms: bool(norms)
    return optimizer


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_deferred_checks_change_no_trajectory(name):
    model = small_model(name)
    twin = copy.deepcopy(model)
    losses = train(model, quotient_adam(model, max_grad_norm=0.5), STEPS)
    deferred = train(twin, deferring(quotient_adam(twin, max_grad_norm=0.5)), STEPS)
    assert (losses - deferred).abs().max() < 1e-12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["embedding.weight", "blocks.0.attention.key.weight", "gains"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_deferred_step_with_nonfinite_gradients_changes_nothing(value, place, clip):
    model = small_model("llama" if place == "gains" else "gpt")
    if place == "gains":
        place = next(name for name, p in model.named_parameters() if p.ndim == 1)
    optimizer = deferring(quotient_adam(model, refresh_every=5, max_grad_norm=clip))
    train(model, optimizer, 2 * PART_OF_AGE)  # The next step makes no frames.
    before = flat_parameters(model)
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    loss_of(model, next(batches(1))).backward()
    model.get_parameter(place).grad.view(-1)[3] = value
    optimizer.step()
    assert torch.equal(flat_parameters(model), before)
    for own, saved in zip(optimizer.state_dict()["state"].values(), moments.values(), strict=True):
        for key, tensor in own.items():
            if key != "step":
                assert torch.equal(tensor, saved[key])
    with pytest.raises(ValueError, match=r"NaN or infinite entries.* in 1 of the steps"):
        train(model, optimizer, 5)
    assert train(model, optimizer, 5).isfinite().all()


def test_frames_last_an_eighth_of_the_steps_so_far():
    def group(longest, capturable=False):
        return {"refresh_every": longest, "capturable": capturable}

    def due(longest, capturable=False):
        own = group(longest, capturable)
        return [t for t in range(1, 101) if frames_are_due((t - 1, t - 1), own)]

    every_second, longer = [16, 18, 20, 22], [24, 27, 30, 32, 36, 40, 45, 48, 54, 56, 63, 64, 72]
    assert due(10) == [*range(1, 16), *every_second, *longer, 80, 90, 100]
    assert due(2) == [*range(1, 16), *range(16, 101, 2)]
    assert due(1) == list(range(1, 101))
    # At any age where steps are to be alike, and at once for a slice without a frame.
    assert due(10, capturable=True) == [1, *range(10, 101, 10)]
    assert frames_are_due((0, 82), group(10))
    taken = [sampling(t - 1, group(10)) for t in range(1, 101)]
    assert taken == [sampling(t - 1, group(50)) for t in range(1, 101)]
    assert [t for t, own in enumerate(taken, 1) if own.takes(t - 1)] == [
        *range(1, 80),
        *range(80, 101, 2),
    ]
    assert [taken[t - 1].beta for t in (1, 15, 16, 40, 79, 80, 100)] == pytest.approx(
        [1 / 2, 1 / 2, 3 / 4, 9 / 10, 17 / 18, 9 / 10, 9 / 10]
    )
    assert {sampling(t, group(10, capturable=True)) for t in range(100)} == {(1, 0.95)}
    assert {sampling(t, group(5)) for t in range(40, 100)} == {(1, 0.9)}
    assert taken[99].takes(0)  # The first gradient of a slice, whatever the age of the others.


@pytest.mark.parametrize("residual_frame", ["per_matrix", "shared"])
def test_capturable_steps_are_uniform_and_equivariant(residual_frame):
    model = small_model("gpt")
    options = {"capturable": True, "residual_frame": residual_frame}
    twin, _ = twin_of(model, cond=30.0)
    first = quotient_adam(model, **options)
    losses = train(model, first, STEPS)
    assert (losses - train(twin, quotient_adam(twin, **options), STEPS)).abs().max() < 1e-10
    weight = model.blocks[0].attention.query.weight
    assert float(first.state[weight]["step"]) == STEPS
    assert losses[-1] < losses[0] - 0.5


def test_frames_made_between_steps_are_those_made_within():
    """As between replays of a CUDA graph, whose steps make none."""
    model = small_model("gpt")
    other = copy.deepcopy(model)
    options = {"capturable": True, "refresh_every": 1000}
    plain, refreshed = quotient_adam(model, **options), quotient_adam(other, **options)
    train(model, plain, 12)
    train(other, refreshed, 12)
    inner = other.blocks[0].mlp.up.weight
    frame = refreshed.state[inner]["residual_frame"].clone()
    refreshed.refresh_frames()
    assert not torch.allclose(refreshed.state[inner]["residual_frame"], frame)
    twin, state = copy.deepcopy((other, refreshed))
    element = random_heads_and_rotation(
        state.symmetries, cond=30.0, generator=torch.Generator().manual_seed(0)
    )
    state.symmetries.act_(element)
    state.move_state_(element)
    state.refresh_frames()
    refreshed.refresh_frames()
    losses = train(other, refreshed, 8, seed=3)
    assert (losses - train(twin, state, 8, seed=3)).abs().max() < 1e-10


def test_capturable_state_round_trips():
    model = small_model("gpt")
    optimizer = quotient_adam(model, capturable=True)
    train(model, optimizer, 7)
    other = copy.deepcopy(model)
    loaded = quotient_adam(other, capturable=True)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses = train(model, optimizer, 8, seed=4)
    assert torch.equal(losses, train(other, loaded, 8, seed=4))


@needs_gpu
def test_a_cuda_graph_trains_like_direct_steps():
    model = small_model("gpt", dtype=torch.float32).cuda()
    tokens = next(batches(1)).cuda()
    options = {"capturable": True, "lr": torch.tensor(3e-3, device="cuda")}
    loss_of(model, tokens).backward()
    other = copy.deepcopy(model)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    direct, captured = quotient_adam(model, **options), quotient_adam(other, **options)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(5):
        graph.replay()
    for _ in range(6):
        direct.step()
    assert (flat_parameters(model) - flat_parameters(other)).abs().max() < 1e-4


@needs_gpu
def test_steps_on_cuda_wait_for_nothing_between_fresh_frames():
    model = small_model("gpt", dtype=torch.float32).cuda()
    optimizer = quotient_adam(model)
    loss_of(model, next(batches(1)).cuda()).backward()
    for _ in range(GROWN):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_state_that_was_read_to_the_host_goes_on_on_the_device():
    """As trainers resume; the gains are plain parameters, whose counts the fused form needs."""
    model = small_model("llama", dtype=torch.float32).cuda()
    optimizer = quotient_adam(model)
    loss_of(model, next(batches(1)).cuda()).backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    loaded = quotient_adam(other)
    loaded.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    optimizer.step()
    loaded.step()
    assert torch.equal(flat_parameters(model), flat_parameters(other))


@pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason="needs two GPUs: python -m pytest -m gpu on such a machine",
)
@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}])
def test_a_model_on_two_devices(options):
    whole = small_model("llama", dtype=torch.float32)
    parts = copy.deepcopy(whole)
    parts.blocks[1].to("cuda:1")
    for model in (whole, parts):
        for module in (model.embedding, model.blocks[0], model.norm, model.head):
            module.to("cuda:0")
    whole.blocks[1].to("cuda:0")
    optimizers = [quotient_adam(model, **options) for model in (whole, parts)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
            q.grad = p.grad.to(q.device)
        for optimizer in optimizers:
            optimizer.step()
    moved = torch.cat([p.detach().cpu().double().flatten() for p in parts.parameters()])
    assert (moved - flat_parameters(whole).cpu()).abs().max() < 1e-4


def orthogonal(n, generator):
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


def test_orthogonal_iteration_finds_the_eigenframe_and_turns_with_it():
    generator = torch.Generator().manual_seed(0)
    basis = orthogonal(12, generator)
    covariance = basis @ torch.logspace(0, -4, 12, dtype=torch.float64).diag() @ basis.mT
    frame = start = orthogonal(12, generator)
    rotation = orthogonal(12, generator)
    turned = next_eigenframe(rotation @ covariance @ rotation.mT, rotation @ start)
    assert (turned - rotation @ next_eigenframe(covariance, start)).abs().max() < 1e-10
    assert (turned - next_eigenframe(covariance, start)).abs().max() > 1e-2
    for _ in range(60):
        frame = next_eigenframe(covariance, frame)
    core = frame.mT @ covariance @ frame
    assert (core - core.diagonal().diag()).abs().max() < 1e-8
    assert (frame.mT @ frame - torch.eye(12)).abs().max() < 1e-12


def test_directions_without_gradients_stay():
    generator = torch.Generator().manual_seed(0)
    frame = orthogonal(6, generator)
    seen = frame[:, :2]
    after = next_eigenframe(seen @ seen.mT, frame)
    overlap = (frame[:, 2:].mT @ after[:, 2:]).abs()
    assert (overlap.sort(-1).values[:, -1] - 1).abs().max() < 1e-12
    assert (overlap.sort(-1).values[:, :-1]).abs().max() < 1e-12
    unseen = next_eigenframe(torch.zeros(6, 6, dtype=torch.float64), frame)
    assert (unseen - frame).abs().max() < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_both_ways_to_orthonormalise_agree(dtype, bound):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 20, 20, generator=generator, dtype=torch.float64).to(dtype)
    first, second = orthonormalise(matrix), orthonormalise_by_cholesky(matrix)
    assert first.dtype == second.dtype == dtype
    assert (first - second).abs().max() < 20 * bound
    assert (first.mT @ first - torch.eye(20, dtype=dtype)).abs().max() < bound
    upper = second.mT @ matrix
    assert (upper.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert upper.tril(-1).abs().max() < 100 * bound


class Dtypes(TorchDispatchMode):
    """The dtypes of all results."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        self.seen |= {own.dtype for own in results if isinstance(own, torch.Tensor)}
        return result


@pytest.mark.parametrize("shape", [(3, 32, 32), (128, 128), (2, 512, 64), (768, 768)])
@pytest.mark.parametrize("cond", [1.0, 100.0, 1e4])
def test_frames_are_orthonormal_to_1e_6_without_float64(shape, cond):
    """On consumer GPUs float64 is a sixty-fourth as fast."""
    generator = torch.Generator().manual_seed(0)
    *batch, rows, columns = shape
    left = torch.randn(*batch, rows, columns, generator=generator, dtype=torch.float64)
    right = torch.randn(*batch, columns, columns, generator=generator, dtype=torch.float64)
    left, right = (torch.linalg.qr(own).Q for own in (left, right))
    values = cond ** -torch.linspace(0, 1, columns, dtype=torch.float64)
    exact = left * values @ right.mT
    with Dtypes() as dtypes:
        found = orthonormalise_by_cholesky(exact.float())
    assert torch.float64 not in dtypes.seen
    identity = torch.eye(columns)
    assert (found.mT @ found - identity).abs().max() < 1e-6
    assert (found - orthonormalise(exact)).abs().max() < 1e-8 * cond + 1e-6
    # The control: Cholesky's decomposition of the Gram matrix, once.
    factor = torch.linalg.cholesky_ex(exact.float().mT @ exact.float()).L
    once = torch.linalg.solve_triangular(factor, exact.float().mT, upper=False).mT
    if cond > 1:
        assert not (once.mT @ once - identity).abs().max() < 1e-6
    with Dtypes() as dtypes:
        orthonormalise_by_cholesky(exact)
    assert torch.float64 in dtypes.seen


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_the_smallest_singular_ratio_is_known_within_a_factor_of_the_size(batch):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, *batch, 6, 6, generator=generator, dtype=torch.float64).tril()
    right[..., 0, 0] = 1e-7
    sigma = torch.linalg.svdvals(left.mT @ right)
    exact, found = sigma[..., -1] / sigma[..., 0], smallest_ratio(left, right)
    assert (found <= exact * (1 + 1e-8)).all()
    assert (found >= exact / 6 * (1 - 1e-8)).all()
    # The control: the product without the transpose has other singular values.
    other = torch.linalg.svdvals(left @ right)
    assert (other[..., -1] / other[..., 0] / found - exact / found).abs().min() > 1e-3
    right[..., 0, 0] = 0
    assert (smallest_ratio(left, right) == 0).all()

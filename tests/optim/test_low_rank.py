"""QuotientAdam on LoRA pairs: the gauge has no effect, and torch's contracts are kept."""

import copy
import io

import pytest
import torch

import quotientopt as qo
from quotientopt.optim.low_rank import coordinates
from quotientopt.optim.low_rank.schedule import Schedule
from quotientopt.optim.update import interval_of
from quotientopt.symmetries import ResidualStream
from tests.optim.low_rank_cases import SHAPES, Adapted, loss_of, symmetries_of, train

STEPS = 30


def quotient_adam(model, **options):
    return qo.QuotientAdam(
        model, symmetries=symmetries_of(model), **({"lr": 1e-2, "weight_decay": 0.1} | options)
    )


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def twin_of(model, cond=1000.0, seed=2):
    twin = copy.deepcopy(model)
    symmetries = symmetries_of(twin)
    generator = torch.Generator().manual_seed(seed)
    element = symmetries.random_element(cond=cond, generator=generator)
    symmetries.act_(element)
    return twin, element


def deviation(model, twin, make, steps=STEPS):
    first, second = copy.deepcopy(model), copy.deepcopy(twin)
    return (train(first, make(first), steps) - train(second, make(second), steps)).abs().max()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def snapshot(model, optimizer):
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])


def assert_unchanged(model, optimizer, before):
    weights, state = before
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    now = optimizer.state_dict()["state"]
    assert now.keys() == state.keys()
    for index, values in state.items():
        assert all(torch.equal(value, now[index][key]) for key, value in values.items())


@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_polar": True},
        {"nesterov": False},
        {"max_grad_norm": 0.1},
        {"refresh_every": 1},
        {"refresh_every": 3},
        {"betas": (0.0, 0.9)},
    ],
)
def test_twins(start, options):
    model = Adapted(start=start)
    twin, _ = twin_of(model)
    assert deviation(model, twin, lambda m: quotient_adam(m, **options)) < 1e-10


def test_coordinates_are_made_every_step_at_first_then_less_often():
    model = Adapted(start="random")
    optimizer = quotient_adam(model)
    made = []
    for step in range(1, 141):
        before = None if step == 1 else optimizer.state[model.lora_A[0]]["head_frame"].clone()
        train(model, optimizer, 1, seed=step)
        if before is None or not torch.equal(
            before, optimizer.state[model.lora_A[0]]["head_frame"]
        ):
            made.append(step)
    expected = [
        *range(1, 20),
        *range(20, 30, 2),
        *(30, 33, 36, 39),
        *(40, 44, 48),
        *(50, 55, 60, 66, 70, 77, 80, 88, 90, 99),
        *range(100, 141, 10),
    ]
    assert made == expected


@pytest.mark.parametrize("start", ["zero", "random"])
def test_adamw_sees_the_gauge(start):
    """The control."""
    model = Adapted(start=start)
    twin, _ = twin_of(model)
    assert deviation(model, twin, adamw) > 1e-3
    assert deviation(model, twin, lambda m: quotient_adam(m, lora_frame=None)) > 1e-3


def test_scaling_one_factor_up_and_the_other_down_leaves_the_float32_curve():
    model = Adapted(dtype=torch.float32, start="random")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for A, B in zip(twin.lora_A, twin.lora_B, strict=True):
            A.mul_(1e-3)
            B.mul_(1e3)
    assert deviation(model, twin, quotient_adam) < 1e-4
    assert deviation(model, twin, adamw) > 1e-2


def test_covariances_are_diagonal_in_the_eigenframe():
    model = Adapted(start="random")
    optimizer = quotient_adam(model)
    train(model, optimizer, 3)
    for p in model.lora_A:
        covariance = optimizer.state[p]["head_covariance"]
        eigenvalues = covariance.diagonal()
        off = covariance - eigenvalues.diag()
        assert off.abs().max() < 1e-2 * eigenvalues.max()
        assert eigenvalues[0] == eigenvalues.max()


@pytest.mark.parametrize("steps", [7, 33])
def test_moving_parameters_and_state_in_the_middle_changes_nothing(steps):
    """Also where the next step keeps the coordinates."""
    model = Adapted()
    optimizer = quotient_adam(model)
    train(model, optimizer, steps)
    twin, other = copy.deepcopy((model, optimizer))
    generator = torch.Generator().manual_seed(5)
    element = other.symmetries.random_element(cond=100.0, generator=generator)
    other.symmetries.act_(element)
    other.move_state_(element)
    losses = train(model, optimizer, 12, seed=3)
    assert (losses - train(twin, other, 12, seed=3)).abs().max() < 1e-11
    unmoved, third = copy.deepcopy((model, optimizer))
    third.state[unmoved.lora_A[0]]["exp_avg"].mul_(-1)
    assert (train(model, optimizer, 5) - train(unmoved, third, 5)).abs().max() > 1e-6


def test_first_step_with_a_zero_factor():
    model = Adapted()
    before = copy.deepcopy(model)
    optimizer = quotient_adam(model)
    train(model, optimizer, 1)
    for p, old in zip(model.lora_A, before.lora_A, strict=True):
        assert torch.equal(p, old)
        assert optimizer.state[p]["step"] == 0
    for p in model.lora_B:
        assert optimizer.state[p]["step"] == 1
        assert torch.linalg.matrix_rank(p.detach()) == p.size(1)
    train(model, optimizer, 1)
    assert not any(torch.equal(p, q) for p, q in zip(model.lora_A, before.lora_A, strict=True))
    assert [int(optimizer.state[p]["step"]) for p in model.lora_A] == [1] * len(SHAPES)


def test_a_warm_up_from_zero_learning_rate():
    model = Adapted()
    optimizer = quotient_adam(model, lr=0.0)
    before = flat(model)
    train(model, optimizer, 3)
    assert torch.equal(flat(model), before)
    optimizer.param_groups[0]["lr"] = 1e-2
    losses = train(model, optimizer, 20)
    assert losses[-5:].mean() < losses[:5].mean()


def test_coordinates_are_orthonormal_and_follow():
    model = Adapted(dtype=torch.float32)
    optimizer = quotient_adam(model)
    train(model, optimizer, 15)
    for A, B in zip(model.lora_A, model.lora_B, strict=True):
        for own, partner in ((A, B.T), (B, A)):
            F = optimizer.state[own]["partner_coordinates"]
            assert torch.allclose(F @ F.T, torch.eye(len(F)), atol=1e-5)
            assert F.shape == partner.shape
            assert optimizer.state[own]["exp_avg"].shape == (len(F), own.numel() // len(F))


@pytest.mark.parametrize("steps", [14, 33])
def test_state_dict_round_trip_continues_bit_for_bit(steps):
    model = Adapted(dtype=torch.float32)
    optimizer = quotient_adam(model)
    train(model, optimizer, steps)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    restored = quotient_adam(other, lr=5.0)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    first, second = train(model, optimizer, 14, seed=4), train(other, restored, 14, seed=4)
    assert torch.equal(first, second)
    assert torch.equal(flat(model), flat(other))
    fresh = copy.deepcopy(other)
    forgetful = train(fresh, quotient_adam(fresh), 5, seed=6)
    assert not torch.equal(forgetful, train(other, restored, 5, seed=6))


def test_pairs_trained_in_turn_resume_bit_for_bit():
    model = Adapted(dtype=torch.float32, shapes=SHAPES[:2])
    optimizer = quotient_adam(model)

    def turns(m, own, numbers):
        generator = torch.Generator().manual_seed(0)
        for number in numbers:
            own.zero_grad()
            loss_of(m, generator).backward()
            m.lora_A[number % 2].grad = m.lora_B[number % 2].grad = None
            own.step()

    turns(model, optimizer, range(14))
    other = copy.deepcopy(model)
    restored = quotient_adam(other)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    turns(model, optimizer, range(14, 30))
    turns(other, restored, range(14, 30))
    assert torch.equal(flat(model), flat(other))


def test_a_factor_that_loses_rank_late_resumes_bit_for_bit():
    """Its partner waits until coordinates are due again."""
    model = Adapted(dtype=torch.float32, shapes=SHAPES[:2])
    optimizer = quotient_adam(model)
    train(model, optimizer, 35)
    with torch.no_grad():
        model.lora_A[0][1].copy_(model.lora_A[0][0])
    waiting = optimizer.state[model.lora_B[0]]
    train(model, optimizer, 1)
    assert not waiting["head_frame"].any()
    assert waiting["step"] == 35
    other = copy.deepcopy(model)
    restored = quotient_adam(other)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, mine in ((model, optimizer), (other, restored)):
        train(own, mine, 1, seed=5)
        assert mine.state[own.lora_B[0]]["step"] == 36
        assert mine.state[own.lora_B[0]]["head_frame"].any()
    train(model, optimizer, 6, seed=7)
    train(other, restored, 6, seed=7)
    assert torch.equal(flat(model), flat(other))


def test_copies_continue_alike_and_apart():
    model = Adapted(dtype=torch.float32)
    optimizer = quotient_adam(model)
    train(model, optimizer, 7)
    other, restored = copy.deepcopy((model, optimizer))
    before = snapshot(other, restored)
    losses = train(model, optimizer, 7, seed=4)
    assert_unchanged(other, restored, before)
    assert torch.equal(losses, train(other, restored, 7, seed=4))


def test_state_that_does_not_fit_is_refused():
    model = Adapted()
    optimizer = quotient_adam(model)
    train(model, optimizer, 2)
    shapes = ((12, 10, 2), *SHAPES[1:])
    other = Adapted(shapes=shapes)
    with pytest.raises(ValueError, match="shape"):
        quotient_adam(other).load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lora_frame"] = "balanced"
    with pytest.raises(ValueError, match="not the state of a QuotientAdam with these options"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_gradients_are_refused(value):
    model = Adapted(dtype=torch.float32)
    optimizer = quotient_adam(model)
    train(model, optimizer, 3)
    before = snapshot(model, optimizer)

    def spoil(m):
        m.lora_B[1].grad[0, 0] = value

    with pytest.raises(ValueError, match=r"lora_B\.1.*nothing was updated"):
        train(model, optimizer, 1, after=spoil)
    assert_unchanged(model, optimizer, before)
    train(model, optimizer, 1)


def test_two_zero_factors_are_refused_and_named():
    model = Adapted()
    with torch.no_grad():
        model.lora_A[2].zero_()
    optimizer = quotient_adam(model)
    before = flat(model)
    with pytest.raises(ValueError, match=r"layers\.2\.lora\.default.*is zero, as is its partner"):
        train(model, optimizer, 1)
    assert torch.equal(flat(model), before)
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())
    with torch.no_grad():
        model.lora_A[2].fill_(float("inf"))
    with pytest.raises(ValueError, match=r"layers\.2\.lora\.default.*right factor is not finite"):
        optimizer.step()
    other = Adapted()
    with torch.no_grad():
        other.lora_A[2].zero_()
    train(other, quotient_adam(other, lora_frame=None), 1)


def test_a_deficient_factor_skips_its_partner_until_it_has_full_rank():
    model = Adapted(start="random")
    with torch.no_grad():
        model.lora_B[0][:, 1] = 2 * model.lora_B[0][:, 0]
    before = model.lora_A[0].detach().clone()
    optimizer = quotient_adam(model)
    train(model, optimizer, 1)
    assert torch.equal(model.lora_A[0], before)
    train(model, optimizer, 1)
    assert not torch.equal(model.lora_A[0], before)
    assert flat(model).isfinite().all()


def test_two_deficient_factors_find_their_missing_directions():
    """PEFT's orthogonal initialisation: both factors of half rank, their product zero."""
    model = Adapted(shapes=((12, 10, 4),))
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    with torch.no_grad():
        model.lora_A[0].copy_(Q[:, :2] @ model.lora_A[0][:2])
        noise = torch.randn(10, 2, generator=generator, dtype=torch.float64)
        model.lora_B[0].copy_(noise @ Q[:, 2:].T)
    first = loss_of(model, torch.Generator().manual_seed(1)).item()
    optimizer = quotient_adam(model)
    losses = train(model, optimizer, 25)
    assert losses[0] == first
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()
    for p in (*model.lora_A, *model.lora_B):
        assert torch.linalg.matrix_rank(p.detach(), rtol=1e-3) == 4
        assert optimizer.state[p]["step"] == 25
    F = optimizer.state[model.lora_A[0]]["partner_coordinates"]
    assert torch.allclose(F @ F.T, torch.eye(4, dtype=F.dtype), atol=1e-12)


def test_a_pair_of_lower_rank_trains_at_that_rank():
    model = Adapted()
    with torch.no_grad():
        model.lora_A[3][2:].zero_()
    losses = train(model, quotient_adam(model), 25)
    assert losses[-5:].mean() < losses[:5].mean()
    assert torch.linalg.matrix_rank(model.lora_B[3].detach(), rtol=1e-6) == 2
    assert flat(model).isfinite().all()


def test_a_pair_without_gradients_does_not_turn_the_others():
    model = Adapted(shapes=SHAPES[:2])
    optimizer = quotient_adam(model)

    def drop(m):
        m.lora_A[1].grad = m.lora_B[1].grad = None

    train(model, optimizer, 14, after=drop)
    (pairs,) = optimizer._current_engine().pairs
    loss_of(model, torch.Generator().manual_seed(0)).backward()
    drop(model)
    assert not pairs.prepare().turns  # its factor is still zero, which concerns nobody
    train(model, optimizer, 5, after=drop)
    loss_of(model, torch.Generator().manual_seed(0)).backward()
    drop(model)
    assert pairs.prepare().turns
    assert not model.lora_B[1].any()


def test_parameters_without_gradients_stay_and_rejoin():
    model = Adapted()
    together = copy.deepcopy(model)
    optimizer, other = quotient_adam(model), quotient_adam(together)

    def drop(m):
        for i in (0, 3):
            m.lora_A[i].grad = m.lora_B[i].grad = None

    train(model, optimizer, 4)
    train(together, other, 4)
    before = [p.detach().clone() for p in (model.lora_A[0], model.lora_B[3])]
    state = {k: v.clone() for k, v in optimizer.state[model.lora_A[0]].items()}
    train(model, optimizer, 3, after=drop)
    assert torch.equal(model.lora_A[0], before[0])
    assert torch.equal(model.lora_B[3], before[1])
    assert all(torch.equal(v, optimizer.state[model.lora_A[0]][k]) for k, v in state.items())
    train(together, other, 3)
    for own, their in (
        (model.lora_A[1], together.lora_A[1]),
        (model.lora_B[2], together.lora_B[2]),
    ):
        assert torch.allclose(own, their, rtol=1e-12, atol=0)
    assert not torch.equal(model.lora_A[0], together.lora_A[0])
    train(model, optimizer, 3)
    assert int(optimizer.state[model.lora_B[0]]["step"]) == 7


def test_a_frozen_factor_serves_as_geometry():
    model = Adapted(start="random")
    for p in model.lora_A:
        p.requires_grad_(False)
    before = [p.detach().clone() for p in model.lora_A]
    twin, _ = twin_of(model)
    assert deviation(model, twin, quotient_adam) < 1e-10
    optimizer = quotient_adam(model)
    losses = train(model, optimizer, 20)
    assert losses[-5:].mean() < losses[:5].mean()
    assert all(torch.equal(p, old) for p, old in zip(model.lora_A, before, strict=True))
    assert not any(p in optimizer.state for p in model.lora_A)
    for p in model.lora_A:
        p.requires_grad_(True)
    train(model, optimizer, 2)
    assert int(optimizer.state[model.lora_B[0]]["step"]) == 22
    assert int(optimizer.state[model.lora_A[0]]["step"]) == 2


def test_a_frozen_deficient_factor_does_not_stop_its_partner():
    model = Adapted(start="random")
    with torch.no_grad():
        model.lora_A[0][1] = model.lora_A[0][0]
    for p in model.lora_A:
        p.requires_grad_(False)
    before = model.lora_B[0].detach().clone()
    twin, _ = twin_of(model)
    assert deviation(model, twin, quotient_adam) < 1e-10
    train(model, quotient_adam(model), 5)
    assert (model.lora_B[0] - before).abs().max() > 1e-2


@pytest.mark.parametrize("sides", ["A", "AB"])
def test_moving_takes_the_state_of_frozen_factors_along(sides):
    model = Adapted(start="random")
    optimizer = quotient_adam(model)
    train(model, optimizer, 12)
    frozen = [p for side in sides for p in getattr(model, f"lora_{side}")]
    model.zero_grad()
    for p in frozen:
        p.requires_grad_(False)
    train(model, optimizer, 2, seed=2)
    other, moved = copy.deepcopy((model, optimizer))
    generator = torch.Generator().manual_seed(3)
    element = moved.symmetries.random_element(cond=100.0, generator=generator)
    moved.move_state_(element)
    moved.symmetries.act_(element)
    for m in (model, other):
        for p in m.parameters():
            p.requires_grad_(True)
    losses = train(model, optimizer, 10, seed=4)
    assert (losses - train(other, moved, 10, seed=4)).abs().max() < 1e-11


def test_moments_in_a_frame_are_not_taken_for_plain_ones():
    model = Adapted(start="random", shapes=((10, 10, 10),))
    optimizer = quotient_adam(model)
    train(model, optimizer, 2)
    before = snapshot(model, optimizer)
    optimizer.param_groups[0]["lora_frame"] = None
    with pytest.raises(ValueError, match="'head_frame', which these options leave out"):
        train(model, optimizer, 1)
    assert_unchanged(model, optimizer, before)
    plain = adamw(model)
    train(model, plain, 1)
    fresh = quotient_adam(model)
    with pytest.raises(ValueError, match=r"'head_frame' of 'lora_B\.0' is missing"):
        fresh.load_state_dict(plain.state_dict())
    assert not fresh.state


def test_param_groups_have_their_own_rates():
    model = Adapted(start="random")
    still = [model.lora_A[0], model.lora_B[0]]
    rest = [p for p in model.parameters() if all(p is not q for q in still)]
    before = [p.detach().clone() for p in still]
    groups = [{"params": still, "lr": 0.0}, {"params": rest, "lora_polar": True}]
    optimizer = qo.QuotientAdam(groups, lr=1e-2, symmetries=symmetries_of(model))
    train(model, optimizer, 5)
    assert all(torch.equal(p, old) for p, old in zip(still, before, strict=True))
    assert int(optimizer.state[model.lora_A[3]]["step"]) == 5
    split = [{"params": list(model.lora_A)}, {"params": list(model.lora_B)}]
    with pytest.raises(ValueError, match=r"layers\.0\.lora\.default.*lora_B.*lora_A"):
        qo.QuotientAdam(split, symmetries=symmetries_of(model))


def test_accumulated_gradients_are_one_gradient():
    model = Adapted(start="random")
    other = copy.deepcopy(model)
    optimizer, accumulated = quotient_adam(model), quotient_adam(other)
    for step in range(5):
        for own, optim, parts in ((model, optimizer, 1), (other, accumulated, 2)):
            optim.zero_grad()
            for _ in range(parts):
                generator = torch.Generator().manual_seed(step)
                (loss_of(own, generator) / parts).backward()
            optim.step()
    assert torch.allclose(flat(model), flat(other), rtol=1e-11, atol=1e-13)


def test_clipping_measures_dressed_gradients():
    model = Adapted(start="random")
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for A, B in zip(scaled.lora_A, scaled.lora_B, strict=True):
            A.mul_(16)
            B.div_(16)
    norms = []
    for own in (model, scaled):
        optimizer = quotient_adam(own, max_grad_norm=1e-3, betas=(0.9, 0.999))
        train(own, optimizer, 1)
        total = sum((optimizer.state[p]["exp_avg"] / 0.1).square().sum() for p in own.parameters())
        norms.append(total.sqrt())
    assert torch.allclose(norms[0], torch.tensor(1e-3, dtype=torch.float64), rtol=1e-2)
    assert torch.allclose(norms[0], norms[1], rtol=1e-10)


def test_maximize_is_minimizing_the_negative():
    model = Adapted()
    other = copy.deepcopy(model)

    def negate(m):
        for p in m.parameters():
            p.grad.neg_()

    train(model, quotient_adam(model), 5)
    train(other, quotient_adam(other, maximize=True), 5, after=negate)
    assert torch.equal(flat(model), flat(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"master_weights": True}, {"stochastic_rounding": True}])
def test_narrow_factors_keep_float32_state(dtype, options):
    model = Adapted(dtype=dtype)
    options = options | {"eps": 1e-4}  # AdamW's own, on the bias, would be zero in float16
    optimizer = quotient_adam(model, **options)
    losses = train(model, optimizer, 30)
    assert losses[-5:].mean() < losses[:5].mean()
    for p in (*model.lora_A, *model.lora_B):
        assert p.dtype == dtype
        state = optimizer.state[p]
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert ("master" in state) == ("master_weights" in options)
    other = copy.deepcopy(model)
    restored = quotient_adam(other, **options)
    restored.load_state_dict(optimizer.state_dict())
    torch.manual_seed(0)
    first = train(model, optimizer, 5, seed=4)
    torch.manual_seed(0)
    assert torch.equal(first, train(other, restored, 5, seed=4))


def test_masters_keep_what_rounding_loses():
    moved = []
    for options in ({}, {"master_weights": True}):
        model = Adapted(dtype=torch.bfloat16, start="random")
        before = flat(model).float()
        train(model, quotient_adam(model, lr=2e-5, weight_decay=0.0, **options), 60)
        moved.append((flat(model).float() - before).norm())
    assert moved[1] > 1.2 * moved[0]


def test_tensor_learning_rate():
    model = Adapted()
    other = copy.deepcopy(model)
    rate = torch.tensor(1e-2, dtype=torch.float64)
    losses = train(model, quotient_adam(model, lr=rate), 5)
    assert torch.allclose(losses, train(other, quotient_adam(other), 5), rtol=1e-13)


@pytest.mark.parametrize("kind", ["balanced", "orthonormal", "svd"])
def test_other_frames_stay_on_offer(kind):
    model = Adapted(start="random")
    twin, _ = twin_of(model)
    other = copy.deepcopy(model)
    optimizer = quotient_adam(other, lora_frame=kind)
    train(other, optimizer, 1)
    assert "partner_coordinates" not in optimizer.state[other.lora_A[0]]
    assert deviation(model, twin, lambda m: quotient_adam(m, lora_frame=kind)) < 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_frame": "eigen"}, "lora_frame must be 'transported'"),
        ({"lora_polar": 1}, "lora_polar must be True or False"),
        (
            {"lora_polar": True, "lora_frame": "balanced"},
            "lora_polar needs lora_frame='transported'",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        quotient_adam(Adapted(), **options)


def test_frames_can_be_made_afresh_between_steps():
    model = Adapted(start="random")
    optimizer = quotient_adam(model)
    train(model, optimizer, 12)
    twin, other = copy.deepcopy((model, optimizer))
    other.refresh_frames()
    for own, partner in ((twin.lora_A[0], twin.lora_B[0].T), (twin.lora_B[0], twin.lora_A[0])):
        state = other.state[own]
        seen = state["head_frame"] @ partner
        assert torch.allclose(seen, state["partner_coordinates"], atol=1e-12)
        assert torch.allclose(seen @ seen.T, torch.eye(3, dtype=seen.dtype), atol=1e-12)
    covariance = other.state[twin.lora_A[0]]["head_covariance"]
    pooled = covariance / covariance.diagonal().sum()
    assert (pooled - pooled.diagonal().diag()).abs().max() < 1e-2
    assert deviation_after(model, optimizer, twin, other) > 0
    assert deviation_after(model, optimizer, twin, other) < 0.1


def deviation_after(model, optimizer, twin, other):
    return (train(model, optimizer, 3) - train(twin, other, 3)).abs().max()


def test_a_rotation_of_the_stream_is_no_law_of_a_pair():
    """Moments of LoRA pairs are dressed along the rank alone."""
    model = Adapted(start="random", shapes=SHAPES[:1])
    stream = ResidualStream(12, {"lora_A.0": 1}, {"lora_A.0": model.lora_A[0]})
    symmetries = qo.SymmetryMap(symmetries_of(model).heads, stream)
    optimizer = qo.QuotientAdam(model, lr=1e-2, symmetries=symmetries)
    train(model, optimizer, 2)
    before = snapshot(model, optimizer)
    Q = torch.linalg.qr(torch.eye(12, dtype=torch.float64).roll(1, 0))[0]
    with pytest.raises(
        ValueError, match=r"cannot move the optimizer's state by 'residual'.*lora_A"
    ):
        optimizer.move_state_({"residual": Q})
    assert_unchanged(model, optimizer, before)


def test_pairs_of_rank_one():
    """There R is a number too; the first step along B is as long as at any rank."""
    lengths = []
    for rank in (1, 2):
        model = Adapted(shapes=((12, 10, rank),))
        optimizer = quotient_adam(model, nesterov=False, weight_decay=0.0)
        train(model, optimizer, 1)
        product = model.lora_B[0] @ model.lora_A[0]
        lengths.append(product.norm() / (1e-2 * (rank * 10) ** 0.5))
    assert torch.allclose(torch.stack(lengths), torch.ones(2, dtype=torch.float64), rtol=1e-5)


def largest_change(model, optimizer, steps, seed=1):
    """Of B·ΔA in a step, over all pairs."""
    found = 0.0
    for step in range(steps):
        before = [(B.detach().clone(), A.detach().clone()) for B, A in pairs_of(model)]
        train(model, optimizer, 1, seed=seed + step)
        for (B, A), (_, now) in zip(before, pairs_of(model), strict=True):
            found = max(found, (B @ (now.detach() - A)).norm().item())
    return found


def pairs_of(model):
    return zip(model.lora_B, model.lora_A, strict=True)


def test_a_thawed_factor_sees_its_partner_as_it_is():
    model = Adapted()
    optimizer = quotient_adam(model)
    train(model, optimizer, 2)
    usual = largest_change(model, optimizer, 5)
    for A in model.lora_A:
        A.requires_grad_(False)
        A.grad = None
    train(model, optimizer, 53)
    for A in model.lora_A:
        A.requires_grad_(True)
    assert largest_change(model, optimizer, 8) < 1.5 * usual


@pytest.mark.parametrize("what", ["started again", "another gauge"])
def test_factors_written_to_by_others_are_seen_at_once(what):
    model = Adapted()
    optimizer = quotient_adam(model)
    train(model, optimizer, 3)
    usual = largest_change(model, optimizer, 8)
    train(model, optimizer, 100)
    with torch.no_grad():
        for B, A in pairs_of(model):
            if what == "started again":
                A.copy_(torch.randn(A.shape, dtype=A.dtype) / A.size(1) ** 0.5)
                B.zero_()
            else:
                A.mul_(100)
                B.div_(100)
    assert largest_change(model, optimizer, 9) < 1.5 * usual


def test_coordinates_follow_after_a_long_wait():
    model = Adapted()
    optimizer = quotient_adam(model, lr=0.0)
    train(model, optimizer, 105)
    optimizer.param_groups[0]["lr"] = 1e-2
    fresh = Adapted()
    usual = largest_change(fresh, quotient_adam(fresh), 20)
    assert largest_change(model, optimizer, 30) < 1.5 * usual


@pytest.mark.parametrize("start", [1e-8, 1e-4, 1e-2])
def test_a_warm_up_from_next_to_nothing(start):
    """A's step is measured by B before the step, which grows by orders of magnitude in it."""
    model = Adapted()
    optimizer = quotient_adam(model, weight_decay=0.0)
    twin, _ = twin_of(model)
    other = quotient_adam(twin, weight_decay=0.0)
    losses = []
    for own, mine in ((model, optimizer), (twin, other)):
        schedule = torch.optim.lr_scheduler.LinearLR(mine, start, 1.0, 10)
        found = []
        for step in range(15):
            found.append(train(own, mine, 1, seed=step))
            schedule.step()
        losses.append(torch.cat(found))
    assert losses[0].max() < 1.2 * losses[0][0]
    assert (losses[0] - losses[1]).abs().max() < 1e-10


def test_pairs_do_not_depend_on_their_neighbours():
    """Stacked or alone, whatever the gradients of the others do."""

    def ends(foreach, pattern, shapes=SHAPES[:2]):
        model = Adapted(shapes=shapes)
        optimizer = quotient_adam(model, foreach=foreach)
        for step in range(60):
            optimizer.zero_grad()
            loss_of(model, torch.Generator().manual_seed(step)).backward()
            pattern(model, step)
            optimizer.step()
        return flat(model)

    def dead(model, step):
        model.lora_A[1].grad.zero_()
        model.lora_B[1].grad.zero_()

    def in_turn(model, step):
        model.lora_A[step % 2].grad = model.lora_B[step % 2].grad = None

    def late(model, step):
        if step < 30:
            model.lora_A[1].grad = model.lora_B[1].grad = None

    for pattern in (dead, in_turn, late):
        assert torch.allclose(ends(None, pattern), ends(False, pattern), rtol=1e-9, atol=1e-12)
    alike = ends(None, dead), ends(None, late)
    assert not torch.allclose(*alike, rtol=1e-3)


def test_factors_without_gradient_are_not_written_to():
    model = Adapted(start="random")
    optimizer = quotient_adam(model, eps=0.0)
    frozen = model.lora_A[2].requires_grad_(False)
    train(model, optimizer, 1)
    before = copy.deepcopy(model)
    versions = [p._version for p in (model.lora_A[1], model.lora_B[1], frozen)]
    optimizer.zero_grad()
    loss_of(model, torch.Generator().manual_seed(1)).backward()
    model.lora_A[1].grad = model.lora_B[1].grad = None
    optimizer.step()
    for p, old in ((model.lora_A[1], before.lora_A[1]), (frozen, before.lora_A[2])):
        assert torch.equal(p, old)
    assert [p._version for p in (model.lora_A[1], model.lora_B[1], frozen)] == versions
    assert not torch.equal(model.lora_A[0], before.lora_A[0])
    assert flat(model).isfinite().all()


def thawed_after_a_while(model, optimizer):
    """Largest |B ΔA| when A is trained again after 53 steps of B alone, off the regular steps."""
    train(model, optimizer, 7)
    for A in model.lora_A:
        A.requires_grad_(False)
        A.grad = None
    train(model, optimizer, 53)
    for A in model.lora_A:
        A.requires_grad_(True)
    return largest_change(model, optimizer, 4)


def regauged_by_others(model, optimizer):
    """The same when the factors are written to in another gauge."""
    train(model, optimizer, 101)
    with torch.no_grad():
        for B, A in pairs_of(model):
            A.div_(100)
            B.mul_(100)
    return largest_change(model, optimizer, 4)


def test_controls_of_the_schedule(monkeypatch):
    """Without what makes coordinates out of turn, steps are several times too long."""
    for scenario in (thawed_after_a_while, regauged_by_others):
        model = Adapted()
        kept = scenario(model, quotient_adam(model))
        with monkeypatch.context() as patch:
            patch.setattr(Schedule, "written", lambda self: [False] * len(self.partners))
            patch.setattr(Schedule, "_due", only_regular)
            other = Adapted()
            assert scenario(other, quotient_adam(other)) > 3 * kept


def only_regular(self, own, other, made, framed):
    tick, every = 1 + max(own, other), self.refresh_every
    turned = tick <= every or tick % every == 0
    return tick % interval_of(tick, every, every) == 0, turned, max(1, 1 + own - made[0])


def test_control_of_the_bound_under_a_warm_up(monkeypatch):
    monkeypatch.setattr(coordinates, "MOST_GROWTH", 1e30)
    model = Adapted()
    optimizer = quotient_adam(model, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-8, 1.0, 10)
    first = train(model, optimizer, 1).item()
    for step in range(3):
        schedule.step()
        train(model, optimizer, 1, seed=step)
    assert loss_of(model, torch.Generator().manual_seed(1)) > 100 * first

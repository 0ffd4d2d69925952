"""Every contender of a comparison against a second implementation, on ten steps."""

import copy
import functools
import importlib
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.compare.baselines import (
    MARGIN,
    QUINTICS,
    AdaMuon,
    Muon,
    Muon2,
    SOAPMuon,
    polar,
)
from quotientopt.compare.compositional_muon import CompositionalMuon
from quotientopt.compare.optimizers import OPTIMIZERS, find_optimizers, split_matrices
from quotientopt.compare.protocol import Protocol, UsageError
from quotientopt.groups import GL, O
from quotientopt.models import reference_model
from quotientopt.symmetries import HeadSymmetry
from tests.optim.training import batches, loss_of, small_model, twin_of

STEPS = 10
LR, DECAY = 3e-2, 0.1
SHAPES = ((12, 8), (12, 8), (8, 8), (8, 20))


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run(make, shapes=SHAPES, dtype=torch.float64, steps=STEPS):
    """Parameters after ten steps on fixed random gradients, and where they started."""
    start = [random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    parameters = [nn.Parameter(x.clone()) for x in start]
    optimizer = make(parameters)
    for step in range(steps):
        for i, parameter in enumerate(parameters):
            # A common part, so that moments matter.
            common = random(*parameter.shape, seed=50 + i, dtype=dtype)
            noise = random(*parameter.shape, seed=1000 * step + i, dtype=dtype)
            parameter.grad = (1 + step / 5) * (0.5 * common + noise)
        optimizer.step()
    return [p.detach() for p in parameters], start


def plain(rule, shapes=SHAPES, dtype=torch.float64, steps=STEPS):
    """The same by a rule ``rule(weight, gradient, state, step) -> weight``, matrix by matrix."""

    class Plain:
        def __init__(self, parameters):
            self.parameters, self.states, self.t = parameters, [{} for _ in parameters], 0

        def step(self):
            self.t += 1
            for parameter, state in zip(self.parameters, self.states, strict=True):
                parameter.data = rule(parameter.data, parameter.grad, state, self.t)

    return run(Plain, shapes, dtype, steps)[0]


def deviation(found, expected, start=None):
    """Largest deviation, relative to how far the parameters have come."""
    start = [torch.zeros_like(x) for x in expected] if start is None else start
    return max(
        ((x - y).norm() / (y - z).norm()).item()
        for x, y, z in zip(found, expected, start, strict=True)
    )


def quintics(singular_values):
    for a, b, c in QUINTICS:
        x = singular_values
        singular_values = a * x + b * x**3 + c * x**5
    return singular_values


def polar_by_svd(matrix):
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    sigma = quintics(sigma / (MARGIN * sigma.square().sum().sqrt()))
    return (U * sigma) @ Vh


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9), (3, 7, 12), (2, 3, 12, 7)])
def test_polar_is_a_polynomial_of_singular_values(shape):
    matrix = random(*shape)
    expected = torch.stack([polar_by_svd(x) for x in matrix.reshape(-1, *shape[-2:])])
    assert (polar(matrix).reshape(expected.shape) - expected).abs().max() < 1e-12
    left, right = (torch.linalg.qr(random(n, n, seed=n))[0] for n in shape[-2:])
    assert (polar(left @ matrix @ right) - left @ polar(matrix) @ right).abs().max() < 1e-12
    squares = polar(matrix.square())  # a control: not every map commutes with rotations
    assert (polar((left @ matrix @ right).square()) - left @ squares @ right).abs().max() > 0.1


def test_polar_is_within_an_eighth_of_one():
    sigma = torch.logspace(-3, 0, 2000, dtype=torch.float64)
    assert (quintics(sigma) - 1).abs().max() < 0.125
    assert (quintics(sigma / 10) - 1).abs().max() > 0.2
    assert torch.equal(polar(torch.zeros(3, 4)), torch.zeros(3, 4))


def momentum_of(gradient, state, mu=0.95):
    state["m"] = mu * state.get("m", 0) + (1 - mu) * gradient
    return mu * state["m"] + (1 - mu) * gradient


def muon_rule(weight, gradient, state, step, beta2=None, orthogonalise=polar_by_svd):
    m = momentum_of(gradient, state)
    if beta2 is not None:
        state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * gradient**2
        m = m / (state["v"].sqrt() + 1e-8)
    scale = math.sqrt(max(1, weight.size(0) / weight.size(1)))
    return (1 - LR * DECAY) * weight - LR * scale * orthogonalise(m)


def make_muon(parameters):
    return Muon(parameters, lr=LR, weight_decay=DECAY, momentum=0.95)


def make_muon2(parameters):
    return Muon2(parameters, lr=LR, weight_decay=DECAY, momentum=0.95, beta2=0.95, eps=1e-8)


def test_muon_and_muon2_against_their_definitions():
    muon, start = run(make_muon)
    muon2, _ = run(make_muon2)
    expected = plain(muon_rule)
    expected2 = plain(lambda *a: muon_rule(*a, beta2=0.95))
    assert deviation(muon, expected, start) < 1e-11
    assert deviation(muon2, expected2, start) < 1e-11
    assert deviation(muon, expected2, start) > 0.05


def jordan(matrix):
    """Jordan's quintic, five times, on the singular values."""
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    sigma = sigma / sigma.square().sum().sqrt()
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return (U * sigma) @ Vh


@pytest.fixture
def in_float64(monkeypatch):
    """The packages' Newton-Schulz iterations in float64, where they are in bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    packages = pytest.importorskip("pytorch_optimizer", reason="pip install pytorch_optimizer")
    iterate = packages.optimizer.utils.matrix.zero_power_via_newton_schulz_5
    wide = functools.partial(iterate, dtype=torch.float64)
    for module in ("base", "normuon"):
        module = importlib.import_module(f"pytorch_optimizer.optimizer.muon.{module}")
        monkeypatch.setattr(module, "zero_power_via_newton_schulz_5", wide)


def build(name, parameters, rate=LR):
    """The matrices' optimizer of a comparison, for bare parameters."""
    model = nn.Module()
    model.blocks, model.rest = nn.ParameterList(parameters), nn.Parameter(torch.zeros(1))
    settings = dict(OPTIMIZERS[name].settings_grid[0])
    return OPTIMIZERS[name].build(model, rate, settings, Protocol(weight_decay=DECAY))[0]


def normuon_rule(weight, gradient, state, step, normalise=True):
    even = jordan(momentum_of(gradient, state))
    state["rows"] = 0.95 * state.get("rows", 0) + 0.05 * even.square().mean(1, keepdim=True)
    divided = even / (state["rows"].sqrt() + 1e-10) if normalise else even
    scale = math.sqrt(max(1, weight.size(0) / weight.size(1))) * even.norm() / divided.norm()
    return (1 - LR * DECAY) * weight - LR * scale * divided


def adamuon_rule(weight, gradient, state, step, signs=True):
    state["m"] = 0.95 * state.get("m", 0) + gradient
    even = polar_by_svd(state["m"].sign() if signs else state["m"])
    state["v"] = 0.95 * state.get("v", 0) + 0.05 * even.square()
    divided = even / (state["v"].sqrt() + 1e-8)
    size = 0.2 * math.sqrt(weight.numel())  # a root mean square of 0.2
    return (1 - LR * DECAY) * weight - LR * size * divided / divided.norm()


def test_adamuon_against_its_definition():
    for signs in (True, False):
        found, start = run(lambda p, signs=signs: AdaMuon(p, LR, DECAY, signs=signs))
        own, other = (plain(lambda *a, s=s: adamuon_rule(*a, signs=s)) for s in (signs, not signs))
        assert deviation(found, own, start) < 1e-11
        assert deviation(found, other, start) > 0.03
    default, _ = run(lambda p: build("adamuon", p))
    assert deviation(default, found, start) == 0.0


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("muon", lambda *a, normalise=True: muon_rule(*a, orthogonalise=jordan)),
        ("normuon", normuon_rule),
    ],
)
def test_contenders_of_packages_against_their_definitions(name, rule, in_float64):
    found, start = run(lambda p: build(name, p))
    assert deviation(found, plain(rule), start) < 1e-5  # ε is added to norms as well
    if name != "muon":
        control = plain(lambda *a: rule(*a, normalise=False))
        assert deviation(found, control, start) > 0.03


def soap_muon_rule(
    weight, gradient, state, step, orthogonalise=True, every=4, taken=2, kept=0.9, young=False
):
    """In NumPy, with raw momentum, from the definition."""
    g, s, (b1, b2) = gradient.numpy(), state, (0.9, 0.95)
    grams = [g @ g.T, g.T @ g]
    step -= 1
    if step == 0:
        s["C"] = grams
        s["Q"] = [np.linalg.eigh(C)[1][:, ::-1] for C in grams]
        s["m"], s["v"] = np.zeros_like(g), np.zeros_like(g)
        return (1 - LR * DECAY) * weight
    if young:
        assert step < 80
        every, taken = min(max(step // 8, 1), every), 1
        kept = 1 - 1 / (2 * every)
    if step % taken == 0:
        s["C"] = [kept * C + (1 - kept) * new for C, new in zip(s["C"], grams, strict=True)]
    if step % every == 0:
        for axis, (C, Q) in enumerate(zip(s["C"], s["Q"], strict=True)):
            order = np.argsort(-np.diag(Q.T @ C @ Q))
            s["Q"][axis] = np.linalg.qr(C @ Q[:, order])[0]
            s["v"] = np.take(s["v"], order, axis)
    L, R = s["Q"]
    s["m"] = b1 * s["m"] + (1 - b1) * g
    s["v"] = b2 * s["v"] + (1 - b2) * (L.T @ g @ R) ** 2
    m = b1 * s["m"] / (1 - b1 ** (step + 1)) + (1 - b1) * g / (1 - b1**step)
    D = (L.T @ m @ R) / (np.sqrt(s["v"] / (1 - b2**step)) + 1e-8)
    U = polar_by_svd(torch.from_numpy(D)).numpy() if orthogonalise else D
    U = L @ (U * np.linalg.norm(D) / np.linalg.norm(U)) @ R.T
    return (1 - LR * DECAY) * weight - LR * torch.from_numpy(U)


def make_soap_muon(parameters, every=4, **options):
    return SOAPMuon(
        parameters,
        lr=LR,
        weight_decay=DECAY,
        betas=(0.9, 0.95),
        eps=1e-8,
        every=every,
        **options,
    )


def test_soap_muon_against_its_definition():
    shapes = ((8, 8), (8, 8), (6, 6))  # full rank from the first step: every axis is defined
    found, start = run(make_soap_muon, shapes)
    assert deviation(found, plain(soap_muon_rule, shapes), start) < 1e-9
    control = plain(lambda *a: soap_muon_rule(*a, orthogonalise=False), shapes)
    assert deviation(found, control, start) > 0.05
    stale, _ = run(lambda p: make_soap_muon(p, every=100), shapes)
    assert deviation(found, stale, start) > 0.05


@pytest.mark.parametrize("young", [False, True])
def test_soap_muon_of_other_cadences_against_its_definition(young):
    """Bases every third step from all gradients; as often as QuotientAdam's, at their age."""
    shapes, steps = ((8, 8), (6, 6)), 27
    own = {"every": 3, "taken": 1, "kept": 0.8, "young": young}
    options = {"covariance_every": 1, "covariance_beta": 0.8, "young": young}
    found, start = run(lambda p: make_soap_muon(p, every=3, **options), shapes, steps=steps)
    expected = plain(lambda *a: soap_muon_rule(*a, **own), shapes, steps=steps)
    assert deviation(found, expected, start) < 1e-9
    for name, value in (("every", 1), ("kept", 0.9), ("young", not young)):
        control = plain(
            lambda *a, c=own | {name: value}: soap_muon_rule(*a, **c), shapes, steps=steps
        )
        other = deviation(found, control, start) > 0.01
        assert other == (not (young and name == "kept"))  # What is young keeps as much as its age.


def test_soap_muon_does_not_see_rotations():
    """Its own group: O × O on every matrix. Control: Muon² sees them."""
    rotations = [torch.linalg.qr(random(n, n, seed=n))[0] for n in (12, 8)]

    class Rotated:
        def __init__(self, make, parameters):
            self.own = [nn.Parameter(self.turn(p.detach())) for p in parameters]
            self.parameters, self.optimizer = parameters, make(self.own)

        def turn(self, x, back=False):
            left, right = rotations
            return left.mT @ x @ right if back else left @ x @ right.mT

        def step(self):
            for own, parameter in zip(self.own, self.parameters, strict=True):
                own.grad = self.turn(parameter.grad)
            self.optimizer.step()
            for own, parameter in zip(self.own, self.parameters, strict=True):
                parameter.data = self.turn(own.detach(), back=True)

    shapes = ((12, 8),)
    straight, start = run(make_muon, shapes)
    turned, _ = run(lambda p: Rotated(make_muon, p), shapes)
    assert deviation(turned, straight, start) < 1e-11
    square = ((8, 8),)
    rotations[0] = rotations[1]
    straight, start = run(make_soap_muon, square)
    turned, _ = run(lambda p: Rotated(make_soap_muon, p), square)
    assert deviation(turned, straight, start) < 1e-9
    straight, start = run(make_muon2, square)
    turned, _ = run(lambda p: Rotated(make_muon2, p), square)
    assert deviation(turned, straight, start) > 0.05


def heads_of(weight, heads=4):
    """Rows of every head."""
    return weight.unflatten(0, (heads, -1))


def inverse_root(gram):
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.rsqrt()) @ vectors.mT


def compositional_rule(model, momenta, damping=0.0):
    """Updates of a gpt, head by head, with symmetric roots and singular values."""
    updates = {}
    for i in range(len(model.blocks)):
        prefix = f"blocks.{i}.attention."
        W = {n: dict(model.named_parameters())[f"{prefix}{n}.weight"].detach() for n in PARTS}
        m = {n: momenta[f"{prefix}{n}.weight"] for n in PARTS}
        W["output"], m["output"] = W["output"].mT, m["output"].mT
        for name, partner in (("query", "key"), ("key", "query"), ("value", "output")):
            parts = []
            for own, other in zip(heads_of(m[name]), heads_of(W[partner]), strict=True):
                root = inverse_root(other @ other.mT + damping * torch.eye(len(other)).to(other))
                parts.append(0.5 * root @ polar_by_svd(root @ own))
            updates[f"{prefix}{name}.weight"] = torch.cat(parts)
        roots = [
            inverse_root(v @ v.mT + damping * torch.eye(len(v)).to(v)) for v in heads_of(W["value"])
        ]
        root = torch.block_diag(*roots)
        whole = 0.5 * root @ polar_by_svd(root @ m["output"])
        updates[f"{prefix}output.weight"] = whole.mT
    for name, momentum in momenta.items():
        if name not in updates:
            scale = math.sqrt(max(1, momentum.size(0) / momentum.size(1)))
            updates[name] = scale * polar_by_svd(momentum)
    return updates


PARTS = ("query", "key", "value", "output")


def compositional_muon(model, lr=1e-2):
    heads = qo.find_symmetries(model).heads
    return CompositionalMuon(split_matrices(model)[0], heads, lr, weight_decay=DECAY)


def test_compositional_muon_against_its_definition():
    model, lr = small_model(), 1e-2
    twin = copy.deepcopy(model)
    optimizer = compositional_muon(model, lr)
    states = {n: {} for n, p in twin.named_parameters() if n.startswith("blocks.")}
    start = copy.deepcopy(twin)
    for tokens in batches(STEPS):
        for m in (model, twin):
            m.zero_grad()
            loss_of(m, tokens).backward()
        optimizer.step()
        parameters = dict(twin.named_parameters())
        momenta = {n: momentum_of(parameters[n].grad, state) for n, state in states.items()}
        with torch.no_grad():
            for name, update in compositional_rule(twin, momenta).items():
                parameters[name].mul_(1 - lr * DECAY).sub_(update, alpha=lr)
    for (name, found), expected, old in zip(
        model.named_parameters(), twin.parameters(), start.parameters(), strict=True
    ):
        apart = (found - expected).norm()
        assert apart <= 1e-9 * (expected - old).norm(), name
    damped = compositional_rule(twin, momenta, damping=0.1)
    exact = compositional_rule(twin, momenta)
    assert max((damped[n] - exact[n]).norm() / exact[n].norm() for n in exact) > 0.02


def losses(model, make, steps=30):
    optimizer = make(model)
    rest = torch.optim.AdamW(split_matrices(model)[1], lr=3e-3)
    found = []
    for tokens in batches(steps):
        model.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        rest.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def dressed_muon(model):
    settings = {"adamw_rate": 1e-3}
    return OPTIMIZERS["dressed-muon"].build(model, 1e-2, settings, Protocol())[0]


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("make", [compositional_muon, dressed_muon])
def test_losses_do_not_depend_on_the_gauge_at_condition_1000(name, make):
    model = small_model(name)
    pairs = {symmetry.name for symmetry in qo.find_symmetries(model).heads}
    twin, _ = twin_of(model, cond=1000, only=pairs.__contains__)
    copies = copy.deepcopy((model, twin))
    apart = (losses(twin, make) - losses(model, make)).abs().max().item()
    print(f"{name} {make.__name__}: {apart:.1e}")
    assert apart < 1e-9

    def muon(model):
        return Muon(split_matrices(model)[0], lr=1e-2, weight_decay=DECAY, momentum=0.95)

    assert (losses(copies[1], muon) - losses(copies[0], muon)).abs().max() > 1e-2


def test_compositional_muon_refuses_what_it_cannot_train():
    left, right = (nn.Parameter(random(2, 4, 8, seed=i)) for i in range(2))
    turned = HeadSymmetry([left], [right], O(4), "turned")
    with pytest.raises(ValueError, match=r"'turned': compositional-muon whitens under GL"):
        CompositionalMuon([left, right], [turned], 1e-2)
    bias = nn.Parameter(random(2, 4))
    biased = HeadSymmetry([left, bias], [right], GL(4), "biased")
    with pytest.raises(ValueError, match="'biased' has biases"):
        CompositionalMuon([left, right, bias], [biased], 1e-2)
    fused = nn.Parameter(random(3, 4, 8))
    part = HeadSymmetry([fused[0:1]], [fused[1:2]], GL(4), "part")
    with pytest.raises(ValueError, match="compositional-muon needs pairs that cover whole"):
        CompositionalMuon([fused], [part], 1e-2)


def test_compositional_muon_leaves_everything_at_a_deficient_factor():
    left, right = (nn.Parameter(random(2, 4, 8, seed=i)) for i in range(2))
    right.data[1, 3] = right.data[1, 2]
    optimizer = CompositionalMuon([left, right], [HeadSymmetry([left], [right], GL(4), "p")], 1e-2)
    left.grad, right.grad = torch.ones_like(left), torch.ones_like(right)
    before = left.detach().clone(), right.detach().clone()
    with pytest.raises(ValueError, match="'p': the right factor of head 1 is rank-deficient"):
        optimizer.step()
    assert torch.equal(left, before[0])
    assert torch.equal(right, before[1])
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("make", [make_muon, make_muon2, make_soap_muon])
def test_states_are_saved_and_missing_gradients_refused(make):
    parameters = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    optimizer = make(parameters)
    for parameter in parameters[1:]:
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(ValueError, match=r"a parameter of shape \(12, 8\) has no gradient"):
        optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(parameters, before, strict=True))
    with pytest.raises(TypeError, match="has no option 'nesterov'"):
        type(optimizer)(parameters, 1e-2, nesterov=True)

    def steps(optimizer, parameters, seeds):
        for seed in seeds:
            for i, parameter in enumerate(parameters):
                parameter.grad = random(*parameter.shape, seed=100 * seed + i)
            optimizer.step()

    steps(optimizer, parameters, (1, 2, 3))
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    other = make(twins)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, members in ((optimizer, parameters), (other, twins)):
        steps(own, members, (4, 5))
    assert all(torch.equal(p, t) for p, t in zip(parameters, twins, strict=True))


def soap_rule(weight, gradient, state, step, kl=False):
    """SOAP; with `kl` (arXiv 2509.03378) each Gram matrix is of gradients whitened by the other.

    The first gradient serves for bases alone. The packages differ in what does not matter: which
    of decay and update comes first, and whether axes are sorted.
    """
    g, s, (b1, b2), t = gradient, state, (0.95, 0.95), step - 1
    if t == 0:
        share = 1.0 if kl else 1 - b2
        s["C"] = [share * g @ g.mT, share * g.mT @ g]
        s["Q"] = [torch.linalg.eigh(C).eigenvectors.flip(-1) for C in s["C"]]
        s["m"], s["v"] = torch.zeros_like(g), torch.zeros_like(g)
        return weight
    L, R = s["Q"]
    s["m"] = b1 * s["m"] + (1 - b1) * g
    s["v"] = b2 * s["v"] + (1 - b2) * (L.mT @ g @ R) ** 2
    root = (s["v"] / (1 - b2**t)).sqrt() + 1e-8
    update = LR * L @ ((L.mT @ s["m"] @ R) / (1 - b1**t) / root) @ R.mT
    shrunk = 1 - LR * DECAY
    weight = shrunk * weight - update if kl else shrunk * (weight - update)
    if kl:
        left, right = ((Q * (C @ Q)).sum(0) for C, Q in zip(s["C"], s["Q"], strict=True))
        fresh = [(g @ R) / right @ (g @ R).mT / len(R), (g.mT @ L) / left @ (g.mT @ L).mT / len(L)]
    else:
        fresh = [g @ g.mT, g.mT @ g]
    share = (1 - b2) / (1 - b2**step) if kl else 1 - b2
    s["C"] = [C.lerp(new, share) for C, new in zip(s["C"], fresh, strict=True)]
    if t % 10 == 0:
        for axis, (C, Q) in enumerate(zip(s["C"], s["Q"], strict=True)):
            values = (Q * (C @ Q)).sum(0)
            order = values.argsort(descending=True)
            lift = 64 * len(C) * torch.finfo(torch.float32).eps * values.max() if kl else 0.0
            basis = torch.linalg.qr((C @ Q + lift * Q)[:, order])[0]
            if kl:
                s["Q"][axis] = basis[:, order.argsort()]
            else:
                s["Q"][axis], s["v"] = basis, s["v"].index_select(axis, order)
    return weight


@pytest.mark.parametrize(
    ("name", "package", "dtype", "tolerance"),
    # Bases are made in float32 by the one, everything is by the other.
    [
        ("soap", "pytorch_optimizer", torch.float64, 1e-6),
        ("kl-soap", "heavyball", torch.float32, 1e-4),
    ],
)
def test_soaps_of_packages_against_their_definitions(name, package, dtype, tolerance):
    pytest.importorskip(package)
    shapes, steps, kl = ((8, 8), (6, 6)), 19, name == "kl-soap"
    found, start = run(lambda p: build(name, p), shapes, dtype, steps)

    def expected(kl):
        wide = plain(lambda *a: soap_rule(*a, kl=kl), shapes, steps=steps)
        return [x.to(dtype) for x in wide]

    assert deviation(found, expected(kl), start) < tolerance
    assert deviation(found, expected(not kl), start) > 0.05


NAMES = (
    "soap-muon",
    "muon2",
    "normuon",
    "adamuon",
    "compositional-muon",
    "dressed-muon",
    "quotient-adam-leading",
    "quotient-adam-fresh",
    "quotient-adam-hidden",
    "quotient-adam-full",
    "quotient-adam-small",
    "quotient-adam-stream-only",
    "quotient-adam-heads-only",
    "quotient-adam-no-polar",
    "quotient-adam-0.1",
)


@pytest.mark.parametrize("model", ["gpt", "llama", "vit"])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_one_optimizer_and_learns(name, model, protocol):
    built = reference_model(model, layers=2, width=32)
    settings = dict(OPTIMIZERS[name].settings_grid[0]) | {"weight_decay": 0.25}
    optimizers = OPTIMIZERS[name].build(built, 1e-2, settings, protocol)
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in built.parameters())
    decays = {group["weight_decay"] for o in optimizers for group in o.param_groups}
    assert decays == {0.25}
    if name.startswith("quotient"):
        assert [type(o).__name__ for o in optimizers] == ["QuotientAdam"]


def test_kl_soap_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "heavyball", None)
    with pytest.raises(
        UsageError, match=r"heavyball is not installed: pip install 'heavyball>=3\.2,<4'"
    ):
        find_optimizers("kl-soap")

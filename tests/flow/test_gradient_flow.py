"""Projected gradient flow: monotone, conserving its charges, faithful to what it was given."""

import builtins

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.flow import projected_gradient_flow
from quotientopt.groups import GL, O, RotaryCommutant, StabilizerOfOnes
from quotientopt.manifolds import FactorQuotient, GramQuotient, ProductManifold
from tests.flow.cases import SETTINGS, Regression, attention, heads_of, randn, setting

pytest.importorskip("scipy", reason="needs SciPy: pip install scipy")
ONE_LINE = r"\A.+\Z"
settings = pytest.mark.parametrize("name", SETTINGS)
METRICS = ("euclidean", "preconditioned", "right-invariant")


def factor_problem(group, n=5, m=4, batch_shape=(2,)):
    M = FactorQuotient(group.r, n, m, group=group, batch_shape=batch_shape)
    x = tuple(randn(*batch_shape, group.r, k, seed=k) for k in (n, m))
    target = M.canonical_projection(tuple(randn(*X.shape, seed=9) for X in x))

    def loss(x):
        invariant = M.canonical_projection(x)
        density = (invariant - target).square() / 4 + invariant.sin() / 5
        return density.flatten(len(batch_shape)).sum(dim=-1)

    return M, x, loss


def relative_drift(result):
    return {
        name: (drift.max() / result.charges[name].norm()).item()
        for name, drift in result.charge_drift().items()
        if result.charges[name].numel()
    }


# ---- what is conserved ---------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("group", [GL(3), RotaryCommutant(2), RotaryCommutant(3, 2), O(3)], ids=str)
def test_charges_on_a_manifold(group, metric):
    M, x, loss = factor_problem(group)
    result = projected_gradient_flow(M, loss, (0, 0.1), x0=x, metric=metric, rtol=1e-10, atol=1e-12)
    assert result.success
    assert (result.loss.diff() < 0).all()
    assert result.loss[-1] < 0.95 * result.loss[0]
    assert result.vertical_share.max() < 1e-12
    assert result.vertical_length.max() < 1e-11
    charges = result.charges["point"]
    if isinstance(group, O):
        # Nothing is conserved, so that there is nothing to report.
        assert charges.numel() == 0 or charges.abs().max() == 0
        return
    assert charges.abs().max() > 0.1
    assert relative_drift(result)["point"] < 1e-9
    # Control: what the other metrics conserve is not conserved.
    ratios, differences = [], []
    for A, B in zip(*result.points, strict=True):
        SA, SB = A @ A.mT, B @ B.mT
        ratios.append(torch.logdet(SA) - torch.logdet(SB))
        differences.append(group.algebra_projection(SA - SB))
    other = torch.stack(ratios if metric == "euclidean" else differences)
    assert (other - other[0]).abs().max() > 1e-2


@settings
def test_charges_of_a_model(name):
    """Per head, and as noether_charges defines them."""
    model, loss = setting(**SETTINGS[name])
    start = qo.noether_charges(model)
    result = projected_gradient_flow(model, loss, (0, 0.5), rtol=1e-10, atol=1e-12)
    assert (result.loss.diff() < 0).all()
    assert result.loss[-1] < 0.95 * result.loss[0]
    for symmetry in heads_of(model):
        charges = result.charges[symmetry.name]
        assert charges.shape == (len(result.t), symmetry.heads, symmetry.rank, symmetry.rank)
        assert (charges[0] - start[symmetry.name]).abs().max() < 1e-13
        drift = (charges - charges[0]).flatten(-2).norm(dim=-1)  # (T, heads)
        assert (drift < 1e-8 * charges[0].flatten(-2).norm(dim=-1)).all()
    # Control: C of all rows is conserved under GL(r) alone.
    if "rotary" in name:
        qk = next(s for s in heads_of(model) if s.name.endswith("qk"))
        whole = qo.HeadSymmetry(qk.left_blocks, qk.right_blocks, GL(qk.rank), "qk")
        free = projected_gradient_flow(
            model, loss, (0, 0.5), symmetries=[whole], project=False, rtol=1e-10, atol=1e-12
        )
        assert free.charge_drift()["qk"].max() > 1e-4


@pytest.mark.parametrize("metric", ["preconditioned", "right-invariant"])
def test_invariant_metrics_on_a_model(metric):
    """Their flows take one course in every gauge; the Euclidean one does not."""
    model, loss = setting()
    twin = attention()
    symmetries = qo.find_symmetries(twin)
    symmetries.act_(
        {
            s.name: s.random_element(3.0, generator=torch.Generator().manual_seed(1))
            for s in symmetries.heads
        }
    )
    options = {"t_eval": [0.0, 0.05, 0.1], "rtol": 1e-10, "atol": 1e-12}

    def spectra(metric):
        one, two = (
            projected_gradient_flow(m, loss, (0, 0.1), metric=metric, **options)
            for m in (model, twin)
        )
        assert max(relative_drift(one).values()) < 1e-8
        return max((one.invariants[n] - two.invariants[n]).abs().max() for n in one.invariants)

    assert spectra(metric) < 1e-8
    assert spectra("euclidean") > 1e-3


@pytest.mark.parametrize("group", [None, StabilizerOfOnes(3)], ids=str)
def test_on_token_matrices(group):
    M = GramQuotient(5, 3, stabilizer=group, batch_shape=(2,))
    x, target = randn(2, 5, 3), randn(2, *M.canonical_projection(randn(2, 5, 3)).shape[1:], seed=4)
    result = projected_gradient_flow(
        M, lambda x: (M.canonical_projection(x) - target).square().sum(), (0, 0.1), x0=x
    )
    assert (result.loss.diff() < 0).all()
    assert result.vertical_share.max() < 1e-10
    assert result.points.shape == (len(result.t), 2, 5, 3)
    assert torch.equal(result.points[0], x)
    # A loss that singles out axes has a vertical gradient.
    with pytest.raises(ValueError, match=r"the loss is not invariant.*'point'"):
        projected_gradient_flow(M, lambda x: x[..., 0].square().sum(), (0, 0.1), x0=x)


def test_on_a_product():
    factor, x, loss = factor_problem(GL(2), batch_shape=())
    gram = GramQuotient(4, 2)
    M = ProductManifold({"head": factor, "tokens": gram})
    # In another order than the manifold's.
    start = {"tokens": randn(4, 2), "head": x}

    def both(point):
        G = gram.canonical_projection(point["tokens"])
        return loss(point["head"]) + (G - 1).square().sum() + G.sum() * loss(point["head"]) / 10

    result = projected_gradient_flow(M, both, (0, 0.1), x0=start)
    assert (result.loss.diff() < 0).all()
    assert set(result.charges) == {"head", "tokens"}
    assert relative_drift(result)["head"] < 1e-7
    assert torch.equal(result.points["tokens"][0], start["tokens"])
    assert torch.equal(result.points["head"][1][0], x[1])


# ---- projection ----------------------------------------------------------------------------------


def squared_norm_of_query(model):
    """The length of the query weights: no function of the invariants."""
    return model.query.weight.square().sum() / 10


def test_a_loss_that_is_not_invariant():
    model, loss = setting()

    def broken(model):
        return loss(model) + squared_norm_of_query(model)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"not invariant: \d.*'qk'") as error:
        projected_gradient_flow(model, broken, (0, 0.2))
    assert "\n" not in str(error.value)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    with pytest.warns(UserWarning, match="not invariant") as caught:
        warned = projected_gradient_flow(model, broken, (0, 0.2), not_invariant="warn")
    assert len(caught) == 1
    ignored = projected_gradient_flow(model, broken, (0, 0.2), not_invariant="ignore")
    assert torch.equal(warned.loss, ignored.loss)
    assert warned.vertical_share.min() > 1e-2
    assert warned.vertical_length[-1] > 1e-2
    # Projected, it keeps the charges; as it is, it does not.
    raw = projected_gradient_flow(model, broken, (0, 0.2), project=False)
    kept = {name: drift.max() for name, drift in warned.charge_drift().items()}
    lost = {name: drift.max() for name, drift in raw.charge_drift().items()}
    assert kept["qk"] < 1e-6
    assert lost["qk"] > 1e-2
    assert kept["vo"] < 1e-6


def test_the_projection_does_nothing_to_an_invariant_loss():
    model, loss = setting()
    options = {"t_eval": [0.0, 0.1, 0.2], "rtol": 1e-12, "atol": 1e-13}
    one, two = (
        projected_gradient_flow(model, loss, (0, 0.2), project=p, **options) for p in (True, False)
    )
    for name, points in one.points.items():
        assert (points - two.points[name]).abs().max() < 1e-11


# ---- the result ----------------------------------------------------------------------------------


def test_the_model_is_restored_and_can_be_moved():
    model, loss = setting()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = projected_gradient_flow(model, loss, (0, 0.3))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
        assert torch.equal(result.points[name][0], before[name])
    # With t_eval the end of the span counts, not the last time recorded.
    projected_gradient_flow(model, loss, (0, 0.3), t_eval=[0.0, 0.1], move_to_end=True)
    for name, parameter in model.named_parameters():
        assert (parameter - result.points[name][-1]).abs().max() < 1e-7
    assert loss(model).item() == pytest.approx(result.loss[-1].item(), rel=1e-6)


def test_an_error_in_the_loss_restores_the_model():
    model, loss = setting()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calls = []

    def failing(model):
        calls.append(1)
        if len(calls) > 20:
            raise KeyError("data")
        return loss(model)

    with pytest.raises(KeyError):
        projected_gradient_flow(model, failing, (0, 1), move_to_end=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_buffers_are_restored():
    model, loss = setting()
    model.register_buffer("calls", torch.zeros(()))

    def counting(model):
        model.calls += 1
        return loss(model)

    projected_gradient_flow(model, counting, (0, 0.1))
    assert model.calls == 0


def test_dense_output_and_recorded_times():
    M, x, loss = factor_problem(GL(2), batch_shape=())
    options = {"x0": x, "rtol": 1e-10, "atol": 1e-12}
    times = [0.0, 0.11, 0.2, 0.3]
    result = projected_gradient_flow(M, loss, (0, 0.3), t_eval=times, dense_output=True, **options)
    assert result.t.tolist() == times
    for k, t in enumerate(times):
        for factor, points in zip(result.sol(t), result.points, strict=True):
            assert (factor - points[k]).abs().max() < 1e-8
    with pytest.raises(ValueError, match="t must lie between"):
        result.sol(0.4)
    assert projected_gradient_flow(M, loss, (0, 0.1), **options).sol is None
    # The lengths are those of the curve.
    grid = torch.linspace(0, 0.3, 301, dtype=torch.float64)
    fine = projected_gradient_flow(M, loss, (0, 0.3), t_eval=grid, **options)
    steps = sum((p.diff(dim=0)).square().sum(dim=(-2, -1)) for p in fine.points).sqrt()
    assert fine.horizontal_length[-1].item() == pytest.approx(steps.sum().item(), rel=1e-4)


def test_events():
    model, loss = setting()
    whole = projected_gradient_flow(model, loss, (0, 0.5))
    level = whole.loss[[0, -1]].mean().item()

    def half_way(t, model):
        return loss(model).item() - level

    def never(t, model):
        return 1.0

    half_way.terminal = True
    result = projected_gradient_flow(
        model, loss, (0, 0.5), events=[never, half_way], move_to_end=True, rtol=1e-10
    )
    assert result.success
    assert result.message == "A termination event occurred."
    assert result.events[0].times.shape == (0,)
    (time,) = result.events[1].times.tolist()
    assert time == pytest.approx(result.t[-1].item())
    assert 0 < time < 0.5
    assert result.loss[-1].item() == pytest.approx(level, rel=1e-6)
    assert loss(model).item() == pytest.approx(level, rel=1e-6)
    assert torch.equal(result.events[1].points[0]["query.weight"], model.query.weight)


@pytest.mark.parametrize("method", ["RK45", "LSODA", "Radau"])
def test_other_methods(method):
    M, x, loss = factor_problem(GL(1), n=2, m=2, batch_shape=())
    expected = projected_gradient_flow(M, loss, (0, 0.5), x0=x, rtol=1e-10, atol=1e-12)
    found = projected_gradient_flow(M, loss, (0, 0.5), x0=x, method=method, rtol=1e-8, atol=1e-10)
    assert found.loss[-1].item() == pytest.approx(expected.loss[-1].item(), rel=1e-6)


def test_float32():
    model, loss = setting()
    exact = projected_gradient_flow(model, loss, (0, 0.3))
    loss.inputs, loss.targets = loss.inputs.float(), loss.targets.float()
    result = projected_gradient_flow(model.float(), loss, (0, 0.3))
    assert result.points["query.weight"].dtype == torch.float32
    assert result.loss[-1].item() == pytest.approx(exact.loss[-1].item(), rel=1e-3)
    assert max(relative_drift(result).values()) < 1e-3


def test_unused_and_frozen_parameters():
    model, loss = setting()
    model.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.value.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="vo"):
        result = projected_gradient_flow(model, loss, (0, 0.1))
    assert set(result.charges) == {"qk"}
    assert "value.weight" not in result.points
    assert torch.equal(result.points["extra"][-1], model.extra)


# ---- refusals ------------------------------------------------------------------------------------


def flow_of_factors(dtype=torch.float64, **options):
    M, x, loss = factor_problem(GL(2), batch_shape=())
    options = {"x0": tuple(X.to(dtype) for X in x), "t_span": (0, 0.1)} | options
    return projected_gradient_flow(options.pop("on", M), options.pop("loss", loss), **options)


def flow_of_model(model=None, **options):
    loss = Regression()
    options = {"t_span": (0, 0.1)} | options
    model = attention() if model is None else model
    return projected_gradient_flow(model, options.pop("loss", loss), **options)


M = FactorQuotient(2, 5, 4)


@pytest.mark.parametrize(
    ("run", "error", "words"),
    [
        (lambda: flow_of_factors(t_span=(1, 0)), ValueError, "start < end"),
        (lambda: flow_of_factors(t_span=1.0), ValueError, "pair"),
        (lambda: flow_of_factors(t_span=(0, float("nan"))), ValueError, "finite"),
        (lambda: flow_of_factors(torch.float16), ValueError, "float16"),
        (lambda: flow_of_factors(torch.bfloat16), ValueError, "bfloat16"),
        (lambda: flow_of_factors(x0=None), ValueError, "needs x0"),
        (lambda: flow_of_factors(x0=(torch.ones(2, 5),) * 2), ValueError, "shape"),
        (lambda: flow_of_factors(x0=3.0), TypeError, "tensors"),
        (
            lambda: flow_of_factors(x0=(randn(2, 5).to("meta"), randn(2, 4).to("meta"))),
            ValueError,
            "meta",
        ),
        (lambda: flow_of_factors(metric="fisher"), ValueError, "metric"),
        (lambda: flow_of_factors(method="Euler"), ValueError, "method"),
        (lambda: flow_of_factors(not_invariant="shout"), ValueError, "not_invariant"),
        (lambda: flow_of_factors(rtol=1e-16), ValueError, "rtol"),
        (lambda: flow_of_factors(torch.float32, rtol=1e-8), ValueError, "double"),
        (lambda: flow_of_factors(atol=0.0), ValueError, "atol"),
        (lambda: flow_of_factors(max_step=0.0), ValueError, "max_step"),
        (lambda: flow_of_factors(max_evaluations=0), ValueError, "max_evaluations"),
        (lambda: flow_of_factors(max_evaluations=5), RuntimeError, "more than 5"),
        (lambda: flow_of_factors(t_eval=[0.1, 0.0]), ValueError, "t_eval"),
        (lambda: flow_of_factors(t_eval=[0.2]), ValueError, "t_eval"),
        (lambda: flow_of_factors(move_to_end=True), ValueError, "move_to_end"),
        (lambda: flow_of_factors(symmetries=[]), ValueError, "symmetries"),
        (lambda: flow_of_factors(on="sphere"), TypeError, "str"),
        (lambda: flow_of_factors(loss=lambda x: 1.0), TypeError, "float"),
        (lambda: flow_of_factors(loss=lambda x: x[0].detach().sum()), ValueError, "depend"),
        (
            lambda: flow_of_factors(loss=lambda x: torch.ones(2, requires_grad=True).sum()),
            ValueError,
            "not on the point",
        ),
        (lambda: flow_of_factors(loss=lambda x: x[0].sum() / 0), ValueError, "at the start"),
        (
            lambda: projected_gradient_flow(
                GramQuotient(3, 2), lambda x: x.sum(), (0, 1), x0=randn(3, 2), metric=METRICS[1]
            ),
            ValueError,
            "token matrices",
        ),
        (lambda: flow_of_model(x0={}), ValueError, "x0 is for manifolds"),
        (lambda: flow_of_model(attention().half()), ValueError, "float16"),
        (lambda: flow_of_model(attention().to("meta")), ValueError, "meta"),
        (lambda: flow_of_model(nn.Linear(2, 2)), ValueError, "no head symmetry"),
        (lambda: flow_of_model(attention().requires_grad_(False)), ValueError, "trainable"),
        (
            lambda: flow_of_model(loss=lambda m: m.query.weight.sum() * torch.rand(())),
            ValueError,
            "not deterministic",
        ),
    ],
)
def test_bad_input(run, error, words):
    with pytest.raises(error, match=ONE_LINE) as caught:
        run()
    assert words in str(caught.value)


def test_scipy_is_named_where_it_is_missing(monkeypatch):
    real = builtins.__import__

    def without_scipy(name, *arguments, **options):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ModuleNotFoundError, match=r"\Aprojected_gradient_flow needs SciPy: pip"):
        flow_of_factors()

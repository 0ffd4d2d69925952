"""geoopt's optimizers on our manifolds: convergence, equivariance, and what breaks it."""

import copy
import io
import pickle
import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    geoopt = pytest.importorskip("geoopt", reason="pip install geoopt")

import quotientopt.geoopt as qg
from quotientopt.groups import O, RotaryCommutant, StabilizerOfOnes

METRICS = ("preconditioned", "right-invariant")
BUILDERS = {
    "preconditioned": lambda: qg.FactorManifold(3, 12, 10),
    "right-invariant": lambda: qg.FactorManifold(3, 12, 10, metric="right-invariant"),
    "gram": lambda: qg.GramManifold(12, 3),
    "rotary": lambda: qg.FactorManifold(4, 12, 10, group=RotaryCommutant(4)),
    "euclidean": lambda: qg.FactorManifold(3, 12, 10, group=O(3), metric="euclidean"),
    "gram of ones": lambda: qg.GramManifold(12, 4, stabilizer=StabilizerOfOnes(4)),
}
kinds = pytest.mark.parametrize("kind", [*METRICS, "gram"])
BATCH = (2,)

OPTIMIZERS = {
    "adam": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.2, betas=(0.9, 0.99)),
    "amsgrad": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.2, amsgrad=True, stabilize=3),
    "sgd": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1),
    "sgd, momentum from zero": lambda p: from_zero(p, momentum=0.8),
    "sgd, nesterov from zero": lambda p: from_zero(p, momentum=0.8, nesterov=True, stabilize=2),
    "line search, armijo": lambda p: geoopt.optim.RiemannianLineSearch(p),
    "line search, wolfe, fr": lambda p: geoopt.optim.RiemannianLineSearch(
        p, line_search_method="wolfe", cg_method="fr"
    ),
    "line search, wolfe, pr": lambda p: geoopt.optim.RiemannianLineSearch(
        p, line_search_method="wolfe", cg_method="pr"
    ),
}


def from_zero(parameters, **options):
    optimizer = geoopt.optim.RiemannianSGD(parameters, lr=0.05, **options)
    qg.zero_momentum_(optimizer)
    return optimizer


class LowRank(torch.nn.Module):
    """Fit a batch of matrices of low rank: ``½ Σ ‖π(x) − target‖²``, zero at the best point.

    The factors of the target are nearly orthonormal, so that all metrics agree roughly near it and
    one learning rate serves all of them.
    """

    def __init__(self, kind, seed=0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        manifold = BUILDERS[kind]()
        shape = (*BATCH, *manifold.matrix_shape)
        goal = torch.randn(shape, generator=generator, dtype=torch.float64) / 3
        start = goal + torch.randn(shape, generator=generator, dtype=torch.float64) / 6
        self.is_gram = isinstance(manifold, qg.GramManifold)
        self.x = geoopt.ManifoldParameter(start.to(dtype), manifold=manifold)
        self.register_buffer("target", self.product(goal).to(dtype))

    def product(self, x):
        if self.is_gram:
            return x @ x.mT
        A, B = self.x.manifold.unpack_tensor(x)
        return A.mT @ B

    def forward(self):
        return (self.product(self.x) - self.target).square().sum() / 2

    @torch.no_grad()
    def act_(self, cond, seed=1):
        """Move to another representative of every batch item; return the action."""
        manifold, generator = self.x.manifold, torch.Generator().manual_seed(seed)
        quotient = manifold.quotient(BATCH)
        g = quotient.group.random(BATCH, cond=cond, generator=generator, dtype=torch.float64)

        def act(x):
            moved = quotient.act(g, manifold.unpack_tensor(x))
            return manifold.pack_point(*moved) if isinstance(moved, tuple) else moved

        self.x.copy_(act(self.x))
        return act


def train(model, optimizer, steps):
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss.item() if line_search else loss.detach()

    line_search = isinstance(optimizer, geoopt.optim.RiemannianLineSearch)
    for _ in range(steps):
        losses.append(float(optimizer.step(closure)))
    return losses


def deviation(a, b):
    return ((a - b).abs().amax() / b.abs().amax()).item()


# Without restarts the method of Fletcher and Reeves is slow on the right-invariant metric.
CONVERGING = tuple(name for name in OPTIMIZERS if not name.endswith("fr"))


@pytest.mark.filterwarnings("ignore:No suitable step size", "ignore:Rounding errors prevent")
@pytest.mark.parametrize("name", CONVERGING)
@kinds
def test_convergence(kind, name):
    model = LowRank(kind)
    start = model().item()
    optimizer = OPTIMIZERS[name]([model.x])
    for _ in range(3):
        train(model, optimizer, 15 if name.startswith("line") else 60)
        if "adam" in name or name == "amsgrad":
            optimizer.param_groups[0]["lr"] /= 10
    assert model().item() < 1e-3 * start
    model.x.manifold.assert_check_point_on_manifold(model.x)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", BUILDERS)
def test_trajectories_do_not_depend_on_the_representative(kind, name):
    one, two = LowRank(kind), LowRank(kind)
    act = two.act_(cond=100)
    assert deviation(two.x, one.x) > 0.1
    for model in (one, two):
        train(model, OPTIMIZERS[name]([model.x]), 10)
    assert deviation(two.product(two.x), one.product(one.x)) < 1e-10
    assert deviation(two.x, act(one.x)) < 1e-10
    # The optimizer has moved, further than the tolerance.
    assert deviation(one.x, LowRank(kind).x) > 1e-4


BROKEN = {
    "sgd momentum": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.02, momentum=0.8),
    "adam weight decay": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.1, weight_decay=0.1),
    "sgd weight decay": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1, weight_decay=0.1),
    "euclidean adam": lambda p: torch.optim.Adam(p, lr=0.1),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("kind", METRICS)
def test_what_breaks_equivariance_under_gl(kind, name):
    one, two = LowRank(kind), LowRank(kind)
    two.act_(cond=5)
    for model in (one, two):
        train(model, BROKEN[name]([model.x]), 10)
    assert deviation(two.product(two.x), one.product(one.x)) > 1e-3


def test_weight_decay_and_raw_momentum_are_equivariant_under_rotations():
    for name in ("sgd momentum", "adam weight decay", "sgd weight decay"):
        one, two = LowRank("gram"), LowRank("gram")
        two.act_(cond=1)
        for model in (one, two):
            optimizer = BROKEN[name]([model.x])
            for group in optimizer.param_groups:
                group["lr"] /= 20
            train(model, optimizer, 10)
        assert deviation(two.product(two.x), one.product(one.x)) < 1e-10


@kinds
def test_adams_second_moment_is_one_number_per_batch_item(kind):
    model = LowRank(kind)
    optimizer = OPTIMIZERS["adam"]([model.x])
    train(model, optimizer, 3)
    second = optimizer.state[model.x]["exp_avg_sq"]
    assert torch.allclose(second, second[..., :1, :1].expand_as(second), rtol=1e-14, atol=0)
    assert (second[0] != second[1]).all()
    first = optimizer.state[model.x]["exp_avg"]
    model.x.manifold.assert_check_vector_on_tangent(model.x, first, atol=1e-10)


def test_zero_momentum_starts_like_gradient_descent():
    plain, momentum = LowRank("preconditioned"), LowRank("preconditioned")
    train(plain, geoopt.optim.RiemannianSGD([plain.x], lr=0.05), 1)
    optimizer = from_zero([momentum.x], momentum=0.9)
    train(momentum, optimizer, 1)
    assert torch.equal(plain.x, momentum.x)
    # Control: without it the first step already differs.
    raw = LowRank("preconditioned")
    train(raw, geoopt.optim.RiemannianSGD([raw.x], lr=0.05, momentum=0.9), 1)
    assert deviation(raw.x, plain.x) > 1e-3
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"\Athe optimizer has momentum already"):
        qg.zero_momentum_(optimizer)
    state, old = optimizer.state_dict()["state"][0], before["state"][0]
    assert torch.equal(state["momentum_buffer"], old["momentum_buffer"])
    with pytest.raises(TypeError, match="must be a geoopt RiemannianSGD, got Adam"):
        qg.zero_momentum_(torch.optim.Adam([raw.x]))
    without = geoopt.optim.RiemannianSGD([raw.x], lr=0.1)
    qg.zero_momentum_(without)
    assert not without.state


@pytest.mark.parametrize("name", ["adam", "sgd, momentum from zero"])
@kinds
def test_checkpoints(kind, name):
    model = LowRank(kind)
    optimizer = OPTIMIZERS[name]([model.x])
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    straight = train(model, optimizer, 3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = LowRank(kind, seed=5)
    resumed.load_state_dict(saved["model"])
    assert isinstance(resumed.x, geoopt.ManifoldParameter)
    again = geoopt.optim.RiemannianAdam if name == "adam" else geoopt.optim.RiemannianSGD
    optimizer = again([resumed.x], lr=1.0)
    optimizer.load_state_dict(saved["optimizer"])
    for state in optimizer.state.values():
        if "step" in state:  # which geoopt's Adam has turned into a float32 tensor
            state["step"] = int(state["step"])
    assert train(resumed, optimizer, 3) == straight
    assert torch.equal(resumed.x, model.x)


@kinds
def test_modules_move_and_copy(kind):
    model = LowRank(kind, dtype=torch.float32)
    for moved in (model.double(), model.to("cpu"), model.to(torch.float64)):
        assert isinstance(moved.x, geoopt.ManifoldParameter)
        assert moved.x.dtype == torch.float64
    twin = copy.deepcopy(model)
    assert isinstance(twin.x, geoopt.ManifoldParameter)
    assert twin.x.manifold is not model.x.manifold
    pickled = pickle.loads(pickle.dumps(model))
    for other in (twin, pickled):
        assert torch.equal(other.x, model.x)
        train(other, OPTIMIZERS["adam"]([other.x]), 3)
        assert not torch.equal(other.x, model.x)
    assert torch.equal(twin.x, pickled.x)
    shallow = copy.copy(model)
    assert shallow.x is model.x
    assert "manifold" not in " ".join(model.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: python -m pytest -m gpu on one"
)
@kinds
def test_cuda(kind):
    here, there = LowRank(kind), LowRank(kind).to("cuda")
    assert there.x.device.type == "cuda"
    for model in (here, there):
        train(model, OPTIMIZERS["adam"]([model.x]), 5)
    assert deviation(there.x.cpu(), here.x) < 1e-10
    point = there.x.manifold.random(device="cuda")
    assert point.device.type == "cuda"

"""The manifolds and problems that pymanopt sees: contract, memory, refusals."""

import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("pymanopt", reason="pip install pymanopt")

import pymanopt

import quotientopt as qo
import quotientopt.pymanopt as qp
from quotientopt import checks
from quotientopt.manifolds import FactorQuotient
from tests.adapters import pymanopt_cases as cases

every_kind = pytest.mark.parametrize("kind", cases.KINDS)
every_backend = pytest.mark.parametrize("backend", cases.BACKENDS)
every_batch = pytest.mark.parametrize("batch_shape", cases.BATCH_SHAPES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---- the package --------------------------------------------------------------------------------


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_the_package_does_not_import_pymanopt():
    code = (
        "import sys, quotientopt as qo\n"
        "assert 'pymanopt' not in sys.modules and 'scipy' not in sys.modules\n"
        "qo.pymanopt.FactorManifold(2, 4, 3)\n"
        "assert 'pymanopt' in sys.modules"
    )
    assert run_python(code).returncode == 0


def test_a_missing_pymanopt_is_named_with_the_way_out():
    code = "import sys\nsys.modules['pymanopt'] = None\nimport quotientopt.pymanopt"
    last = run_python(code).stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: quotientopt.pymanopt needs pymanopt")
    assert last.endswith("pip install 'pymanopt>=2.2'")


def test_public_names():
    assert qo.pymanopt is qp
    assert set(qp.__all__) == {"FactorManifold", "FactorPair", "GramManifold", "problem"}
    for kind in cases.KINDS:
        adapted = cases.manifold(kind)
        assert isinstance(adapted, pymanopt.manifolds.manifold.Manifold)
        assert not isinstance(adapted, pymanopt.manifolds.manifold.RiemannianSubmanifold)


# ---- arithmetic ---------------------------------------------------------------------------------


@every_backend
def test_pairs_are_vectors(backend):
    adapted = cases.manifold("preconditioned", backend=backend, dtype=torch.float32)
    u, v = adapted.random_point(), adapted.random_point()
    for scalar in (2.5, np.float64(2.5), np.float32(2.5), np.array(2.5), 2):
        for pair in (scalar * u, u * scalar, u / (1 / scalar)):
            assert isinstance(pair, qp.FactorPair)
            assert cases.deviation(pair, (float(scalar) * u.A, float(scalar) * u.B)) < 1e-6
            assert pair.A.dtype == u.A.dtype  # a NumPy scalar widens nothing
    total = np.float64(2.0) * u - v / 3 + (-u)
    assert cases.deviation(total, (u.A - v.A / 3, u.B - v.B / 3)) < 1e-6
    A, B = u
    assert A is u.A is u[0]
    assert B is u.B is u[1]
    assert isinstance(u, tuple)
    with pytest.raises(TypeError):
        u + 1.0


# ---- the metric and the maps --------------------------------------------------------------------


@every_kind
@every_backend
@every_batch
def test_methods_are_those_of_the_quotient(kind, backend, batch_shape):
    adapted = cases.manifold(kind, batch_shape, backend)
    quotient = adapted.quotient
    x, y = adapted.random_point(), adapted.random_point()
    u, v, w = (adapted.random_point() for _ in range(3))
    tx, ty, tu, tv, tw = map(cases.on_tensors, (x, y, u, v, w))

    def same(result, expected):
        assert type(result) is type(x)
        return cases.deviation(result, expected) < 1e-13

    inner = quotient.inner(tx, tu, tv).sum().item()
    assert isinstance(adapted.inner_product(x, u, v), float)
    assert abs(adapted.inner_product(x, u, v) - inner) < 1e-12 * abs(inner)
    norm = quotient.inner(tx, tu, tu).sum().sqrt().item()
    assert isinstance(adapted.norm(x, u), float)
    assert abs(adapted.norm(x, u) - norm) < 1e-12 * norm
    assert isinstance(adapted.dist(x, y), float)
    assert abs(adapted.dist(x, y) - quotient.distance(tx, ty).square().sum().sqrt()) < 1e-11

    horizontal = quotient.horizontal_component(tx, tu)
    assert same(adapted.projection(x, u), horizontal)
    assert same(adapted.to_tangent_space(x, u), horizontal)
    assert cases.deviation(u, horizontal) > 1e-3  # a projection that does nothing would fail
    assert same(adapted.transport(x, y, u), quotient.transport(tx, ty, tu))
    assert same(adapted.retraction(x, u), quotient.retract(tx, tu))
    assert same(adapted.euclidean_to_riemannian_gradient(x, u), quotient.gradient(tx, tu))
    hessian = adapted.euclidean_to_riemannian_hessian(x, u, v, w)
    assert same(hessian, quotient.hessian(tx, tu, tv, tw))
    assert adapted.norm(x, adapted.zero_vector(x)) == 0
    assert same(adapted.zero_vector(x) + x, tx)
    assert adapted.embedding(x, u) is u
    tangent = adapted.random_tangent_vector(x)
    assert abs(adapted.norm(x, tangent) - 1) < 1e-12
    assert cases.deviation(adapted.projection(x, tangent), tangent) < 1e-12
    items = int(np.prod(batch_shape, dtype=int))
    assert adapted.dim == items * quotient.dim


@every_kind
@pytest.mark.parametrize("batch_shape", [(), (2, 3)])
def test_typical_distance_is_the_root_mean_square_length_of_a_point(kind, batch_shape):
    adapted = cases.manifold(kind, batch_shape)
    lengths = [adapted.norm(x, x) for x in (adapted.random_point() for _ in range(400))]
    assert abs(np.sqrt(np.mean(np.square(lengths))) / adapted.typical_dist - 1) < 0.1


@every_kind
@every_backend
def test_second_order_retraction(kind, backend):
    if kind in cases.GRAMS:
        with pytest.raises(TypeError, match="retraction"):
            cases.manifold(kind, retraction="second-order")
        return
    adapted = cases.manifold(kind, backend=backend, retraction="second-order")
    x = adapted.random_point()
    u = adapted.random_tangent_vector(x)
    tx, tu = cases.on_tensors(x), cases.on_tensors(u)
    expected = adapted.quotient.retract_second_order(tx, tu)
    assert cases.deviation(adapted.retraction(x, u), expected) < 1e-13
    additive = adapted.quotient.retract(tx, tu)
    assert (cases.deviation(additive, expected) < 1e-13) == (kind == "orthogonal")


@every_kind
@every_batch
def test_log_leads_to_the_other_orbit_and_half_of_it_to_the_middle(kind, batch_shape):
    adapted = cases.manifold(kind, batch_shape)
    x = adapted.random_point()
    y = adapted.retraction(x, 0.3 * adapted.random_tangent_vector(x))
    y = cases.act(adapted, cases.element(adapted), y)  # far away, on the same orbit
    log = adapted.log(x, y)
    end = adapted.retraction(x, log)
    assert adapted.dist(end, y) < 1e-12 * adapted.norm(x, x)
    assert adapted.norm(x, log) < 0.5 * adapted.norm(x, adapted.projection(x, y - x))
    middle = adapted.pair_mean(x, y)
    assert cases.deviation(middle, adapted.retraction(x, log / 2)) < 1e-13
    whole = adapted.dist(x, y)
    for half in (adapted.dist(x, middle), adapted.dist(middle, y)):
        assert abs(half / whole - 0.5) < 0.15
    if kind in (*cases.GRAMS, "orthogonal"):  # a flat total space: these are geodesics
        assert abs(adapted.norm(x, log) / whole - 1) < 1e-10
        assert cases.deviation(adapted.exp(x, log), end) < 1e-13
    else:
        with pytest.raises(NotImplementedError, match="closed form"):
            adapted.exp(x, log)


@every_kind
@every_batch
def test_all_of_it_is_equivariant(kind, batch_shape):
    adapted = cases.manifold(kind, batch_shape)
    g = cases.element(adapted)

    def move(point):
        return cases.act(adapted, g, point)

    x = adapted.random_point()
    y = adapted.retraction(x, 0.2 * adapted.random_tangent_vector(x))
    u, v = adapted.random_tangent_vector(x), adapted.random_tangent_vector(x)
    assert (
        abs(adapted.inner_product(move(x), move(u), move(v)) / adapted.inner_product(x, u, v) - 1)
        < 1e-10
    )
    for map_ in (adapted.retraction, adapted.projection):
        assert cases.deviation(map_(move(x), move(u)), move(map_(x, u))) < 1e-10
    moved = adapted.transport(move(x), move(y), move(u))
    assert cases.deviation(moved, move(adapted.transport(x, y, u))) < 1e-10
    assert cases.deviation(adapted.log(move(x), y), move(adapted.log(x, y))) < 1e-9
    assert abs(adapted.dist(move(x), y) / adapted.dist(x, y) - 1) < 1e-9


def test_our_own_checks_pass():
    for kind in cases.KINDS:
        for result in checks.check_manifold(cases.manifold(kind, (2,))):
            assert result, str(result)


@every_kind
def test_single_precision_stays_single(kind):
    adapted = cases.manifold(kind, dtype=np.float32)
    wide = cases.manifold(kind)
    x = adapted.random_point()
    u, v = adapted.random_tangent_vector(x), adapted.random_point()
    results = (
        adapted.retraction(x, u),
        adapted.projection(x, v),
        adapted.euclidean_to_riemannian_hessian(x, v, v, u),
        adapted.log(x, adapted.retraction(x, u)),
    )
    assert all(t.dtype == torch.float32 for result in results for t in cases.tensors(result))

    def widened(point):
        return wide.from_torch(
            tuple(t.double() for t in cases.tensors(point))
            if isinstance(point, tuple)
            else cases.tensors(point)[0].double()
        )

    exact = wide.euclidean_to_riemannian_hessian(*map(widened, (x, v, v, u)))
    assert 0 < cases.deviation(widened(results[2]), exact) < 1e-6
    problem = qp.problem(adapted, cases.invariant_cost(adapted))
    hessian = problem.riemannian_hessian(x, u)
    assert all(t.dtype == torch.float32 for t in cases.tensors(hessian))


# ---- memory -------------------------------------------------------------------------------------


def storage(array):
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


@every_backend
@pytest.mark.parametrize("kind", ["preconditioned", "gram"])
def test_nothing_is_copied_on_the_way_to_the_cost(kind, backend):
    adapted = cases.manifold(kind, backend=backend)
    cost, seen = cases.invariant_cost(adapted), []

    def spy(x):
        seen.append([t.data_ptr() for t in (x if isinstance(x, tuple) else (x,))])
        return cost(x)

    x = adapted.random_point()
    qp.problem(adapted, spy).cost(x)
    assert seen == [[storage(array) for array in (x if isinstance(x, tuple) else (x,))]]


@every_backend
def test_nothing_is_copied_on_the_way_to_and_from_the_quotient(backend, monkeypatch):
    adapted = cases.manifold("preconditioned", backend=backend)
    seen = []

    def spy(x, u):
        result = FactorQuotient.retract(adapted.quotient, x, u)
        seen.append([[t.data_ptr() for t in pair] for pair in (x, u, result)])
        return result

    monkeypatch.setattr(adapted, "_retract", spy)
    x, u = adapted.random_point(), adapted.random_point()
    y = adapted.retraction(x, u)
    assert seen == [[[storage(array) for array in pair] for pair in (x, u, y)]]


@every_backend
def test_graphs_do_not_leak_into_points(backend):
    adapted = cases.manifold("preconditioned", backend=backend)
    problem = qp.problem(adapted, cases.invariant_cost(adapted))
    x = adapted.random_point()
    if backend == "torch":
        x = qp.FactorPair(*(factor.requires_grad_() for factor in x))
    u = adapted.random_tangent_vector(x)
    for result in (problem.riemannian_gradient(x), problem.riemannian_hessian(x, u)):
        assert not any(t.requires_grad for t in cases.tensors(result))
    assert not any(t.requires_grad for t in cases.tensors(adapted.retraction(x, u)))


# ---- problems -----------------------------------------------------------------------------------


@every_kind
@every_backend
@every_batch
def test_derivatives_are_autograds_own(kind, backend, batch_shape):
    adapted = cases.manifold(kind, batch_shape, backend)
    cost = cases.invariant_cost(adapted)
    problem = qp.problem(adapted, cost)
    x = adapted.random_point()
    u = adapted.random_tangent_vector(x)
    tx, tu = cases.on_tensors(x), cases.on_tensors(u)
    leaves = [t.detach().requires_grad_() for t in cases.tensors(x)]
    loss = cost(tuple(leaves) if len(leaves) > 1 else leaves[0])
    partials = torch.autograd.grad(loss, leaves, create_graph=True)
    along = sum((p * d).sum() for p, d in zip(partials, cases.tensors(u), strict=True))
    second = torch.autograd.grad(along, leaves)
    first = [p.detach() for p in partials]
    one = len(leaves) == 1
    partial, product = (first[0], second[0]) if one else (tuple(first), second)

    assert isinstance(problem.cost(x), float)
    assert abs(problem.cost(x) / loss.item() - 1) < 1e-13
    assert cases.deviation(problem.euclidean_gradient(x), partial) < 1e-13
    assert cases.deviation(problem.euclidean_hessian(x, u), product) < 1e-12
    gradient = adapted.quotient.gradient(tx, partial)
    assert cases.deviation(problem.riemannian_gradient(x), gradient) < 1e-12
    hessian = adapted.quotient.hessian(tx, partial, product, tu)
    assert cases.deviation(problem.riemannian_hessian(x, u), hessian) < 1e-11


def test_cost_takes_the_point_or_its_arrays():
    adapted = cases.manifold("preconditioned")
    x = adapted.random_point()
    expected = np.linalg.norm(x.A.T @ x.B) ** 2
    forms = (
        lambda point: (point[0].mT @ point[1]).square().sum(),
        lambda A, B: (A.mT @ B).square().sum(),
        lambda *factors: (factors[0].mT @ factors[1]).square().sum(),
        lambda A, B, power=2: (A.mT @ B).pow(power).sum(),
        lambda point, power=2: (point[0].mT @ point[1]).pow(power).sum(),
    )
    for form in forms:
        assert abs(qp.problem(adapted, form).cost(x) / expected - 1) < 1e-13
    product = pymanopt.manifolds.Product([adapted, pymanopt.manifolds.Euclidean(4)])
    point = [x, np.arange(4.0)]
    for form in (
        lambda p: (p[0][0].mT @ p[0][1]).square().sum() + p[1].sum(),
        lambda A, B, c: (A.mT @ B).square().sum() + c.sum(),
    ):
        assert abs(qp.problem(product, form).cost(point) / (expected + 6) - 1) < 1e-13


def test_one_forward_pass_serves_one_evaluation():
    adapted = cases.manifold("preconditioned")
    cost, calls = cases.invariant_cost(adapted), []

    def counted(x):
        calls.append(1)
        return cost(x)

    problem = qp.problem(adapted, counted, check_invariance=False)
    x, y = adapted.random_point(), adapted.random_point()
    u = adapted.random_tangent_vector(x)
    for count, evaluation in enumerate(
        (
            lambda: problem.cost(x),
            lambda: problem.riemannian_gradient(x),
            lambda: problem.riemannian_hessian(x, u),
            lambda: problem.riemannian_hessian(x, -u),
            lambda: problem.euclidean_hessian(x, u),
            lambda: problem.cost(y),
        ),
        start=1,
    ):
        evaluation()
        assert len(calls) == count


@every_backend
def test_writing_to_a_point_or_a_result_cannot_make_answers_stale(backend):
    adapted = cases.manifold("preconditioned", backend=backend)
    problem = qp.problem(adapted, cases.invariant_cost(adapted))
    x = adapted.random_point()
    u = adapted.random_tangent_vector(x)
    answers = (
        problem.cost,
        problem.riemannian_gradient,
        lambda p: problem.riemannian_hessian(p, u),
    )
    before = [answer(x) for answer in answers]
    gradient = problem.euclidean_gradient(x)
    gradient[0][...] = 7.0
    assert cases.deviation(problem.riemannian_gradient(x), before[1]) == 0
    x.A[...] = 2 * x.A
    other = qp.problem(adapted, cases.invariant_cost(adapted))
    fresh = qp.FactorPair(1.0 * x.A, 1.0 * x.B)
    assert problem.cost(x) == other.cost(fresh) != before[0]
    for answer, old in zip(answers[1:], before[1:], strict=True):
        assert cases.deviation(answer(x), old) > 1e-3
    assert cases.deviation(answers[1](x), other.riemannian_gradient(fresh)) == 0
    assert cases.deviation(answers[2](x), other.riemannian_hessian(fresh, u)) == 0
    assert adapted.norm(x, u) == adapted.norm(fresh, u)


def test_a_point_is_factorised_once(monkeypatch):
    adapted = cases.manifold("preconditioned")
    problem = qp.problem(adapted, cases.invariant_cost(adapted), check_invariance=False)
    x = adapted.random_point()
    u = adapted.random_point()
    calls, original = [], torch.linalg.cholesky_ex

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)

    def everything(point):
        problem.riemannian_gradient(point)
        adapted.norm(point, u), adapted.projection(point, u), problem.riemannian_hessian(point, u)
        return len(calls)

    once = everything(x)
    assert once > 0
    assert everything(x) == once
    y = adapted.retraction(x, u)
    assert len(calls) == once
    assert everything(y) == 2 * once


def test_partial_derivatives_that_do_not_depend_on_the_point():
    space = pymanopt.manifolds.Euclidean(4)
    problem = qp.problem(space, lambda x: 3 * x.sum())
    x, u = np.ones(4), np.arange(4.0)
    assert (problem.riemannian_gradient(x) == 3).all()
    assert (problem.riemannian_hessian(x, u) == 0).all()
    factors = cases.euclidean_factors(2, 3, 3)
    mixed = qp.problem(factors, lambda A, B: A.sum() + (B**2).sum() / 2)
    hessian = mixed.riemannian_hessian([np.ones((2, 3))] * 2, [np.ones((2, 3))] * 2)
    assert (hessian[0] == 0).all()
    assert (hessian[1] == 1).all()
    ignored = qp.problem(factors, lambda A, B: (B**2).sum() / 2)
    assert (ignored.riemannian_gradient([np.ones((2, 3))] * 2)[0] == 0).all()


def test_preconditioner_is_passed_on():
    adapted = cases.manifold("gram")
    problem = qp.problem(adapted, cases.invariant_cost(adapted), preconditioner=lambda x, u: 2 * u)
    x = adapted.random_point()
    assert (problem.preconditioner(x, x) == 2 * x).all()


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"backend": "jax"}, ValueError, "backend must be one of.*'jax'"),
        ({"metric": "flat"}, ValueError, "metric"),
        ({"retraction": "exp"}, ValueError, "retraction must be one of.*'exp'"),
        ({"device": "nowhere"}, ValueError, "device 'nowhere' is not available"),
        ({"device": "meta"}, ValueError, "backend='torch' for device meta"),
        ({"dtype": torch.int32}, TypeError, "dtype must be real floating-point, got torch.int32"),
        ({"dtype": np.complex128}, TypeError, "dtype must be real floating-point"),
        ({"dtype": torch.bfloat16}, TypeError, "NumPy has no torch.bfloat16"),
        ({"dtype": "nonsense"}, TypeError, "dtype 'nonsense'"),
        ({"batch_shape": (0,)}, ValueError, "batch_shape"),
    ],
)
def test_options_are_honoured_or_refused(options, error, words):
    with pytest.raises(error, match=words) as caught:
        qp.FactorManifold(2, 4, 3, **options)
    assert "\n" not in str(caught.value)


def test_points_of_the_other_kind_are_refused():
    numpy, tensor = (cases.manifold("preconditioned", backend=b) for b in cases.BACKENDS)
    x, y = numpy.random_point(), tensor.random_point()
    with pytest.raises(TypeError, match=r"needs numpy.ndarray, got Tensor; use backend='torch'\Z"):
        numpy.norm(y, y)
    with pytest.raises(TypeError, match=r"needs torch.Tensor, got ndarray; use backend='numpy'\Z"):
        tensor.norm(x, x)
    with pytest.raises(TypeError, match=r"use backend='numpy'\Z"):
        qp.problem(tensor, cases.invariant_cost(tensor)).cost(x)
    with pytest.raises(TypeError, match=r"point must be a pair \(A, B\) of arrays, got ndarray\Z"):
        numpy.norm(x.A, x)
    with pytest.raises(ValueError, match=r"must have shape \(3, 7\), got \(3, 5\)"):
        numpy.norm(qp.FactorPair(x.B, x.A), x)


@every_kind
def test_bad_points_are_refused_where_a_gradient_is_formed(kind):
    adapted = cases.manifold(kind, (2,))
    problem = qp.problem(adapted, cases.invariant_cost(adapted), check_invariance=False)
    x = adapted.random_point()
    first = x[0] if isinstance(x, tuple) else x
    keep = first.copy()
    problem.riemannian_gradient(x)
    first[0] = np.nan
    with pytest.raises(ValueError, match="non-finite"):
        problem.riemannian_gradient(x)
    first[...] = keep
    first[1] = 0.0
    if kind == "orthogonal":
        x[1][1] = 0.0
    with pytest.raises(ValueError, match=r"rank|vanish"):
        problem.riemannian_gradient(x)


def test_costs_of_the_wrong_form_are_refused():
    adapted = cases.manifold("preconditioned")
    x = adapted.random_point()
    with pytest.raises(TypeError, match="manifold must be a pymanopt manifold, got FactorQuotient"):
        qp.problem(adapted.quotient, lambda A, B: A.sum())
    with pytest.raises(TypeError, match="cost must be a function of the point, got int"):
        qp.problem(adapted, 3)
    with pytest.raises(TypeError, match="has no signature"):
        qp.problem(adapted, torch.dot)
    for wrong in (lambda A, B, C: A.sum(), lambda: 0.0, lambda A, *, B: A.sum()):
        with pytest.raises(TypeError, match="cost must take the point as one argument or its 2"):
            qp.problem(adapted, wrong)
    for wrong, error, words in (
        (lambda A, B: 1.0, TypeError, "cost must return a scalar torch.Tensor, got float"),
        (lambda A, B: A.mT @ B, ValueError, r"got torch.float64 of shape \(7, 5\)"),
        (lambda A, B: (A.detach().mT @ B.detach()).sum(), ValueError, "has no graph"),
        (lambda A, B: (A.mT @ B).sum().round().int(), ValueError, "got torch.int32"),
    ):
        for ask in ("cost", "riemannian_gradient"):
            with pytest.raises(error, match=words) as caught:
                getattr(qp.problem(adapted, wrong), ask)(x)
            assert "\n" not in str(caught.value)
    space = pymanopt.manifolds.Euclidean(3)
    with pytest.raises(TypeError, match="point must have a real floating-point dtype"):
        qp.problem(space, lambda v: v.sum()).cost(np.arange(3))


def test_costs_that_are_not_finite_are_refused():
    adapted = cases.manifold("preconditioned")
    x = adapted.random_point()
    bad = qp.problem(adapted, lambda A, B: (A.mT @ B).square().sum().mul(-1).sqrt())
    with pytest.raises(ValueError, match=r"the gradient of cost .* non-finite"):
        bad.riemannian_gradient(x)
    kink = qp.problem(adapted, lambda A, B: ((A.mT @ B).square().sum() * 0).pow(1.5))
    with pytest.raises(ValueError, match=r"the Hessian of cost .* non-finite"):
        kink.riemannian_hessian(x, x)


def test_products_of_two_backends_are_refused():
    product = pymanopt.manifolds.Product(
        [cases.manifold("gram", backend="torch"), pymanopt.manifolds.Euclidean(3)]
    )
    with pytest.raises(ValueError, match=r"a product needs one backend.*Euclidean"):
        qp.problem(product, lambda X, c: X.sum() + c.sum())
    twins = [cases.manifold("preconditioned", backend=backend) for backend in cases.BACKENDS]
    with pytest.raises(ValueError, match="a product needs one backend"):
        qp.problem(pymanopt.manifolds.Product(twins), lambda A, B, C, D: A.sum())


@every_kind
@every_backend
def test_costs_that_change_along_orbits_are_refused(kind, backend):
    adapted = cases.manifold(kind, (2,), backend)
    cost = cases.invariant_cost(adapted)

    def parts(x):
        return x if isinstance(x, tuple) else (x,)

    def with_preference(x):
        return cost(x) + sum(0.1 * part[..., 0, 0].sum() for part in parts(x))

    x = adapted.random_point()
    qp.problem(adapted, cost).riemannian_gradient(x)
    with pytest.raises(
        ValueError, match=r"cost is not invariant under .*check_invariance=False"
    ) as caught:
        qp.problem(adapted, with_preference).riemannian_gradient(x)
    assert "\n" not in str(caught.value)
    qp.problem(adapted, with_preference, check_invariance=False).riemannian_gradient(x)


def test_invariance_is_decided_even_at_a_critical_point():
    adapted = cases.manifold("preconditioned")
    x = adapted.random_point()
    target = torch.from_numpy(x.A.T @ x.B)
    problem = qp.problem(adapted, lambda A, B: (A.mT @ B - target).square().sum())
    assert adapted.norm(x, problem.riemannian_gradient(x)) < 1e-12
    weighted = qp.problem(
        adapted, lambda A, B: (A.mT @ B - target).square().sum() + 1e-3 * A.square().sum()
    )
    with pytest.raises(ValueError, match="not invariant"):
        weighted.riemannian_gradient(x)
    orthogonal = cases.manifold("orthogonal")  # under which weight decay is invariant
    qp.problem(
        orthogonal, lambda A, B: (A.mT @ B).square().sum() + A.square().sum() + B.square().sum()
    ).riemannian_gradient(x)


def test_arrays_that_torch_cannot_hold_are_copied():
    adapted = cases.manifold("preconditioned")
    x, u = adapted.random_point(), adapted.random_point()
    reversed_ = qp.FactorPair(x.A[:, ::-1].copy()[:, ::-1], x.B)
    frozen = qp.FactorPair(x.A.copy(), x.B)
    frozen.A.flags.writeable = False
    assert adapted.norm(reversed_, u) == adapted.norm(x, u) == adapted.norm(frozen, u)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: python -m pytest -m gpu on one"
)
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["preconditioned", "gram"])
def test_cuda(kind):
    adapted = cases.manifold(kind, (4,), "torch", device="cuda")
    x = adapted.random_point()
    assert all(t.is_cuda for t in cases.tensors(x))
    problem = qp.problem(adapted, cases.invariant_cost(adapted))
    on_cpu = cases.manifold(kind, (4,), "torch")
    start = on_cpu.from_torch(cases.move_to(x, "cpu"))
    for solver in (
        pymanopt.optimizers.SteepestDescent,
        pymanopt.optimizers.ConjugateGradient,
        pymanopt.optimizers.TrustRegions,
    ):
        there = cases.trace(solver, problem, x, 5)
        here = cases.trace(solver, qp.problem(on_cpu, cases.invariant_cost(on_cpu)), start, 5)
        assert all(t.is_cuda for t in cases.tensors(there.points[-1]))
        assert cases.relative(there.costs, here.costs) < 1e-9
        assert there.costs[-1] < there.costs[0]

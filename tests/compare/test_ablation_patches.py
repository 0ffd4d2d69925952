"""Variants of QuotientAdam that the ablations patch: each does what it says, and is undone."""

import functools
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import quotientopt as qo
from quotientopt.compare.protocol import Protocol, Trial
from quotientopt.manifolds import FactorQuotient
from quotientopt.optim import buckets as bucket
from quotientopt.optim import engine, polar
from tests.optim.training import small_model, train

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ablation
import ablation_patches as patches
import ablation_variants as variants

OPTIONS = {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def losses(patch=nullcontext, steps=24, **options):
    model = small_model()
    with patch():
        return train(model, qo.QuotientAdam(model, **OPTIONS | options), steps)


def deviation(a, b):
    return (a - b).abs().max().item()


def test_every_variant_trains_and_is_not_the_default(text_file):
    protocol = Protocol(
        data=str(text_file), steps=12, batch=2, context=16, layers=1, width=32, evaluate_every=12
    )
    protocol = replace(protocol, validation_batches=2)
    default = ablation.train_variant(Trial("default", 2e-3), protocol)
    again = ablation.train_variant(Trial("default", 2e-3), protocol)
    assert again.training_losses == default.training_losses
    longer = replace(protocol, steps=100, evaluate_every=100)  # Young frames last as long as these.
    old = {name for name in variants.VARIANTS if name.startswith("refresh every")}
    old.add("frames of a twentieth")
    grown = ablation.train_variant(Trial("default", 2e-3), longer)
    for name in set(variants.VARIANTS) - {"default"}:
        own, default_run = (longer, grown) if name in old else (protocol, default)
        run = ablation.train_variant(Trial(name, 2e-3), own)
        assert run.status == "finished", name
        assert run.training_losses[0] == default_run.training_losses[0], name
        assert run.final_loss != default_run.final_loss, name
    assert set(ablation.OPTIMIZERS).isdisjoint(variants.VARIANTS)


def test_patches_are_undone():
    def parts():
        watched = (engine.Engine, bucket.Bucket, engine, bucket, polar)
        return [dict(vars(thing)) for thing in watched]

    before = parts()
    for variant in variants.VARIANTS.values():
        if variant.patch is None:
            continue
        context = variant.patch()
        context.__enter__()
        assert parts() != before, variant.name
        error = KeyError()
        assert not context.__exit__(KeyError, error, None)
        assert parts() == before, variant.name


def test_frames_pooled_over_the_model_are_the_shared_frame():
    # Twelve steps, since training amplifies rounding; the tenth makes frames.
    own = {
        "embedding_frame": "per_matrix",
        "steps": 12,
    }  # Fixed frames of embeddings would stay their own.
    shared = losses(residual_frame="shared", **own)
    pooled = losses(lambda: patches.pooled_residual_frames(lambda slice_: "all"), **own)
    assert deviation(pooled, shared) < 1e-10
    for options in (own, {"steps": 12}):
        per_layer = losses(
            lambda: patches.pooled_residual_frames(patches.layer_and_direction), **options
        )
        alone = losses(
            lambda: patches.pooled_residual_frames(lambda slice_: slice_.name), **options
        )
        assert deviation(alone, losses(**options)) < 1e-10
        assert deviation(per_layer, alone) > 1e-4
        assert deviation(per_layer, shared) > 1e-4


def test_classes_of_residual_frames():
    optimizer = qo.QuotientAdam(small_model())
    classes = {
        slice_.name: patches.layer_and_direction(slice_) for slice_ in optimizer._slices.framed
    }
    assert classes["blocks.0.attention.query.weight"] == classes["blocks.0.mlp.up.weight"]
    assert classes["blocks.0.attention.output.weight"] == classes["blocks.0.mlp.down.weight"]
    assert len(set(classes.values())) == 2 * 2 + 3


def test_polar_factors_made_at_every_step_are_those_of_decompositions():
    default = losses()
    exact = losses(lambda: patches.reused_polar_factors(1))
    reused = losses(lambda: patches.reused_polar_factors(2))
    # The composition of polynomials ends within 7.5 % of the polar factor.
    assert 1e-6 < deviation(exact, default) < 0.5 * deviation(reused, default)


def test_other_compositions():
    default = losses()
    same = losses(lambda: patches.polar_composition(*polar.COMPOSITION))
    assert torch.equal(same, default)
    # σ itself: the update stays Adam's direction.
    identity = ((1.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    plain = losses(lambda: patches.polar_composition(*identity), steps=12)
    assert deviation(plain, losses(polar=False, steps=12)) < 1e-10
    assert deviation(plain, default[:12]) > 1e-4


@pytest.mark.parametrize("polynomials", [variants.TWICE_DEGREE_9, polar.COMPOSITION])
def test_a_composition_is_as_near_to_one_as_said(polynomials):
    low = 0.0288 if polynomials is variants.TWICE_DEGREE_9 else 0.02
    for start, bound in ((low, 0.0745), (0.5 * low, 1.0)):
        values = torch.linspace(start, 1, 20001, dtype=torch.float64)
        for coefficients in polynomials:
            values = sum(c * values ** (2 * k + 1) for k, c in enumerate(coefficients))
        assert (values - 1).abs().max() < bound
    assert (values - 1).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 4, 6), (2, 5, 5)])
def test_the_polar_factor_by_decomposition(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    matrix += 3 * torch.eye(*shape[1:], dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    assert (S.amin(-1) > 0.05 * S.amax(-1)).all()  # none is cut off
    tall = shape[1] >= shape[2]
    long = matrix if tall else matrix.mT
    polar = long @ patches.inverse_root(long.mT @ long)
    assert deviation(polar if tall else polar.mT, U @ Vh) < 1e-10
    assert deviation(U @ Vh, matrix) > 1e-2


def test_covariances_of_a_momentum_without_memory_are_the_default():
    for betas, least, most in (((0.0, 0.95), 0.0, 1e-10), ((0.9, 0.95), 1e-4, 1.0)):
        default = losses(betas=betas)
        assert least <= deviation(losses(patches.momentum_covariances, betas=betas), default) < most


@pytest.mark.parametrize("steps", [10, 12])
def test_covariances_of_momentum_are_those_of_the_momentum(steps):
    """At the tenth step frames are made, and the momentum is moved to fresh fields first."""
    model = small_model()
    optimizer = qo.QuotientAdam(model, **OPTIONS)
    taken = []
    accumulate = bucket.Bucket.accumulate

    def remembered(self, dressed, *arguments):
        taken.append((self, dressed))
        return accumulate(self, dressed, *arguments)

    with pytest.MonkeyPatch.context() as patch, patches.momentum_covariances():
        patch.setattr(bucket.Bucket, "accumulate", remembered)
        train(model, optimizer, steps)
    last = {id(own): (own, dressed) for own, dressed in taken}
    assert len(last) >= 3
    for own, dressed in last.values():
        assert own.steps[0] == steps
        # Rows may have been turned since, which their Gram does not see.
        kept = own.state["exp_avg"].flatten(1, -2)
        rows = dressed.flatten(1, -2)
        turned, size = rows @ own.residual_frames(), kept.square().sum()
        assert deviation(turned.mT @ turned, kept.mT @ kept) < 1e-12 * size
        assert deviation(rows.mT @ rows, kept.mT @ kept) > 1e-3 * size / kept.size(-1)


def test_frames_are_rounded():
    def kept(patch):
        model = small_model()
        optimizer = qo.QuotientAdam(model, **OPTIONS)
        with patch():
            train(model, optimizer, 11)
        states = optimizer.state.values()
        return [s[k] for s in states for k in ("residual_frame", "residual_covariance") if k in s]

    assert all(
        torch.equal(tensor, tensor.bfloat16().double()) for tensor in kept(patches.narrow_frames)
    )
    assert not any(torch.equal(tensor, tensor.bfloat16().double()) for tensor in kept(nullcontext))


def test_second_moment_is_kept_when_frames_change():
    model = small_model()
    optimizer = qo.QuotientAdam(model, **OPTIONS)
    train(model, optimizer, 15)

    def moments():
        return [
            torch.cat([state[key].flatten() for state in optimizer.state.values()])
            for key in ("exp_avg", "exp_avg_sq")
        ]

    mean, square = moments()
    with patches.unrotated_second_moment():
        optimizer.refresh_frames()
    assert deviation(moments()[0], mean) > 1e-6
    assert torch.equal(moments()[1], square)
    optimizer.refresh_frames()
    assert deviation(moments()[1], square) > 1e-9


def test_decomposed_frames_diagonalise_better_than_iterated_ones():
    def off_diagonal(patch):
        model = small_model()
        optimizer = qo.QuotientAdam(model, **OPTIONS)
        with patch():
            train(model, optimizer, 30)
        fractions = []
        for state in optimizer.state.values():
            if "residual_covariance" not in state:
                continue  # fixed frames
            Q, R = state["residual_frame"], state["residual_covariance"]
            turned = Q.mT @ R @ Q
            rest = turned - turned.diagonal(dim1=-2, dim2=-1).diag_embed()
            fractions.append((rest.norm() / turned.norm()).item())
        return max(fractions)

    decomposed = off_diagonal(patches.decomposed_residual_frames)
    assert decomposed < 0.02
    assert decomposed < 0.5 * off_diagonal(nullcontext)


def test_covariances_take_the_gradients_asked_for():
    taken = []
    accumulate = bucket.Bucket.accumulate

    def counted(self, dressed, beta, gate=None):
        taken.append((self.steps[0], beta))
        return accumulate(self, dressed, beta, gate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket.Bucket, "accumulate", counted)
        losses(lambda: patches.covariances(5, 0.8), steps=12)
    assert sorted(set(taken)) == [(0, 0.8), (4, 0.8), (9, 0.8)]


def test_intervals_are_those_asked_for():
    made = []
    begin = engine.Engine._begin_refresh

    def noted(self, *arguments):
        made.append(self.buckets[0].steps[0] + 1)
        return begin(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Engine, "_begin_refresh", noted)
        for part, expected in (
            (None, [1, 10, 20]),
            (4, [*range(1, 9), 10, 12, 15, 16, 20]),
            (8, [*range(1, 17), 18, 20]),
        ):
            made.clear()
            losses(functools.partial(patches.intervals, part), steps=20)
            assert made == expected


def steps_of(model, patch, steps=3):
    """Parameters before and after the last of some steps without weight decay."""
    optimizer = qo.QuotientAdam(model, **OPTIONS | {"weight_decay": 0.0})
    with patch():
        train(model, optimizer, steps - 1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        train(model, optimizer, 1, seed=5)
    return before, {name: p.detach() for name, p in model.named_parameters()}


def vertical_fraction(model, patch):
    before, after = steps_of(model, patch)
    fractions = []
    for symmetry in qo.find_symmetries(model).heads:
        (left,), (right,) = symmetry.left_blocks, symmetry.right_blocks
        manifold = FactorQuotient(8, *symmetry.columns, batch_shape=(4,))
        x = left.view(before[left.name]), right.view(before[right.name])
        y = left.view(after[left.name]), right.view(after[right.name])
        u = (y[0] - x[0], y[1] - x[1])
        vertical = manifold.norm(x, manifold.vertical_component(x, u))
        fractions.append((vertical / manifold.norm(x, u)).max().item())
    return max(fractions)


def test_updates_of_pairs_are_projected():
    assert vertical_fraction(small_model(), patches.horizontal_updates) < 1e-12
    assert vertical_fraction(small_model(), nullcontext) > 1e-2


def test_projection_leaves_everything_else_alone():
    default = steps_of(small_model(), nullcontext, 1)[1]
    projected = steps_of(small_model(), patches.horizontal_updates, 1)[1]
    for name, parameter in default.items():
        assert torch.equal(parameter, projected[name]) == ("attention" not in name), name


def test_grouped_queries_are_projected_side_by_side():
    model = small_model("llama", heads=4, key_value_heads=2)
    before, after = steps_of(model, patches.horizontal_updates)
    symmetry = next(s for s in qo.find_symmetries(model).heads if s.name.endswith("vo"))

    def factors(parameters):
        left = [block.view(parameters[block.name]) for block in symmetry.left_blocks]
        return torch.cat(left, -1), symmetry.right_blocks[0].view(
            parameters[symmetry.right_blocks[0].name]
        )

    x, y = factors(before), factors(after)
    manifold = FactorQuotient(8, 64, 32, batch_shape=(2,))
    u = (y[0] - x[0], y[1] - x[1])
    vertical = manifold.norm(x, manifold.vertical_component(x, u))
    assert (vertical / manifold.norm(x, u)).max() < 1e-12


def test_updates_get_the_size_asked_for():
    def sizes(patch):
        before, after = steps_of(small_model(), patch)
        changes = {name: (after[name] - before[name]) / OPTIONS["lr"] for name in after}
        return {name: change.square().mean().sqrt().item() for name, change in changes.items()}

    # Matrices without a head frame are updated by a rotation of their dressed update, of four
    # times the learning rate (`update_scale`), embeddings of eight times.
    constant = sizes(variants.VARIANTS["constant size"].patch)
    assert constant["blocks.1.mlp.up.weight"] == pytest.approx(4 * 0.2)
    assert constant["embedding.weight"] == pytest.approx(8 * 0.2)
    spectral = sizes(variants.VARIANTS["spectral size"].patch)
    assert spectral["blocks.1.mlp.up.weight"] == pytest.approx(4 * 0.4)
    assert spectral["blocks.1.mlp.down.weight"] == pytest.approx(4 * 0.2)
    assert spectral["head.weight"] == pytest.approx(8 * 0.2)
    assert abs(sizes(nullcontext)["blocks.1.mlp.up.weight"] - 4 * 0.2) > 1e-2

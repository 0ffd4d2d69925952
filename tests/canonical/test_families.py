"""Canonical forms of every family of transformers that find_symmetries knows."""

import copy

import pytest
import torch

import quotientopt as qo
from quotientopt.canonical import align_, distance, dress_, invariants, spectra
from quotientopt.canonical.moving import HeadOrder, attentions, complete, exchangeable, reorder_
from quotientopt.canonical.reading import query_groups
from quotientopt.groups import GL, StabilizerOfOnes
from tests.canonical.models import difference, twin_of
from tests.symmetries.double import KeepFloat64
from tests.symmetries.families import FAMILIES, OutputsOnly, make_neutral_

# Attentions with something per head outside the pairs: slopes (ALiBi), a table of biases, sinks, a
# rotated part of every query beside the pairs.
TOLD_APART = {"bloom", "deepseek2", "deepseek3", "gpt-oss", "mpnet", "mpt", "t5"}
# Orders of heads are a symmetry of these too, which their classes do not tell: Falcon's attention
# may have slopes, CodeGen's is several, each in a part of one module.
NOT_KNOWN_ALIKE = {"codegen", "falcon"}
# Nothing is known of their query-key pairs, which have gains: only the value-output pair is there.
HALF_KNOWN = {name for name, family in FAMILIES.items() if None in family.groups}


def example(name, **settings):
    family = FAMILIES[name]
    model = family.model(**settings).double()
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in family.inputs().items()}

    def run(other):
        with torch.no_grad(), KeepFloat64():
            return OutputsOnly(other)(**inputs)

    return model, run


def deviation(run, one, two):
    expected = run(one)
    return ((run(two) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_dressing(name):
    model, run = example(name)
    # Norms without gains leave a symmetry of the stream, which is not dressed here.
    twin = twin_of(model, cond=100.0, residual=False)
    for section in ("svd", "balanced", "orthonormal", "triangular"):
        dressed = copy.deepcopy(twin)
        dress_(dressed, section)
        assert deviation(run, model, dressed) < 1e-10
        assert difference(twin, dressed) > 1e-3
        again = copy.deepcopy(dressed)
        dress_(again, section)
        assert difference(dressed, again) < 1e-10
    dress_(model)
    dress_(twin)
    assert difference(model, twin) < 1e-10


@pytest.mark.parametrize("name", FAMILIES)
def test_two_gauges_and_another_model(name):
    model, _ = example(name)
    twin = twin_of(model, cond=100.0)
    found = distance(model, twin)
    assert max(found.values()) < 1e-10
    twin = twin_of(model, cond=100.0, residual=False)
    ours, theirs = invariants(model), invariants(twin)
    for key, one in ours.items():
        assert torch.allclose(one.dense(), theirs[key].dense(), atol=1e-9)
    values = zip(spectra(model).values(), spectra(twin).values(), strict=True)
    for one, two in values:
        assert torch.allclose(one.singular_values, two.singular_values, atol=1e-10)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn_like(parameter))
    other = distance(model, twin, relative=True)
    assert min(other.values()) > 0.5


def shuffled(model):
    """A copy with other orders of heads in every attention of which both pairs are known."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for pair in attentions(qo.find_symmetries(copied).heads).values():
        if complete(pair):
            heads, k = pair[0].heads, len(query_groups(pair[0]))
            inner = torch.stack([torch.randperm(k, generator=generator) for _ in range(heads)])
            outer = torch.randperm(heads, generator=generator).roll(1)
            for symmetry in pair:
                reorder_(symmetry, HeadOrder(outer, inner))
    return copied


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - HALF_KNOWN))
def test_alignment(name):
    model, run = example(name)
    twin = shuffled(twin_of(model, cond=100.0))
    moved = copy.deepcopy(twin)
    names = list(attentions(qo.find_symmetries(model).heads))
    alignment = align_(moved, model)
    assert deviation(run, twin, moved) < 1e-10
    left_alone = name in TOLD_APART | NOT_KNOWN_ALIKE
    assert all(exchangeable(model, n) for n in names) is not left_alone
    # Where heads are told apart, their order is no symmetry.
    if name in TOLD_APART:
        assert deviation(run, model, twin) > 1e-3
    else:
        assert deviation(run, model, twin) < 1e-10
    if left_alone:
        assert alignment.unordered == tuple(names)
        assert difference(model, moved) > 1e-3
    else:
        assert alignment.unordered == ()
        assert difference(model, moved) < 1e-10


@pytest.mark.parametrize("name", sorted(HALF_KNOWN))
def test_half_known_attentions_keep_their_order(name):
    model, run = example(name)
    twin = twin_of(model, cond=100.0)
    moved = copy.deepcopy(twin)
    alignment = align_(moved, model)
    pairs = attentions(qo.find_symmetries(model).heads)
    half = tuple(n for n, pair in pairs.items() if not complete(pair))
    assert half
    assert alignment.unordered == half
    assert deviation(run, model, moved) < 1e-10
    assert difference(model, moved) < 1e-10


# ---- streams that only centring breaks: the stabiliser of ones ----------------------------------

CENTRED = ("bert", "opt-350m", "albert", "gpt-neox")


def centred(name):
    model, run = example(name, **({"tie_word_embeddings": False} if name == "bert" else {}))
    make_neutral_(model)
    assert isinstance(qo.find_symmetries(model).residual.group, StabilizerOfOnes)
    return model, run


@pytest.mark.parametrize("name", CENTRED)
def test_centred_streams(name):
    model, run = centred(name)
    twin = shuffled(twin_of(model, cond=100.0))
    assert deviation(run, model, twin) < 1e-10
    aligned = copy.deepcopy(twin)
    align_(aligned, model)
    assert difference(model, aligned) < 1e-10
    assert distance(model, twin, residual=False, relative=True)["total"] > 0.1

    twin = twin_of(model, cond=100.0)
    assert max(distance(model, twin).values()) < 1e-10
    dressed = copy.deepcopy(twin)
    dressing = dress_(dressed, residual=True)
    assert dressing["residual"].sum(-1).sub(1).abs().max() < 1e-12
    assert deviation(run, model, dressed) < 1e-10
    again = copy.deepcopy(dressed)
    dress_(again, residual=True)
    assert difference(dressed, again) < 1e-10
    dress_(model, residual=True)
    assert difference(model, dressed) < 1e-10


@pytest.mark.parametrize("name", ["gpt-neox", "llama", "vit", "t5"])
def test_folded_streams(name):
    model, run = example(name)
    qo.fold_norms_(model, untie=True)
    assert qo.find_symmetries(model).residual.exact
    twin = twin_of(model, cond=100.0)
    assert deviation(run, model, twin) < 1e-10
    assert max(distance(model, twin).values()) < 1e-10
    aligned = copy.deepcopy(twin)
    align_(aligned, model)
    assert difference(model, aligned) < 1e-10
    dress_(model, residual=True)
    dress_(twin, residual=True)
    assert difference(model, twin) < 1e-10


# ---- wrong claims -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt-neox", "phi3"])
def test_gl_on_rotary_pairs_changes_the_function(name):
    model, run = example(name)
    wrong = copy.deepcopy(model)
    found = qo.find_symmetries(wrong).heads
    claimed = [qo.HeadSymmetry(s.left_blocks, s.right_blocks, GL(s.rank), s.name) for s in found]
    dress_(wrong, symmetries=claimed)
    assert deviation(run, model, wrong) > 1e-3

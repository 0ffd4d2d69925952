"""dress_: canonical representatives, function unchanged, idempotent, atomic."""

import copy

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt import canonical
from quotientopt.canonical import dress_
from quotientopt.groups import GL, O
from quotientopt.models import reference_model
from quotientopt.sections.convention import clusters
from quotientopt.symmetries import HeadSymmetry, SymmetryMap
from tests.canonical.models import (
    ARCHITECTURES,
    GROUPS,
    deviation,
    difference,
    example,
    hand_made,
    snapshot,
    twin_of,
    unchanged,
)
from tests.symmetries.architectures import small_gpt, small_gpt2, small_llama, tokens

SECTIONS = ("svd", "balanced", "orthonormal", "triangular")


def has_residual_group(model):
    residual = qo.find_symmetries(model).residual
    return residual is not None and residual.group is not None


def factors(symmetry):
    """Both factors, without the bias that a translation moves."""
    moved = () if symmetry.translation is None else symmetry.translation.blocks
    right = [block.view() for block in symmetry.right_blocks if block not in moved]
    return torch.cat(symmetry.left, dim=-1), torch.cat(right, dim=-1)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_function_unchanged_and_idempotent(name, section):
    model, run = example(name)
    twin = twin_of(model)
    dressed = copy.deepcopy(twin)
    dress_(dressed, section)
    assert deviation(run, model, dressed) < 1e-10
    assert difference(twin, dressed) > 1e-3  # something was done
    again = copy.deepcopy(dressed)
    dress_(again, section)
    assert difference(dressed, again) < 1e-10


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gauge_twins_have_one_svd_representative(name):
    model, _ = example(name)
    twin = twin_of(model)
    residual = has_residual_group(model)
    dress_(model, residual=residual)
    dress_(twin, residual=residual)
    assert difference(model, twin) < 1e-10


def test_without_the_residual_stream_rotated_twins_stay_apart():
    model, _ = example("gpt")
    twin = twin_of(model)
    dress_(model)
    dress_(twin)
    assert difference(model, twin) > 1e-2


@pytest.mark.parametrize("section", ["balanced", "orthonormal", "triangular"])
def test_other_sections_leave_their_residual_group(section):
    model, _ = example("gpt")
    twin = twin_of(model, residual=False)
    dress_(model, section)
    dress_(twin, section)
    assert difference(model, twin) > 1e-2
    for one, two in zip(
        qo.find_symmetries(model).heads, qo.find_symmetries(twin).heads, strict=True
    ):
        for ours, theirs in zip(factors(one), factors(two), strict=True):
            assert torch.allclose(ours.mT @ ours, theirs.mT @ theirs, atol=1e-10)


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_are_those_of_the_manifold(section):
    model, _ = example("gpt2")
    expected = {}
    for symmetry in qo.find_symmetries(model).heads:
        A, B = factors(symmetry)
        shape = {"batch_shape": (symmetry.heads,)}
        manifold = qo.manifolds.FactorQuotient(symmetry.rank, A.shape[-1], B.shape[-1], **shape)
        expected[symmetry.name], _ = manifold.section((A, B), section)
    dress_(model, section)
    for symmetry in qo.find_symmetries(model).heads:
        for found, wanted in zip(factors(symmetry), expected[symmetry.name], strict=True):
            assert torch.allclose(found, wanted, atol=1e-11)
        assert not symmetry.translation.blocks[0].view().any()


def test_svd_section_holds_the_singular_values():
    model, _ = example("gpt2")
    dense = {}
    for symmetry in qo.find_symmetries(model).heads:
        A, B = factors(symmetry)
        dense[symmetry.name] = torch.linalg.svdvals(A.mT @ B)[:, : symmetry.rank]
    dressing = dress_(model)
    for symmetry in qo.find_symmetries(model).heads:
        values = dense[symmetry.name]
        for factor in factors(symmetry):
            assert torch.allclose(factor @ factor.mT, torch.diag_embed(values), atol=1e-11)
            largest = factor.abs().argmax(dim=-1, keepdim=True)
        assert (factor.gather(-1, largest) > 0).all()
        gap = ((values[:, :-1] - values[:, 1:]) / values[:, :1]).amin(dim=-1)
        assert torch.allclose(dressing.gaps[symmetry.name], gap, atol=1e-10)
        assert symmetry.name in str(dressing)


def test_it_returns_the_element_that_it_used():
    model, _ = example("gpt")
    other = copy.deepcopy(model)
    dressing = dress_(model, residual=True)
    qo.find_symmetries(other).act_(dressing)
    assert difference(model, other) < 1e-12
    assert dressing.section == "svd"
    assert set(dressing) == {*(s.name for s in qo.find_symmetries(model).heads), "residual"}


def test_an_ill_conditioned_gauge_keeps_its_digits():
    """A Gram matrix squares the condition number; the second pass brings the digits back."""
    model, _ = example("gpt")
    twin = twin_of(model, cond=1e5, residual=False)
    dress_(model)
    dress_(twin)
    assert difference(model, twin) < 1e-9


def test_float32_and_bfloat16_keep_dtype_and_memory():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.06)):
        model, run = example("gpt", dtype)
        twin = twin_of(model, cond=10.0, residual=False)
        places = [p.data_ptr() for p in twin.parameters()]
        dress_(twin)
        assert [p.data_ptr() for p in twin.parameters()] == places
        assert {p.dtype for p in twin.parameters()} == {dtype}
        assert deviation(run, model, twin) < tolerance
        again = copy.deepcopy(twin)
        dress_(again)
        assert difference(twin, again) < tolerance


@pytest.mark.parametrize("section", SECTIONS)
def test_hugging_face_llama(section):
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install transformers"
    )
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    assert qo.find_symmetries(model).heads
    twin = twin_of(model, residual=False)
    dress_(twin, section)

    @torch.no_grad()
    def run(other):
        return other(tokens()).logits

    # Its rotary angles are float32.
    assert deviation(run, model, twin) < 1e-9
    if section == "svd":
        dress_(model)
        assert difference(model, twin) < 1e-10


# ---- the residual stream ------------------------------------------------------------------------


def test_residual_frame_is_principal():
    model, run = example("gpt")
    dressed = copy.deepcopy(model)
    dressing = dress_(dressed, residual=True)
    assert deviation(run, model, dressed) < 1e-10
    again = copy.deepcopy(dressed)
    dress_(again, residual=True)
    assert difference(dressed, again) < 1e-10
    # All matrices on the stream, head pairs balanced (which they are), have orthogonal columns.
    stream = qo.find_symmetries(dressed).residual
    rows = [stream.parameters[n].movedim(axis, -1) for n, axis in stream.axes.items()]
    covariance = sum(part.mT @ part for part in rows)
    diagonal = covariance.diagonal()
    assert (covariance - diagonal.diag()).abs().max() < 1e-10 * diagonal[0]
    assert (diagonal[:-1] > diagonal[1:]).all()
    roots = diagonal.sqrt()
    gap = ((roots[:-1] - roots[1:]) / roots[0]).min()
    assert torch.allclose(dressing.gaps["residual"], gap, atol=1e-8)


def test_residual_frame_is_refused_where_o_d_is_broken():
    model = small_llama().double()
    before = snapshot(model)
    with pytest.raises(ValueError, match="fold_norms_"):
        dress_(model, residual=True)
    assert unchanged(model, before)
    qo.fold_norms_(model)
    dress_(model, residual=True)
    with pytest.raises(ValueError, match="known residual stream"):
        dress_(example("attention")[0], residual=True)


def test_equal_eigenvalues_of_the_residual_stream():
    """Four directions of the stream are used by eight tokens alone, all with equal weight."""
    model = small_gpt().double()
    axes = qo.find_symmetries(model).residual.axes
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.movedim(axes[name], -1)[..., :4] = 0
        model.embedding.weight[:8] = 0
        model.embedding.weight[:8, :4] = 5 * torch.linalg.qr(torch.randn(8, 4).double()).Q
    twin = twin_of(model, cond=10.0)
    dressing = dress_(model, residual=True)
    dress_(twin, residual=True)
    assert dressing.gaps["residual"].item() < 1e-12
    assert difference(model, twin) < 1e-9


# ---- conventions --------------------------------------------------------------------------------


def orthogonal_gpt():
    """All singular values of every G_QK and G_VO coincide."""
    model = small_gpt().double()
    for symmetry in qo.find_symmetries(model).heads:
        for side in (symmetry.left, symmetry.right):
            for view in side:
                view.copy_(torch.linalg.qr(view.mT).Q.mT)
    return model


def test_equal_singular_values_are_fixed_too():
    model = orthogonal_gpt()
    twin = twin_of(model, residual=False)
    dressing = dress_(model)
    dress_(twin)
    assert all(gap.max() < 1e-12 for gap in dressing.gaps.values())
    assert difference(model, twin) < 1e-10
    again = copy.deepcopy(model)
    dress_(again)
    assert difference(model, again) < 1e-10


def test_equal_singular_values_need_the_convention(monkeypatch):
    monkeypatch.setattr("quotientopt.sections.convention.clusters", lambda *_: {})
    model = orthogonal_gpt()
    twin = twin_of(model, residual=False)
    dress_(model)
    dress_(twin)
    assert difference(model, twin) > 1e-2


def test_partly_equal_singular_values_stay_sorted():
    model = small_gpt().double()
    symmetry = qo.find_symmetries(model).heads[0]
    A, B = (torch.linalg.qr(torch.randn(3, 24, 8, dtype=torch.float64)).Q.mT for _ in range(2))
    values = torch.tensor([4.0, 3, 3, 3, 2, 1, 1, 0.5], dtype=torch.float64)
    symmetry.left[0].copy_(values.sqrt()[:, None] * A)
    symmetry.right[0].copy_(values.sqrt()[:, None] * B)
    twin = twin_of(model, residual=False)
    dress_(model)
    dress_(twin)
    assert difference(model, twin) < 1e-10
    assert torch.allclose(symmetry.left[0].square().sum(-1), values.expand(3, 8), atol=1e-12)


def test_close_singular_values_are_told_apart():
    """Closer than the rounding of float32, but not of float64: no cluster in float64."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        values = torch.tensor([[1.0, 1.0 - 1e-7, 0.5]], dtype=torch.float64)
        found[dtype] = clusters(values, dtype)
    assert found[torch.float32] == {(0, 2): [0]}
    assert found[torch.float64] == {}


# ---- groups other than GL -----------------------------------------------------------------------


@pytest.mark.parametrize("section", SECTIONS)
def test_partial_rotary_heads(section):
    model, run = hand_made("partial")
    twin = twin_of(model, symmetries=type(model).symmetries)
    dressed = copy.deepcopy(twin)
    dress_(dressed, section, symmetries=dressed.symmetries())
    assert deviation(run, model, dressed) < 1e-10
    again = copy.deepcopy(dressed)
    dress_(again, section, symmetries=again.symmetries())
    assert difference(dressed, again) < 1e-10
    if section == "svd":
        dress_(model, symmetries=model.symmetries())
        assert difference(model, dressed) < 1e-10


@pytest.mark.parametrize(
    ("kind", "section"),
    [
        ("normalized", "svd"),
        ("normalized", "polar"),
        ("centred", "svd"),
        ("centred", "polar"),
        ("phases", "svd"),
    ],
)
def test_normalized_heads(kind, section):
    model, run = hand_made(kind)
    twin = twin_of(model, symmetries=type(model).symmetries)
    dressed = copy.deepcopy(twin)
    qk = [s for s in dressed.symmetries().heads if s.name == "qk"]
    dress_(dressed, section, symmetries=qk)
    assert deviation(run, model, dressed) < 1e-10
    again = copy.deepcopy(dressed)
    dress_(again, section, symmetries=[s for s in again.symmetries().heads if s.name == "qk"])
    assert difference(dressed, again) < 1e-10
    dress_(model, section, symmetries=[s for s in model.symmetries().heads if s.name == "qk"])
    assert torch.allclose(model.query, dressed.query, atol=1e-11)
    assert torch.allclose(model.key, dressed.key, atol=1e-11)


@pytest.mark.parametrize("kind", GROUPS)
def test_a_wrong_group_changes_the_function(kind):
    model, run = hand_made(kind)
    wrong = copy.deepcopy(model)
    dress_(wrong, symmetries=wrong.symmetries(GL(8)))
    assert deviation(run, model, wrong) > 1e-3


def test_gl_on_rotary_heads_changes_the_function():
    model, run = example("llama")
    wrong = copy.deepcopy(model)
    found = qo.find_symmetries(wrong).heads
    claimed = [HeadSymmetry(s.left_blocks, s.right_blocks, GL(s.rank), s.name) for s in found]
    dress_(wrong, symmetries=claimed)
    assert deviation(run, model, wrong) > 1e-3


# ---- refusals: one line, nothing changed --------------------------------------------------------


def refused(model, error, match, **options):
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        dress_(model, **options)
    assert "\n" not in str(caught.value)
    assert unchanged(model, before)


def test_a_group_without_the_section():
    model, _ = hand_made("normalized")
    refused(model, ValueError, "'qk'.*O\\(8\\)", section="balanced", symmetries=model.symmetries())
    refused(small_gpt(), ValueError, "section must be one of.*'polar'", section="polar")
    model, _ = hand_made("phases")
    qk = model.symmetries().heads[:1]
    refused(model, ValueError, "one of \\('svd',\\)", section="polar", symmetries=qk)
    refused(small_gpt(), ValueError, "section must be one of.*'nonsense'", section="nonsense")


def test_rank_deficient_and_nonfinite_pairs_are_named():
    model = small_gpt()
    with torch.no_grad():
        model.blocks[1].attention.key.weight[:8] = 0
    match = "'blocks.1.attention.qk': right factor B is rank-deficient"
    refused(model, ValueError, match, section="balanced")
    with torch.no_grad():
        model.blocks[1].attention.key.weight[:8] = torch.nan
    refused(model, ValueError, "'blocks.1.attention.qk': right factor B has non-finite")
    model, _ = hand_made("normalized")
    with torch.no_grad():
        model.query.zero_()
        model.key[8:16] = 0
    options = {"symmetries": model.symmetries().heads[:1], "section": "polar"}
    refused(model, ValueError, "'qk': .*linearly dependent", **options)


def test_a_vanishing_factor():
    """As in a fresh low-rank adapter: the balanced section is not there."""
    model, _ = hand_made("partial")
    with torch.no_grad():
        model.output.zero_()
    pair = model.symmetries().heads[1:]
    match = "'vo': left factor A is rank-deficient"
    refused(model, ValueError, match, symmetries=pair, section="balanced")
    dress_(model, "orthonormal", symmetries=pair)
    (value,) = pair[0].right
    assert torch.allclose(value @ value.mT, torch.eye(8).double().expand(3, 8, 8), atol=1e-12)
    assert torch.equal(model.output, torch.zeros_like(model.output))


def test_phases_need_finite_values():
    model, _ = hand_made("phases")
    with torch.no_grad():
        model.query[0, 0] = torch.nan
    qk = model.symmetries().heads[:1]
    refused(model, ValueError, "'qk': .*non-finite entries .batch index", symmetries=qk)


def test_half_frozen_pairs():
    model = small_gpt()
    model.blocks[0].attention.key.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="one side only"):
        refused(model, ValueError, "query.weight' is trained and .*key.weight' is frozen")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    dress_(model)  # a model for inference


def test_half_frozen_pairs_without_names():
    model, _ = hand_made("partial")
    model.key.requires_grad_(False)
    match = "'qk': 'parameter of shape \\(24, 20\\)' is trained"
    refused(model, ValueError, match, symmetries=model.symmetries())


def test_mixed_dtypes():
    model, _ = hand_made("partial")
    model.key.data = model.key.data.float()
    match = "'qk': .* has dtype torch.float64 and .* has torch.float32"
    refused(model, ValueError, match, symmetries=model.symmetries())


def test_nothing_known():
    refused(nn.Linear(3, 3), ValueError, "no head symmetry of Linear is known")

    class OwnAttention(nn.Linear):
        pass

    refused(nn.Sequential(OwnAttention(3, 3)), ValueError, "not understood: 0")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        dress_("model")


def test_symmetries_of_another_model():
    other = qo.find_symmetries(small_gpt())
    refused(small_gpt(), ValueError, "no parameter of this GPT", symmetries=other)


def test_sparse_gradients():
    model = small_gpt()
    model.embedding.sparse = True
    model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    refused(model, ValueError, "gradient of 'embedding.weight' is sparse")


def test_values_that_do_not_fit_half_precision():
    model = small_gpt().half()
    symmetry = qo.find_symmetries(model).heads[0]
    symmetry.left[0].mul_(1e4)
    symmetry.right[0].mul_(1e4)
    refused(model, ValueError, "does not fit torch.float16", section="orthonormal")
    dress_(model, "balanced")


def test_an_optimizer_without_a_law_for_its_state():
    model = small_gpt()
    plain = torch.optim.AdamW(model.parameters())
    refused(model, TypeError, "AdamW depends on the gauge", optimizer=plain)
    other = qo.QuotientAdam(small_gpt())
    refused(model, ValueError, "no parameter of this GPT", optimizer=other)
    own = qo.QuotientAdam(model)
    part = SymmetryMap(own.symmetries.heads[:1])
    qk = own.symmetries.heads[0]
    renamed = HeadSymmetry(qk.left_blocks, qk.right_blocks, qk.group, "other")
    refused(
        model, ValueError, "not among those of the optimizer", optimizer=own, symmetries=[renamed]
    )
    dress_(model, optimizer=own, symmetries=part)


def test_an_optimizer_that_refuses_leaves_everything_as_it_was():
    """head_frame=None keeps plain Adam moments on the pairs: nothing can be moved."""
    model = reference_model("gpt", layers=1, width=16, heads=2, vocabulary=20)
    optimizer = qo.QuotientAdam(model, head_frame=None, residual_frame=None)
    refused(model, ValueError, "cannot move the optimizer's state", optimizer=optimizer)


def test_orthogonal_group_by_itself_is_balanced():
    """balanced_elements leaves O(r) pairs alone, where there is nothing to balance."""
    model, _ = hand_made("normalized")
    elements = canonical.elements.balanced_elements(model.symmetries())
    assert torch.equal(elements["qk"].g, torch.eye(8, dtype=torch.float64).expand(3, 8, 8))
    assert model.symmetries().heads[0].group == O(8)
    assert not torch.equal(elements["vo"].g, elements["qk"].g)


@pytest.mark.parametrize("section", SECTIONS)
def test_biases_of_badly_conditioned_values_cost_no_precision(section):
    """Biases go to zero before the weights do: rounded ones, times large biases, would be felt."""
    torch.manual_seed(0)
    model = small_gpt2().float().eval()
    with torch.no_grad():
        for symmetry in qo.find_symmetries(model).heads:
            if symmetry.name.endswith("vo"):
                view = next(b for b in symmetry.right_blocks if b.size[2] > 1).view()
                U, S, Vt = torch.linalg.svd(view, full_matrices=False)
                S = S[..., :1] * torch.logspace(0, -3, S.size(-1))
                view.copy_(U * S[..., None, :] @ Vt)
    ids = tokens()
    expected = copy.deepcopy(model).double()(ids).logits
    dressed = copy.deepcopy(model)
    returned = dress_(dressed, section)
    error = (dressed.double()(ids).logits - expected).abs().max() / expected.abs().max()
    assert error < 5e-7
    # What is returned does the same to a copy.
    replayed = copy.deepcopy(model).double()
    qo.find_symmetries(replayed).act_(returned)
    assert (replayed(ids).logits - expected).abs().max() < 1e-6 * expected.abs().max()

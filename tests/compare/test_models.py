"""The reference models: shapes, causality, precision, rotary positions, reproducible weights."""

import pytest
import torch

from quotientopt import find_symmetries
from quotientopt.models import Attention, CausalAttention, RMSNorm, reference_model
from quotientopt.models.attention import rotary_angles, rotate
from quotientopt.models.gpt import split_patches

SMALL = {"vocabulary": 50, "layers": 2, "width": 32, "heads": 4, "context": 16}
NAMES = ("gpt", "llama")
SIZES = {**dict.fromkeys(NAMES, SMALL), "vit": {"layers": 2, "width": 32, "heads": 4}}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tokens():
    return torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_logits_have_one_row_per_token(name, tokens):
    assert reference_model(name, 0, **SMALL)(tokens).shape == (3, 12, 50)


@pytest.mark.parametrize("name", NAMES)
def test_logits_depend_on_the_past_only(name, tokens):
    model = reference_model(name, 0, **SMALL).double()
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-13)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-6


@pytest.mark.parametrize("name", SIZES)
def test_same_seed_same_weights_whatever_the_global_generator(name):
    first = reference_model(name, 3, **SIZES[name]).state_dict()
    torch.manual_seed(99)
    second = reference_model(name, 3, **SIZES[name]).state_dict()
    other = reference_model(name, 4, **SIZES[name]).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("name", SIZES)
def test_every_matrix_has_full_rank(name):
    for parameter in reference_model(name, 0, **SIZES[name]).parameters():
        if parameter.ndim == 2:
            singular = torch.linalg.svdvals(parameter.detach())
            assert singular[-1] > 1e-4 * singular[0]


def test_gpt_residual_stream_turns_exactly(tokens):
    model = reference_model("gpt", 0, **SMALL).double()
    expected = model(tokens)
    turn = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    with torch.no_grad():
        reading = [model.embedding, model.positions, model.head]
        for block in model.blocks:
            attention = block.attention
            reading += [attention.query, attention.key, attention.value, block.mlp.up]
            for layer in (attention.output, block.mlp.down):
                layer.weight.copy_(turn @ layer.weight)
        for layer in reading:
            layer.weight.copy_(layer.weight @ turn.T)
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)


def test_llama_computes_in_float64_throughout(tokens):
    # The heads' commutant (C*)^{r/2} leaves the logits alone to 1e-13 only if norms, rotary
    # angles and softmax are all computed in float64.
    model = reference_model("llama", 0, **SMALL).double()
    expected = model(tokens)
    scale = torch.randn(2, 4, dtype=torch.complex128)
    with torch.no_grad():
        attention = model.blocks[0].attention
        _multiply_planes_(attention.key.weight, scale)
        _multiply_planes_(attention.query.weight, (1 / scale.conj()).repeat_interleave(2, 0))
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)


def _multiply_planes_(weight, scale):
    first, second = weight.unflatten(0, (-1, 2, scale.shape[1])).unbind(1)
    planes = torch.complex(first, second) * scale[..., None]
    weight.copy_(torch.stack((planes.real, planes.imag), dim=1).flatten(0, 2))


def test_rotary_angles_keep_float64_precision():
    like = torch.zeros((), dtype=torch.float64)
    cosines, sines = rotary_angles(100, 8, like)
    angle = torch.arange(100, dtype=torch.float64) * 10_000.0 ** (-2 / 8)
    torch.testing.assert_close(cosines[:, 1], angle.cos(), rtol=0, atol=1e-15)
    torch.testing.assert_close(cosines**2 + sines**2, torch.ones_like(sines), rtol=0, atol=1e-15)


def test_rotary_scores_depend_on_the_distance_only():
    query, key = torch.randn(2, 1, 8, dtype=torch.float64)
    angles = rotary_angles(20, 8, query)
    scores = rotate(query.expand(20, 8), *angles) @ rotate(key.expand(20, 8), *angles).T
    for offset in (0, 3, 11):
        diagonal = scores.diagonal(-offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-13)
    assert (scores[3, 0] - scores[0, 3]).abs() > 1e-3


def test_query_heads_share_contiguous_key_value_heads():
    attention = CausalAttention(32, heads=4, key_value_heads=2)
    x = torch.randn(1, 6, 32)
    plain = CausalAttention(32, heads=4)
    with torch.no_grad():
        plain.query.weight.copy_(attention.query.weight)
        plain.output.weight.copy_(attention.output.weight)
        for name in ("key", "value"):
            shared = getattr(attention, name).weight.unflatten(0, (2, 8))
            getattr(plain, name).weight.copy_(shared.repeat_interleave(2, 0).flatten(0, 1))
    torch.testing.assert_close(attention(x), plain(x))


def test_patches_are_squares_row_by_row():
    image = torch.arange(36).view(6, 6)
    patches = split_patches(image[None], 2)
    assert patches.shape == (1, 9, 4)
    for index in range(9):
        row, column = 2 * (index // 3), 2 * (index % 3)
        expected = image[row : row + 2, column : column + 2].flatten()
        assert torch.equal(patches[0, index], expected)


def test_vit_sees_the_whole_image_and_where_its_patches_are():
    model = reference_model("vit", 0, **SIZES["vit"]).double()
    images = torch.randn(3, 28, 28, dtype=torch.float64)
    assert sum(p.numel() for p in model.parameters()) == 32 * (16 + 49 + 10) + 2 * 12 * 32**2
    before = model(images)
    assert before.shape == (3, 10)
    tokens = []
    model.blocks[0].register_forward_hook(lambda block, args, output: tokens.append(output))
    for corner in ((0, 0), (27, 27)):
        changed = images.clone()
        changed[:, corner[0], corner[1]] += 1
        assert (model(changed) - before).abs().amax(dim=1).min() > 1e-6
        # Attention is not causal: every token sees the last patch as well as the first.
        model(images)
        assert (tokens[-2] - tokens[-1]).abs().amax(dim=(0, 2)).min() > 1e-9
    assert (model(images.flip(1)) - before).abs().max() > 1e-4


def test_vit_residual_stream_turns_exactly():
    model = reference_model("vit", 0, **SIZES["vit"]).double()
    images = torch.randn(3, 28, 28, dtype=torch.float64)
    symmetries = find_symmetries(model)
    assert symmetries.unrecognized == ()
    assert symmetries.residual.exact
    assert len(symmetries.heads) == 4
    deviations = symmetries.verify(model, images, cond=1000.0)
    assert set(deviations) == {*(symmetry.name for symmetry in symmetries.heads), "residual"}
    assert max(deviations.values()) <= 1e-10
    before = model(images)
    with torch.no_grad():
        turn = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
        model.head.weight.copy_(model.head.weight @ turn.T)
    assert (model(images) - before).abs().max() > 1e-3


def test_attention_without_mask_commutes_with_permutations_and_with_mask_does_not():
    x, order = torch.randn(1, 6, 32), torch.randperm(6)
    for causal in (False, True):
        attention = Attention(32, heads=4, causal=causal)
        deviation = (attention(x[:, order]) - attention(x)[:, order]).abs().max()
        assert (deviation > 1e-3) if causal else (deviation < 1e-5)


def test_llama_norms_have_gains_and_gpt_has_none():
    gains = [m for m in reference_model("llama", 0, **SMALL).modules() if isinstance(m, RMSNorm)]
    assert len(gains) == 5
    assert all(p.ndim == 2 for p in reference_model("gpt", 0, **SMALL).parameters())


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_unknown_model_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; known: gpt, llama, vit"):
        reference_model(name, 0)


def test_impossible_shapes_are_refused(tokens):
    with pytest.raises(ValueError, match="width 30 is not a multiple of heads 4"):
        CausalAttention(30, 4)
    with pytest.raises(ValueError, match="heads 4 is not a multiple of key_value_heads 3"):
        CausalAttention(32, 4, 3)
    with pytest.raises(ValueError, match="even head width, got 3"):
        CausalAttention(12, 4, rotary=True)
    with pytest.raises(ValueError, match="image side 28 is not a multiple of patch side 5"):
        reference_model("vit", 0, patch=5)
    with pytest.raises(ValueError, match=r"images of shape \(2, 14, 14\), but the model reads"):
        reference_model("vit", 0)(torch.zeros(2, 14, 14))
    for name in NAMES:
        with pytest.raises(ValueError, match="12 tokens"):
            reference_model(name, 0, **(SMALL | {"context": 8}))(tokens)

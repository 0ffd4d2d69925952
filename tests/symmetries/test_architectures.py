"""Every symmetry that is claimed is one, for every architecture."""

import pytest
import torch

from quotientopt.symmetries import find_symmetries
from tests.symmetries.architectures import EXAMPLES, small_gpt, small_gpt2, tokens

TOLERANCE = 1e-10


@pytest.mark.parametrize("cond", [10.0, 1000.0])
@pytest.mark.parametrize("name", EXAMPLES)
def test_claims_are_exact_and_parameters_restored(name, cond):
    build, count = EXAMPLES[name]
    model, inputs, kwargs = build()
    before = {key: (p.clone(), p.data_ptr()) for key, p in model.named_parameters()}
    symmetries = find_symmetries(model)
    assert len(symmetries.heads) == count
    assert symmetries.unrecognized == ()
    result = symmetries.verify(model, *inputs, cond=cond, **kwargs)
    assert set(result) >= {symmetry.name for symmetry in symmetries.heads}
    assert max(result.values()) <= TOLERANCE, result
    for key, parameter in model.named_parameters():
        value, address = before[key]
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, value)
        assert parameter.data_ptr() == address


@pytest.mark.parametrize("name", EXAMPLES)
def test_acting_on_the_model_itself(name):
    build, _ = EXAMPLES[name]
    model, inputs, kwargs = build()
    model.double().eval()
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    kwargs = {key: x.double() if x.is_floating_point() else x for key, x in kwargs.items()}

    def run():
        with torch.no_grad():
            output = model(*inputs, **kwargs)
        return getattr(output, "logits", output[0] if isinstance(output, tuple) else output)

    before = run()
    symmetries = find_symmetries(model)
    element = symmetries.random_element(cond=100.0, generator=torch.Generator().manual_seed(0))
    parameters = [p.clone() for p in model.parameters()]
    symmetries.act_(element)
    changed = max((p - q).abs().max() for p, q in zip(model.parameters(), parameters, strict=True))
    assert changed > 0.1
    # All symmetries at once.
    assert (run() - before).abs().max() <= TOLERANCE * before.abs().max()


@pytest.mark.parametrize("name", EXAMPLES)
def test_blocks_are_views(name):
    build, _ = EXAMPLES[name]
    model, _, _ = build()
    parameters = dict(model.named_parameters())
    for symmetry in find_symmetries(model).heads:
        for block, view in zip(symmetry.blocks, symmetry.left + symmetry.right, strict=True):
            parameter = parameters[block.name]
            assert block.parameter is parameter
            start = parameter.data_ptr()
            end = start + parameter.numel() * parameter.element_size()
            assert start <= view.data_ptr() < end
            with torch.no_grad():
                view[-1, -1, -1] = 1234.0
            assert (parameter == 1234.0).sum() == 1
            with torch.no_grad():
                view[-1, -1, -1] = 0.0


def test_all_values_of_an_attention_are_in_blocks():
    model, _, _ = EXAMPLES["attention-bias-kv"][0]()
    touched = {}
    for symmetry in find_symmetries(model).heads:
        for block in symmetry.blocks:
            mask = touched.setdefault(block.name, torch.zeros_like(block.parameter))
            block.view(mask).add_(1)
    assert set(touched) == {name for name, _ in model.named_parameters()} - {"out_proj.bias"}
    for mask in touched.values():
        assert bool((mask == 1).all())


def test_residual_stream_of_gpt_is_exact_and_covers_every_parameter():
    model = small_gpt()
    residual = find_symmetries(model).residual
    assert residual.exact
    assert set(residual.axes) == {name for name, _ in model.named_parameters()}
    for name, axis in residual.axes.items():
        assert residual.parameters[name].shape[axis] == residual.dimension


@pytest.mark.parametrize("tied", [True, False])
def test_residual_axes_of_gpt2(tied):
    model = small_gpt2(tie_word_embeddings=tied)
    residual = find_symmetries(model).residual
    assert residual.axes["transformer.wte.weight"] == 1
    assert residual.axes["transformer.h.1.attn.c_attn.weight"] == 0
    assert residual.axes["transformer.h.1.attn.c_proj.weight"] == 1
    assert residual.axes["transformer.h.0.mlp.c_proj.bias"] == 0
    assert ("lm_head.weight" in residual.axes) is not tied
    assert not any("ln" in name and name.endswith("weight") for name in residual.axes)
    assert "centring of transformer.h.0.ln_1" in residual.broken_by
    assert "trainable gain transformer.ln_f.weight" in residual.broken_by
    with pytest.raises(ValueError, match="centring"):
        residual.act_(torch.eye(residual.dimension))


def test_residual_axes_of_a_decoder_layer_leave_out_what_reads_two_streams():
    model, _, _ = EXAMPLES["decoder-layer"][0]()
    residual = find_symmetries(model).residual
    assert residual.axes["multihead_attn.out_proj.weight"] == 0
    assert residual.axes["linear1.weight"] == residual.axes["self_attn.in_proj_weight"] == 1
    assert "multihead_attn.in_proj_weight" not in residual.axes
    assert "linear1.bias" not in residual.axes
    assert "readers and writers of the stream outside the recognised layers" in residual.broken_by


def test_redundancy_of_gpt():
    counts = find_symmetries(small_gpt()).redundancy()
    assert counts["blocks.0.attention.qk"] == 3 * 64
    # Heads, rotations, and a vector that all tokens get and all positions lose.
    assert counts["total"] == 4 * 3 * 64 + 24 * 23 // 2 + 24


def test_wrapped_model():
    model = small_gpt()
    wrapper = torch.nn.Sequential(model)
    symmetries = find_symmetries(wrapper)
    assert symmetries.heads[0].name == "0.blocks.0.attention.qk"
    assert symmetries.residual.exact
    assert max(symmetries.verify(wrapper, tokens()).values()) <= TOLERANCE

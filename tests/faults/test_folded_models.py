"""Folded models that were trained or rotated load as the same function or not at all."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.checkpoints import CheckpointError, dress_checkpoint
from quotientopt.symmetries.fold import StreamWriters, UncentredLayerNorm
from tests.symmetries.families import FAMILIES

CENTRING = ("gpt2", "opt", "gpt-neox", "vit")


def folded(name, dtype=torch.float64):
    family = FAMILIES[name]
    model = family.model().to(dtype)
    qo.fold_norms_(model, untie=True)
    return model


def tensors(inputs, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@torch.no_grad()
def outputs(model, name):
    dtype = next(model.parameters()).dtype
    output = model.eval()(**tensors(FAMILIES[name].inputs(), dtype))
    return output[0] if "logits" not in output else output.logits


def train(model, name, lr=1e-2):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(3):
        optimizer.zero_grad()
        dtype = next(model.parameters()).dtype
        output = model(**tensors(FAMILIES[name].inputs(), dtype))
        tensor = output[0] if "logits" not in output else output.logits
        tensor.square().mean().backward()
        optimizer.step()
    return model


def rotate(model, name):
    qo.dress_(model, residual=True)
    return model


def merge(model, name):
    """A LoRA adapter on what writes to the stream, merged."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    targets = [n for n, m in model.named_modules() if n.endswith(("c_proj", "out_proj", "fc2"))]
    targets = targets or [n for n, m in model.named_modules() if n.endswith("dense")]
    targets = targets or [n for n, m in model.named_modules() if n.endswith("o_proj")]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped.merge_and_unload()


CHANGES = {"trained": train, "rotated": rotate, "merged": merge}


def deviation(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("name", CENTRING)
def test_an_untrained_folded_model_is_saved_as_usual(name, tmp_path):
    model = folded(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert not any(isinstance(module, UncentredLayerNorm) for module in again.modules())
    assert deviation(outputs(again, name), outputs(model, name)) < 1e-6


@pytest.mark.parametrize("name", CENTRING)
@pytest.mark.parametrize("change", CHANGES)
def test_a_stream_that_left_mean_zero(name, change, tmp_path):
    model = CHANGES[change](folded(name), name)
    expected = outputs(model, name)
    with pytest.warns(UserWarning, match="left mean zero"):
        model.save_pretrained(tmp_path)
    # What would be loaded silently without the mark: another model.
    plain = FAMILIES[name].model().double()
    qo.fold_norms_(plain, untie=True)
    with pytest.warns(UserWarning, match="trained to them"):
        plain.load_state_dict(model.state_dict(keep_vars=True))
    for module in plain.modules():
        if isinstance(module, UncentredLayerNorm):
            module.__class__ = nn.LayerNorm
    assert deviation(outputs(plain, name), expected) > 1e-3
    with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
        type(model).from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="left mean zero"):
        dress_checkpoint(tmp_path, tmp_path.parent / "never")
    # The way out: a folded model takes them, bit for bit.
    again = folded(name)
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again, name), expected)
    with pytest.raises(RuntimeError, match="size mismatch"):
        FAMILIES[name].model().load_state_dict(model.state_dict(), strict=False)


@pytest.mark.parametrize("name", CENTRING)
def test_centring_weights_are_refused_by_a_folded_model(name):
    """The other way round: the norms would not subtract the mean any more."""
    model = folded(name)
    with pytest.warns(UserWarning, match="do not subtract the mean"):
        model.load_state_dict(FAMILIES[name].model().state_dict(), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.load_state_dict(folded(name).state_dict())
        wrapped = nn.Sequential(model)
        wrapped.load_state_dict(wrapped.state_dict())


def test_the_mark_goes_with_copies_and_pickles():
    model = train(folded("gpt2"), "gpt2")
    key = "transformer.h.0.ln_1.weight"
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(UserWarning, match="left mean zero"):
            assert copied.state_dict()[key].shape == (1, 32)
        fresh = copy.deepcopy(folded("gpt2"))
        assert fresh.state_dict()[key].shape == (32,)
        with torch.no_grad():  # the copy looks at its own writers
            for parameter in copied.parameters():
                parameter.zero_()
        assert copied.state_dict()[key].shape == (32,)
        assert model.state_dict()[key].shape == (1, 32)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = folded("gpt2")
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(outputs(again, "gpt2"), outputs(model, "gpt2"))


def writers_of(model):
    return next(m.writers for m in model.modules() if isinstance(m, UncentredLayerNorm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CENTRING)
def test_rounding_is_no_mean(name, dtype):
    assert writers_of(folded(name, dtype)).are_centred()
    assert writers_of(folded(name, torch.float32).to(dtype)).are_centred()
    assert writers_of(folded(name, torch.float32).to(torch.float64)).are_centred()
    assert not writers_of(rotate(folded(name, torch.float32), name).to(dtype)).are_centred()


def test_a_single_small_step_is_seen():
    model = folded("gpt2", torch.float32)
    norm = model.transformer.ln_f
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias.add_(1e-5)
    assert not norm.writers.are_centred()


def test_norms_without_parameters_are_refused_at_save():
    norm = nn.LayerNorm(4, elementwise_affine=False)
    writer = nn.Linear(4, 4)
    norm.__class__ = UncentredLayerNorm
    model = nn.Sequential(writer, norm)
    norm.writers = StreamWriters(model, [(writer, "weight", 0), (writer, "bias", 0)])
    with pytest.raises(ValueError, match=r"torch\.save\(model\)"):
        model.state_dict()


def test_a_writer_that_was_replaced_is_not_vouched_for():
    model = folded("gpt2")
    block = model.transformer.h[0].mlp
    block.c_proj = copy.deepcopy(block.c_proj)
    with pytest.warns(UserWarning, match="left mean zero"):
        model.state_dict()

"""Models altered behind their classes: seen, or caught by comparing outputs and put back."""

import copy
import functools
import sys

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.symmetries import find_symmetries
from tests.symmetries.families import FAMILIES, transformers

LAYER = "model.layers.0.self_attn"


def llama():
    return FAMILIES["llama"].model().double()


def inputs():
    return FAMILIES["llama"].inputs()


def claimed(model):
    return {symmetry.name for symmetry in find_symmetries(model).heads}


def outputs(model):
    with torch.no_grad():
        return model(**inputs()).logits


def scaled(module, args, output):
    return output * torch.linspace(0.5, 2, output.shape[-1], dtype=output.dtype)


def scaled_input(module, args):
    return (args[0] * torch.linspace(0.5, 2, args[0].shape[-1], dtype=args[0].dtype),)


def hook_projection(model, monkeypatch):
    model.model.layers[0].self_attn.v_proj.register_forward_hook(scaled)


def pre_hook_projection(model, monkeypatch):
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(scaled_input)


def hook_with_kwargs_on_attention(model, monkeypatch):
    def turned(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        return args, kwargs | {"position_embeddings": (cos, sin.flip(-1) * 0.5)}

    model.model.layers[0].self_attn.register_forward_pre_hook(turned, with_kwargs=True)


def patched_instance(model, monkeypatch):
    layer = model.model.layers[0].self_attn.v_proj
    layer.forward = lambda x: torch.tanh(nn.functional.linear(x, layer.weight))


def patched_method_object(model, monkeypatch):
    layer = model.model.layers[0].self_attn.o_proj
    original = layer.forward
    layer.forward = functools.partial(lambda x: original(torch.relu(x)))


def patched_beside_accelerate(model, monkeypatch):
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
    layer = model.model.layers[0].self_attn.v_proj
    original = layer.forward
    layer.forward = lambda x: torch.tanh(original(x))
    hooks.add_hook_to_module(layer, hooks.ModelHook())


def patched_after_accelerate(model, monkeypatch):
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
    layer = model.model.layers[0].self_attn.v_proj
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    original = layer.forward
    layer.forward = lambda x: torch.tanh(original(x))


def own_hook_of_accelerate(model, monkeypatch):
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")

    class Squash(hooks.ModelHook):
        def post_forward(self, module, output):
            return torch.tanh(output)

    hooks.add_hook_to_module(model.model.layers[0].self_attn.v_proj, Squash())


def patched_class(model, monkeypatch):
    cls = type(model.model.layers[0].self_attn)
    original = cls.forward

    def squashed(self, *args, **kwargs):
        output, weights = original(self, *args, **kwargs)
        return output.tanh(), weights

    monkeypatch.setattr(cls, "forward", squashed)


def wrapped_class(model, monkeypatch):
    cls = type(model.model.layers[0].self_attn)
    original = cls.forward

    @functools.wraps(original)
    def squashed(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", squashed)


def patched_linear(model, monkeypatch):
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight.clamp(-0.3, 0.3))
    )


class Clamped(nn.Linear):
    """A Linear whose weight is computed from the parameter of that name."""

    @property
    def weight(self):
        return self._parameters["weight"].clamp(-0.3, 0.3)


class Looked(nn.Linear):
    """A Linear that computes its weight while it is looked up."""

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        return value.clamp(-0.3, 0.3) if name == "weight" else value


def computed(cls):
    def change(model, monkeypatch):
        model.model.layers[0].self_attn.v_proj.__class__ = cls

    return change


def hidden_by_an_attribute(model, monkeypatch):
    layer = model.model.layers[0].self_attn.v_proj
    vars(layer)["weight"] = layer.weight.detach().clamp(-0.3, 0.3)


def gated_attention(module, query, key, value, attention_mask, **kwargs):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return torch.tanh(output), weights


def foreign_attention_function(model, monkeypatch):
    interface = transformers().modeling_utils.AttentionInterface
    model.config._attn_implementation = "sdpa"
    monkeypatch.setitem(interface._global_mapping, "sdpa", gated_attention)


def foreign_eager_function(model, monkeypatch):
    model.config._attn_implementation = "eager"
    modeling = sys.modules[type(model).__module__]
    monkeypatch.setattr(modeling, "eager_attention_forward", gated_attention)


def foreign_rotation(model, monkeypatch):
    modeling = sys.modules[type(model).__module__]

    def interleaved(q, k, cos, sin, *args, **kwargs):
        return q * cos, k * cos

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", interleaved)


class OtherRotary(nn.Module):
    """Cosines and sines that differ within a plane."""

    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, x, position_ids):
        cos, sin = self.original(x, position_ids)
        return cos, sin * torch.linspace(0.5, 2, sin.shape[-1], dtype=sin.dtype)


def replaced_rotary(model, monkeypatch):
    model.model.rotary_emb = OtherRotary(model.model.rotary_emb)


def patched_rotary(model, monkeypatch):
    model.model.rotary_emb.forward = OtherRotary(copy.deepcopy(model.model.rotary_emb)).forward


def hooked_rotary(model, monkeypatch):
    def halved(module, args, output):
        return output[0], output[1] * torch.linspace(0.5, 2, output[1].shape[-1])

    model.model.rotary_emb.register_forward_hook(halved)


SEEN = {
    function.__name__: function
    for function in (
        hook_projection,
        pre_hook_projection,
        hook_with_kwargs_on_attention,
        patched_instance,
        patched_method_object,
        patched_beside_accelerate,
        patched_after_accelerate,
        own_hook_of_accelerate,
        patched_class,
        wrapped_class,
        patched_linear,
        hidden_by_an_attribute,
        foreign_attention_function,
        foreign_eager_function,
        foreign_rotation,
        replaced_rotary,
        patched_rotary,
        hooked_rotary,
    )
} | {"computed weight": computed(Clamped), "looked-up weight": computed(Looked)}


@pytest.mark.parametrize("name", SEEN)
def test_what_can_be_seen_is_not_claimed(name, monkeypatch):
    model = llama()
    assert f"{LAYER}.qk" in claimed(model)
    SEEN[name](model, monkeypatch)
    symmetries = find_symmetries(model)
    assert not any(symmetry.name.startswith(LAYER) for symmetry in symmetries.heads)
    assert LAYER in symmetries.unrecognized
    # What is still claimed is exact, and dressing it changes nothing.
    if symmetries.heads:
        before = outputs(model)
        qo.dress_(model, symmetries=symmetries)
        assert (outputs(model) - before).abs().max() <= 1e-9 * before.abs().max()
    else:
        with pytest.raises(ValueError, match="no head symmetry"):
            qo.dress_(model)


def accelerates_own(model, monkeypatch):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerate.hooks.add_hook_to_module(
        model.model.layers[0].self_attn.v_proj, accelerate.hooks.AlignDevicesHook()
    )


def recorded_outputs(model, monkeypatch):
    with torch.no_grad():  # transformers leaves its hooks in place
        model(**inputs(), output_hidden_states=True, output_attentions=True)


def compiled_in_place(model, monkeypatch):
    model.compile(backend="eager")


HARMLESS = (accelerates_own, recorded_outputs, compiled_in_place)


@pytest.mark.parametrize("change", HARMLESS)
def test_what_is_harmless_is_claimed(change, monkeypatch):
    model = llama()
    before = claimed(model)
    change(model, monkeypatch)
    assert claimed(model) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_free_of_false_alarms(name):
    model = FAMILIES[name].model()
    symmetries = find_symmetries(model)
    assert len(symmetries.heads) >= FAMILIES[name].attentions
    model.register_forward_hook(lambda *_: None)  # on the whole model: the heads stay
    assert {s.name for s in find_symmetries(model).heads} == {s.name for s in symmetries.heads}


# ---- what nobody can see ------------------------------------------------------------------------


def invisible(model, monkeypatch):
    """A function of torch, which every module calls."""
    original = nn.functional.linear

    def squashed(x, weight, bias=None):
        result = original(x, weight, bias)
        return result + 0.1 * torch.tanh(result) * (weight.shape[0] == 16)

    monkeypatch.setattr(nn.functional, "linear", squashed)


def snapshot(model):
    return [
        (p.detach().clone(), p.requires_grad, p.grad, type(m))
        for m in model.modules()
        for p in m._parameters.values()
        if p is not None
    ]


def assert_same(model, before):
    for one, other in zip(snapshot(model), before, strict=True):
        assert torch.equal(one[0], other[0])
        assert one[1:] == other[1:]


def shuffled_values(model):
    """Acts as `dress_`, `act_`, `align_` and `fold_norms_` do, on the same model."""
    symmetries = find_symmetries(model)
    other = copy.deepcopy(model)
    element = symmetries.random_element(100.0)
    element = {k: v for k, v in element.items() if k.endswith("vo")}
    find_symmetries(other).act_(element)
    return {
        "dress_": lambda **kw: qo.dress_(model, **kw),
        "act_": lambda **kw: symmetries.act_(element, model=model, **kw),
        "align_": lambda **kw: qo.align_(model, other, permute_heads=False, **kw),
    }


FORMS = {
    "mapping": lambda: inputs(),
    "tensor": lambda: inputs()["input_ids"],
    "tuple": lambda: (inputs()["input_ids"],),
}


@pytest.mark.parametrize("operation", ["dress_", "act_", "align_"])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_that_change_are_put_back(operation, form, monkeypatch):
    model = llama()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    act = shuffled_values(model)[operation]
    before = snapshot(model)
    invisible(model, monkeypatch)
    with pytest.raises(ValueError, match=r"would change the outputs of LlamaForCausalLM"):
        act(example_inputs=FORMS[form]())
    assert_same(model, before)
    monkeypatch.undo()
    expected = outputs(model)
    act(example_inputs=FORMS[form]())
    assert (outputs(model) - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(snapshot(model), before, strict=True))


def test_the_optimizer_is_left_alone_by_a_refused_dressing(monkeypatch):
    model = llama()
    optimizer = qo.QuotientAdam(model, lr=1e-3)
    model(**inputs()).logits.square().mean().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    before = snapshot(model)
    invisible(model, monkeypatch)
    with pytest.raises(ValueError, match="nothing was changed"):
        qo.dress_(model, optimizer=optimizer, example_inputs=inputs())
    for a, b in zip(snapshot(model), before, strict=True):
        assert torch.equal(a[0], b[0])
    for i, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][i][key]))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_folding_is_put_back(name, monkeypatch):
    family = FAMILIES[name]
    model, example = family.model().double(), family.inputs()
    tied = model.config.tie_word_embeddings
    keys, before = list(model.state_dict()), snapshot(model)
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    original = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda x, w, b=None: original(x, w.clamp(-0.5, 0.5), b)
    )
    with pytest.raises(ValueError, match="folding would change the outputs"):
        qo.fold_norms_(model, untie=True, example_inputs=example)
    assert_same(model, before)
    assert list(model.state_dict()) == keys
    assert model.config.tie_word_embeddings == tied
    weights = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (weights[0] is weights[1]) == shared
    monkeypatch.undo()
    assert qo.fold_norms_(model, untie=True, example_inputs=example).residual.exact


def test_example_inputs_of_a_wrong_kind():
    model = llama()
    with pytest.raises(TypeError, match="example_inputs must be a tensor, a tuple"):
        qo.dress_(model, example_inputs="text")
    symmetries = find_symmetries(model)
    with pytest.raises(ValueError, match="model="):
        symmetries.act_({}, example_inputs=inputs())


# ---- verify -------------------------------------------------------------------------------------


def test_dropout_on_the_stream_breaks_rotations_in_training():
    family = FAMILIES["llama"]
    model = family.model().double()
    qo.fold_norms_(model)

    class Dropped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            inner.model.embed_tokens.register_forward_hook(
                lambda module, args, output: nn.functional.dropout(output, 0.5, module.training)
            )

        def forward(self, **kwargs):
            return self.inner(**kwargs).logits

    symmetries = find_symmetries(model)  # before: a hook on the embedding is seen
    wrapped = Dropped(model)
    evaluated = symmetries.verify(wrapped, **inputs())
    trained = symmetries.verify(wrapped, train_mode=True, **inputs())
    assert max(evaluated.values()) < 1e-6
    assert trained["residual"] > 1e-2
    heads = [value for name, value in trained.items() if name != "residual"]
    assert max(heads) < 1e-6
    assert not wrapped.inner.training
    assert not symmetries.verify(wrapped, train_mode=True, **inputs())["residual"] < 1e-2


def test_the_table_says_where_a_rotation_is_exact():
    model = FAMILIES["gpt2"].model(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.0)
    qo.fold_norms_(model, untie=True)
    symmetries = find_symmetries(model)
    assert "transformer.drop" in symmetries.residual.dropouts
    assert "exact in evaluation, in training unless" in str(symmetries)
    verified = symmetries.verify(model, train_mode=True, **FAMILIES["gpt2"].inputs())
    assert verified["residual"] > 1e-3
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert str(find_symmetries(model)).count("in evaluation") == 0


def test_dropout_on_attention_weights_in_training():
    """GPT-2 with all of its dropouts: what is exact in training, and what is not."""
    model = FAMILIES["gpt2"].model(attn_pdrop=0.3, resid_pdrop=0.0, embd_pdrop=0.0).double()
    symmetries = find_symmetries(model)
    trained = symmetries.verify(model, train_mode=True, **FAMILIES["gpt2"].inputs())
    linear = [v for name, v in trained.items() if name.endswith((".qk", ".vo"))]
    assert linear
    assert max(linear) < 1e-9


class Tied(nn.Module):
    """A buffer that is a view of a weight, as caches of fused kernels are."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
        self.register_buffer("cached", self.attention.in_proj_weight.data[32:])
        self.register_buffer("narrow", self.attention.out_proj.weight.data.T[3])

    def forward(self, x):
        return self.attention(x, x, x)[0] + x @ self.cached.T + self.narrow


def test_buffers_that_are_views_of_weights_move_along():
    model = Tied()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    symmetries = find_symmetries(model)
    addresses = [b.data_ptr() for b in model.buffers()]
    verified = symmetries.verify(model, x)
    assert verified["attention.vo"] > 1e-3
    assert verified["attention.qk"] < 1e-12
    assert [b.data_ptr() for b in model.buffers()] == addresses
    before = model(x)
    with pytest.raises(ValueError, match="would change the outputs"):
        qo.dress_(model, example_inputs=x)
    assert torch.equal(model(x), before)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.MultiheadAttention(16, 2, batch_first=True)
        self.gated = nn.MultiheadAttention(16, 2, batch_first=True)
        self.idle = nn.MultiheadAttention(16, 2, batch_first=True)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.used(x, x, x)[0] + self.gate * self.gated(x, x, x)[0]


def test_what_did_not_run_is_not_verified():
    model = Gated()
    verified = find_symmetries(model).verify(model, torch.randn(2, 5, 16))
    for name, value in verified.items():
        if name.startswith("used"):
            assert value < 1e-12
        else:
            assert value != value, name
    with torch.no_grad():
        model.gate.fill_(1e-3)
    verified = find_symmetries(model).verify(model, torch.randn(2, 5, 16))
    assert verified["gated.vo"] < 1e-12


def test_inspect_says_what_it_has_not_verified(tmp_path, capsys, monkeypatch):
    from quotientopt.cli import main
    from quotientopt.symmetries import SymmetryMap

    llama().save_pretrained(tmp_path)
    monkeypatch.setattr(
        SymmetryMap, "verify", lambda *_, **__: {"a.qk": 1e-16, "b.qk": float("nan")}
    )
    assert main(["inspect", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "1 symmetries, all exact" in output
    assert "not verified, the outputs do not depend on what they act on: b.qk" in output

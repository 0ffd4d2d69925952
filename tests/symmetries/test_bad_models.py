"""What is refused or listed, and that nothing is changed by asking."""

import warnings

import pytest
import torch
from torch import nn

from quotientopt.symmetries import find_symmetries, registry, residual
from quotientopt.symmetries.registry import Contribution, NotUnderstoodError, register
from quotientopt.symmetries.residual import norm_kind, register_norm
from tests.symmetries.architectures import attention, randomize_, small_gpt, values
from tests.symmetries.families import FAMILIES, WIDTH, build, text, transformers
from tests.symmetries.test_families import TOLERANCE

ATTENTIONS = ("model.layers.0.self_attn", "model.layers.1.self_attn")


def test_an_unknown_architecture_is_listed():
    settings = {**FAMILIES["llama"].settings}
    model = build("NemotronForCausalLM", **settings)
    symmetries = find_symmetries(model)
    assert symmetries.heads == ()
    assert symmetries.residual is None
    assert symmetries.unrecognized == ATTENTIONS
    assert "not understood, without head frames: model.layers.0" in str(symmetries)


def test_known_embeddings_around_unknown_layers_claim_no_rotations():
    model = build("ApertusForCausalLM", **FAMILIES["llama"].settings).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
    residual = find_symmetries(model).residual
    assert "model.layers.0, a layer that is not known" in residual.broken_by


def test_an_unknown_attention_function_is_listed():
    model = FAMILIES["llama"].model()
    model.config._attn_implementation = "sage"
    assert find_symmetries(model).unrecognized == ATTENTIONS
    for known in ("eager", "paged|sdpa", "flash_attention_2"):
        model.config._attn_implementation = known
        assert len(find_symmetries(model).heads) == 4


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_that_are_built_differently_are_listed(name):
    """An attribute that another version does not have must not be an error."""
    model = FAMILIES[name].model()
    widths = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "v_head_dim")
    for module in model.modules():
        for attribute in widths:
            vars(module).pop(attribute, None)
    symmetries = find_symmetries(model)
    assert symmetries.heads == ()
    assert len(symmetries.unrecognized) == FAMILIES[name].attentions


@pytest.mark.parametrize("name", FAMILIES)
def test_replaced_layers_are_not_claimed(name):
    model = FAMILIES[name].model()
    complete = find_symmetries(model)
    first = complete.heads[0].blocks[-1].name.rsplit(".", 2)
    parent = model.get_submodule(first[0])
    setattr(parent, first[1], nn.Sequential(getattr(parent, first[1]), nn.Tanh()))
    symmetries = find_symmetries(model)
    prefix = complete.heads[0].name.rsplit(".", 1)[0]
    assert not any(symmetry.name.startswith(f"{prefix}.") for symmetry in symmetries.heads)
    assert any(prefix.startswith(listed) for listed in symmetries.unrecognized)
    # The stream is not what it was either.
    assert any("not understood" in breaker for breaker in symmetries.residual.broken_by)


def test_a_replaced_mlp_is_felt_by_the_stream():
    model = FAMILIES["llama"].model()
    gains = [p for name, p in model.named_parameters() if "norm" in name]
    for gain in gains:
        nn.init.ones_(gain)
        gain.requires_grad_(False)
    assert find_symmetries(model).residual.exact
    model.model.layers[1].mlp = nn.Identity()
    residual = find_symmetries(model).residual
    assert not residual.exact
    assert "model.layers.1, which is not understood" in residual.broken_by[0]


def test_meta_and_quantised_parameters_are_refused():
    package = transformers()
    family = FAMILIES["llama"]
    with torch.device("meta"):
        on_meta = package.LlamaForCausalLM(package.LlamaConfig(**family.settings))
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' is on the meta device"):
        find_symmetries(on_meta)
    model = family.model()
    layer = model.model.layers[1].self_attn.k_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.weight.*int8"):
        find_symmetries(model)


def test_a_pair_of_two_dtypes_is_left_out():
    model = FAMILIES["llama"].model()
    model.model.layers[1].self_attn.k_proj.to(torch.bfloat16)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.warns(UserWarning, match=r"layers\.1\.self_attn\.qk' mixes dtypes"):
        symmetries = find_symmetries(model)
    assert [symmetry.name for symmetry in symmetries.heads] == [
        "model.layers.0.self_attn.qk",
        "model.layers.0.self_attn.vo",
        "model.layers.1.self_attn.vo",
    ]
    assert symmetries.unrecognized == ("model.layers.1.self_attn.qk",)
    assert all(map(torch.equal, model.parameters(), before))


def test_a_pair_of_which_one_side_is_trainable_is_kept_with_a_warning():
    model = FAMILIES["bert"].model()
    for layer in model.bert.encoder.layer:
        layer.attention.self.query.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"layer\.0\.attention\.qk' \(and 1 more like it\) is tra"):
        symmetries = find_symmetries(model)
    assert len(symmetries.heads) == 4
    assert max(symmetries.verify(model, **text()).values()) <= TOLERANCE
    model.requires_grad_(False)
    model.bert.encoder.layer[0].attention.self.query.bias.requires_grad_(True)
    with pytest.warns(UserWarning, match="one side only"):
        find_symmetries(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_symmetries(model.requires_grad_(False))
        find_symmetries(model.requires_grad_(True))


def test_layers_shared_by_hand():
    model = FAMILIES["llama"].model()
    first, second = model.model.layers
    second.self_attn = first.self_attn
    symmetries = find_symmetries(model)
    assert [symmetry.name for symmetry in symmetries.heads] == [
        "model.layers.0.self_attn.qk",
        "model.layers.0.self_attn.vo",
    ]
    assert symmetries.unrecognized == ()
    second.self_attn = type(first.self_attn)(model.config, 1)
    second.self_attn.k_proj = first.self_attn.k_proj
    symmetries = find_symmetries(model)
    assert [symmetry.name for symmetry in symmetries.heads] == [
        "model.layers.0.self_attn.vo",
        "model.layers.1.self_attn.vo",
    ]
    assert symmetries.unrecognized == (
        "model.layers.0.self_attn.qk",
        "model.layers.1.self_attn.qk",
    )


def test_asking_after_a_run_finds_the_same():
    """Hooks that record outputs must not look like another forward."""
    model = FAMILIES["bert"].model()
    before = [symmetry.name for symmetry in find_symmetries(model).heads]
    model(**text(), output_attentions=True, output_hidden_states=True)
    assert [symmetry.name for symmetry in find_symmetries(model).heads] == before


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = attention()[0]

    def forward(self, x):
        return torch.tanh(self.attention(x, x, x)[0])


class WhiteningNorm(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x / x.norm(dim=-1, keepdim=True)


@pytest.fixture
def scratch(monkeypatch):
    monkeypatch.setattr(registry, "_adapters", registry._adapters.copy())
    monkeypatch.setattr(residual, "_kinds", residual._kinds.copy())


def test_an_adapter_may_hide_what_is_inside(scratch):
    model = nn.ModuleList([Wrapper(), attention()[0]])
    assert len(find_symmetries(model).heads) == 4

    @register(f"{__name__}.Wrapper")
    def wrapper(module, name):
        raise NotUnderstoodError("it changes weights while it runs", inside=True)

    symmetries = find_symmetries(model)
    assert [symmetry.name for symmetry in symmetries.heads] == ["1.qk", "1.vo"]
    assert symmetries.unrecognized == ("0.attention",)


def test_norms_of_other_packages(scratch):
    assert norm_kind(WhiteningNorm()) is None
    register_norm(f"{__name__}.WhiteningNorm", neutral=0.5)
    kind = norm_kind(WhiteningNorm())
    assert (kind.centres, kind.neutral) == (False, 0.5)
    assert norm_kind(nn.LayerNorm(3)).centres
    changed = nn.LayerNorm(3)
    changed.forward = lambda x: x
    assert norm_kind(changed) is None
    with pytest.raises(TypeError, match="qualified class name"):
        register_norm("WhiteningNorm")


def test_replaced_norms_are_felt_by_the_stream():
    model = FAMILIES["llama"].model()
    model.model.layers[0].input_layernorm = WhiteningNorm()
    breakers = find_symmetries(model).residual.broken_by
    assert any("no known norm but a WhiteningNorm" in breaker for breaker in breakers)


def test_a_contribution_that_misnames_a_parameter(scratch):
    register(f"{__name__}.Wrapper")(lambda module, name: Contribution(residual_axes={"typo": 0}))
    with pytest.raises(ValueError, match="typo"):
        find_symmetries(Wrapper())


def test_a_subclass_with_another_forward_is_listed():
    package = transformers()
    base = package.models.llama.modeling_llama.LlamaAttention

    class DoubledAttention(base):
        def forward(self, hidden_states, **options):
            return super().forward(2 * hidden_states, **options)

    model = FAMILIES["llama"].model()
    model.model.layers[0].self_attn.__class__ = DoubledAttention
    symmetries = find_symmetries(model)
    assert symmetries.unrecognized == ATTENTIONS[:1]
    assert len(symmetries.heads) == 2
    assert any("layers.0, which is not understood" in b for b in symmetries.residual.broken_by)


def test_random_values_are_really_random():
    """A model of zeros and ones would verify anything."""
    for family in ("llama", "gpt2"):
        model = FAMILIES[family].model()
        assert all(parameter.std() > 0.05 for parameter in model.parameters())
    assert all(parameter.std() > 0.05 for parameter in randomize_(small_gpt()).parameters())
    assert values(3).std() > 0

"""Ordinary models in relational form: the same numbers, from inner products alone."""

import copy

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.models import Attention, reference_model
from quotientopt.nn import JointGram, RelationalForm, relational_form
from tests.symmetries.families import transformers
from tests.symmetries.trained import smollm2

GPT = {"layers": 2, "width": 48, "heads": 4, "context": 16}
LLAMA = {"layers": 2, "width": 48, "heads": 4, "key_value_heads": 2, "context": 16}
IDS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
models = pytest.mark.parametrize("name", ["gpt", "llama"])


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def shaken(module, size=0.2, only=""):
    """Every parameter off its initial value, gains and biases included."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(module.named_parameters()):
            if only in name:
                parameter += size * randn(*parameter.shape, seed=index).to(parameter)
    return module


def model_of(name):
    if name == "gpt":
        return reference_model("gpt", **GPT).double()
    return shaken(reference_model("llama", **LLAMA).double(), only="norm")


def encoder(norm_first, bias, width=24, layers=2):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        width, 4, 40, dropout=0.0, batch_first=True, norm_first=norm_first, bias=bias
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).double().eval()


def coordinates(form, module, X, **options):
    """The result read by the unit vectors, which must be the readout of the form."""
    return form(form.joint_gram(module, X), **options).products


def exact(model, bits=6):
    """The model with weights that are multiples of 2^-bits, so that Grams have no rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 2**bits).round() / 2**bits)
    return model


def exact_rotation(d):
    """Blocks of Hadamard's 4×4 matrix over 2, columns permuted: orthogonal without rounding."""
    block = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).double()
    Q = torch.block_diag(*[block / 2] * (d // 4))
    return Q[:, torch.randperm(d, generator=torch.Generator().manual_seed(1))]


# ---- the same function ---------------------------------------------------------------------------


@models
def test_reference_models(name):
    model = model_of(name)
    form = relational_form(model)
    expected = model(IDS)
    assert expected.abs().max() > 1
    assert (form(IDS) - expected).abs().max() < 1e-12
    assert (relational_form(model, chunk_size=37)(IDS) - expected).abs().max() < 1e-12
    assert (form(IDS[0]) - expected[0]).abs().max() < 1e-12
    assert (form(IDS[None]) - expected).abs().max() < 1e-12
    # Controls: another model, and one inner product changed.
    other = relational_form(shaken(copy.deepcopy(model), 0.01))
    assert (other(IDS) - expected).abs().max() > 1e-3
    form.gram_0 += 1e-3
    assert (form(IDS) - expected).abs().max() > 1e-6


@models
def test_float32_and_state(name):
    model = model_of(name)
    form = relational_form(model)
    single = copy.deepcopy(form).float()
    assert single(IDS).dtype == torch.float32
    assert (single(IDS) - model(IDS)).abs().max() < 1e-4
    again = relational_form(shaken(copy.deepcopy(model)))
    assert (again(IDS) - form(IDS)).abs().max() > 1e-2
    again.load_state_dict(form.state_dict())
    assert torch.equal(again(IDS), form(IDS))
    assert list(form.parameters()) == []


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_transformer_encoders(norm_first, bias):
    module = encoder(norm_first, bias)
    if norm_first:
        shaken(module)
    elif bias:
        shaken(module, only="bias")
    form = relational_form(module, readout=torch.eye(24, dtype=torch.float64))
    X = randn(3, 7, 24)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = True
    expected = module(X)
    found = form(form.joint_gram(module, X))
    assert (found.products - expected).abs().max() < 1e-12
    assert (found.tokens - expected @ expected.mT).abs().max() < 1e-11
    expected = module(X, mask=future, src_key_padding_mask=padding)
    masked = coordinates(form, module, X, attn_mask=future, key_padding_mask=padding)
    assert (masked - expected).abs().max() < 1e-12
    assert (masked - found.products).abs().max() > 1e-2
    chunked = relational_form(module, chunk_size=11)
    assert (chunked(form_input(chunked, module, X)).tokens - found.tokens).abs().max() < 1e-10


def form_input(form, module, X):
    """Inner products of tokens alone: the form's own weights are used."""
    return form.joint_gram(module, X)._replace(weights=None)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("rotary", [False, True])
def test_single_attentions(batch, rotary):
    torch.manual_seed(0)
    module = Attention(24, 4, 2, rotary=rotary, causal=True).double()
    form = relational_form(module, readout=torch.eye(24, dtype=torch.float64))
    X = randn(*batch, 6, 24)
    flat = X.reshape(-1, 6, 24)
    expected = module(flat).reshape(X.shape)
    assert (coordinates(form, module, X) - expected).abs().max() < 1e-13
    # One Gram matrix of tokens and rows is enough.
    rows = [module.query.weight, module.key.weight, module.value.weight, module.output.weight.mT]
    V = torch.cat([*rows, torch.eye(24, dtype=torch.float64)]).detach()
    joint = torch.cat((X, V.expand(*batch, -1, -1)), dim=-2)
    found = form(joint @ joint.mT)
    assert (found.products - expected).abs().max() < 1e-13
    assert (found.tokens - expected @ expected.mT).abs().max() < 1e-13


def test_torch_self_attention():
    torch.manual_seed(0)
    module = shaken(nn.MultiheadAttention(24, 4, batch_first=True).double())
    form = relational_form(module, readout=torch.eye(24, dtype=torch.float64))
    X = randn(3, 6, 24)
    bias = randn(6, 6)
    expected, _ = module(X, X, X, attn_mask=bias)
    assert (coordinates(form, module, X, attn_mask=bias) - expected).abs().max() < 1e-13


def test_one_gram_matrix_for_a_model_with_embeddings():
    model = model_of("gpt")
    form = relational_form(model)
    V = torch.cat(
        [
            model.embedding.weight,
            model.positions.weight,
            *(
                rows
                for block in model.blocks
                for rows in (
                    block.attention.query.weight,
                    block.attention.key.weight,
                    block.attention.value.weight,
                    block.attention.output.weight.mT,
                    block.mlp.up.weight,
                    block.mlp.down.weight.mT,
                )
            ),
            model.head.weight,
        ]
    )
    assert sum(form.rows.values()) == len(V)
    assert (form(IDS, weights=V @ V.mT) - model(IDS)).abs().max() < 1e-12


def test_a_decoder_of_transformers():
    package = transformers()
    config = package.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    torch.manual_seed(0)
    model = shaken(package.LlamaForCausalLM(config).eval(), 0.1)
    ids = IDS % 97
    expected = model(ids).logits
    found = relational_form(model)(ids)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    attention = model.model.layers[1].self_attn
    X = randn(2, 12, 48).float()
    rotations = model.model.rotary_emb(X, torch.arange(12)[None])
    future = torch.full((12, 12), -torch.inf).triu(1)
    expected = attention(X, position_embeddings=rotations, attention_mask=future[None, None])[0]
    form = relational_form(attention, readout=torch.eye(48))
    found = coordinates(form, attention, X, position_embeddings=rotations)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="pass position_embeddings"):
        coordinates(form, attention, X)


@pytest.mark.long
def test_first_layer_of_trained_weights():
    model = smollm2()
    layer = model.model.layers[0]
    ids = torch.arange(1000, 1024)[None]
    with torch.no_grad():
        X = model.model.embed_tokens(ids)
        rotations = model.model.rotary_emb(X, torch.arange(24)[None])
        expected = layer(X, position_embeddings=rotations, attention_mask=None)
        expected = expected[0] if isinstance(expected, tuple) else expected
        form = relational_form(layer, readout=torch.eye(576))
        found = coordinates(form, layer, X, position_embeddings=rotations)
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < 1e-4
    control = coordinates(form, layer, X.flip(1), position_embeddings=rotations)
    assert (control - expected).abs().max() > 1e-1


@models
def test_negative_token_numbers_are_refused(name):
    form = relational_form(model_of(name))
    with pytest.raises(IndexError, match="not negative"):
        form(torch.tensor([[-1, 2]]))


# ---- invariance and gradients --------------------------------------------------------------------


def rotated(model, Q):
    """A gain-free model in another frame."""
    model = copy.deepcopy(model)
    qo.find_symmetries(model).act_({"residual": Q})
    return model


@models
def test_rotations_change_nothing(name):
    model = model_of(name)
    if name == "llama":
        qo.fold_norms_(model)
    expected = relational_form(model)(IDS)
    turned = rotated(model, qo.groups.O(48).random(dtype=torch.float64))
    assert (turned.head.weight - model.head.weight).abs().max() > 0.1
    assert (relational_form(turned)(IDS) - expected).abs().max() < 1e-12


@models
def test_exact_rotations_change_no_bit(name):
    """Where rotating does not round, every inner product and every logit is the same to the bit."""
    model = exact(model_of(name)) if name == "gpt" else model_of(name)
    if name == "llama":
        qo.fold_norms_(model)
        exact(model)
    turned = rotated(model, exact_rotation(48))
    one, two = relational_form(model), relational_form(turned)
    assert (turned.head.weight - model.head.weight).abs().max() > 0.1
    states = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in states)
    assert torch.equal(one(IDS), two(IDS))
    assert not torch.equal(model(IDS), turned(IDS))  # the original computes with coordinates


def test_exact_rotations_of_tokens_change_no_bit():
    module = exact(Attention(24, 4, 2, rotary=True, causal=True).double())
    Q = exact_rotation(24)
    X = (randn(3, 7, 24) * 64).round() / 64
    turned = copy.deepcopy(module)
    with torch.no_grad():
        for part in (turned.query, turned.key, turned.value):
            part.weight.copy_(part.weight @ Q.mT)
        turned.output.weight.copy_(Q @ turned.output.weight)
    form = relational_form(module)
    one, two = form.joint_gram(module, X), form.joint_gram(turned, X @ Q.mT)
    assert torch.equal(one.products, two.products)
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(form(one).tokens, form(two).tokens)
    assert not torch.equal(form.joint_gram(module, X @ Q.mT).products, one.products)


@models
def test_gradients(name):
    model = model_of(name)
    form = relational_form(model)
    weights = randn(2, 12, 256, seed=3)
    parameters = list(model.parameters())
    expected = torch.autograd.grad((model(IDS) * weights).sum(), parameters)
    logits = form(IDS, weights=form.weights_of(model))
    found = torch.autograd.grad((logits * weights).sum(), parameters)
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() < 1e-10 * max(1, y.abs().max())
    assert max(y.abs().max() for y in expected) > 10


def test_gradients_to_tokens_and_norms():
    module = shaken(encoder(True, True))
    form = relational_form(module, readout=torch.eye(24, dtype=torch.float64))
    X = randn(2, 5, 24).requires_grad_()
    weights = randn(2, 5, 24, seed=1)
    leaves = [X, *module.parameters()]
    expected = torch.autograd.grad((module(X) * weights).sum(), leaves)
    found = torch.autograd.grad((coordinates(form, module, X) * weights).sum(), leaves)
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() < 1e-10


def test_contributions_are_what_products_are_made_of():
    model = model_of("gpt")
    form = relational_form(model)
    found = form.contributions(IDS)
    first = "blocks.0.attention.query"
    tokens = model.embedding.weight[IDS] @ model.blocks[0].attention.query.weight.mT
    assert found["tokens", first].item() == pytest.approx(tokens.square().mean().sqrt().item())
    readers = {reader for _, reader in found}
    assert {first, "blocks.1.mlp.up", "head"} <= readers
    written = {"tokens", "positions"} | {
        f"blocks.{i}.{name}" for i in range(2) for name in ("attention.output", "mlp.down")
    }
    assert {source for source, reader in found if reader == "head"} == written
    silent = copy.deepcopy(model)
    torch.nn.init.zeros_(silent.blocks[0].mlp.down.weight)
    quiet = relational_form(silent).contributions(IDS)
    assert quiet["blocks.0.mlp.down", "head"] == 0 < found["blocks.0.mlp.down", "head"]


# ---- what is kept, and what is refused -----------------------------------------------------------


def test_the_cost_is_what_is_kept():
    form = relational_form(model_of("gpt"))
    cost = form.cost()
    assert cost["kept"] == sum(tensor.numel() for tensor in form.state_dict().values())
    chunked = relational_form(model_of("gpt"), chunk_size=8)
    assert chunked.cost()["kept"] == sum(t.numel() for t in chunked.state_dict().values())
    assert cost["per token"] > cost["per token, original"]
    # Few heads on a wide stream: fewer inner products than coordinates.
    wide = Attention(256, 8)
    wide.query, wide.key, wide.value = (nn.Linear(256, 16, bias=False) for _ in range(3))
    wide.output, wide.head_width = nn.Linear(16, 256, bias=False), 2
    narrow = relational_form(wide).cost()
    assert narrow["kept"] < narrow["parameters"]
    assert narrow["per token"] < narrow["per token, original"]


def gains(module):
    return shaken(module, only="norm")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: relational_form(nn.Linear(3, 3)), TypeError, "Linear has no relational form"),
        (lambda: relational_form("gpt"), TypeError, "must be a torch.nn.Module"),
        (lambda: relational_form(gains(encoder(False, False))), ValueError, "gains of layers.0"),
        (lambda: relational_form(model_of("gpt"), chunk_size=0), ValueError, "chunk_size"),
        (
            lambda: relational_form(model_of("gpt"), readout=torch.eye(48)),
            ValueError,
            "without an output head",
        ),
        (lambda: relational_form(encoder(True, True), readout=torch.eye(3)), ValueError, "24"),
        (lambda: relational_form(model_of("gpt"))(randn(2, 3)), TypeError, "token numbers"),
        (lambda: relational_form(model_of("gpt"))(IDS.repeat(1, 2)), ValueError, "16 positions"),
        (lambda: relational_form(encoder(True, True))(IDS), TypeError, "joint_gram"),
        (lambda: relational_form(encoder(True, True))(randn(3, 7, 24)), ValueError, "joint_gram"),
        (
            lambda: relational_form(encoder(True, True)).weights_of(encoder(True, False)),
            ValueError,
            "not the kind of model",
        ),
        (
            lambda: relational_form(Attention(8, 2))(JointGram(randn(3, 3), randn(3, 5))),
            ValueError,
            "JointGram has",
        ),
        (
            lambda: relational_form(nn.MultiheadAttention(8, 2, add_zero_attn=True)),
            ValueError,
            "add_zero_attn",
        ),
        (
            lambda: relational_form(nn.MultiheadAttention(8, 2, kdim=4)),
            ValueError,
            "another width",
        ),
        (lambda: relational_form(model_of("gpt"))(IDS, weights=randn(3, 3)), ValueError, "all row"),
    ],
)
def test_refusals(build, error, message):
    with pytest.raises(error, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_a_changed_subclass_is_not_guessed():
    class Louder(Attention):
        def forward(self, x):
            return 2 * super().forward(x)

    class Same(Attention):
        pass

    with pytest.raises(TypeError, match="Louder has no relational form"):
        relational_form(Louder(8, 2))
    assert isinstance(relational_form(Same(8, 2)), RelationalForm)

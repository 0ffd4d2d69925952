"""The relational transformer and its readouts."""

import copy

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt._linalg import random_orthogonal
from quotientopt.groups import StabilizerOfOnes
from quotientopt.nn.relational_embedding import RelationalEmbedding, embed_tokens
from quotientopt.nn.relational_transformer import RelationalTransformer, Relations

N, D = 6, 3
BATCHES = [(), (3,), (2, 3)]
NORMS = [None, "rms", "layer"]


def tokens(*batch, n=N, d=D):
    return torch.randn(*batch, n, d, dtype=torch.float64)


def transformer(norm=None, **options):
    width = None if norm is None else D
    model = RelationalTransformer(
        2, 2, features=8, hidden=8, norm=norm, width=width, **options
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def apply(model, X, *arguments, **options):
    ones = {"ones": X.sum(-1)} if model.norm == "layer" else {}
    return model(embed_tokens(X), *arguments, **ones, **options)


def close(one, two, tolerance=1e-10):
    return bool((one - two).abs().max() <= tolerance * two.abs().max())


def rotation(batch, norm):
    if norm == "layer":
        return StabilizerOfOnes(D).random(batch, dtype=torch.float64)
    return random_orthogonal(batch, D)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("norm", NORMS)
def test_commutes_with_the_projection(norm, batch):
    model, X = transformer(norm, token_features=2), tokens(*batch)
    f = tokens(*batch, d=2)
    result = apply(model, X, f)
    moved, features = model.lifted(X, f)
    assert isinstance(result, Relations)
    assert not close(moved, X, 1e-2)
    assert close(result.gram, moved @ moved.mT)
    assert close(result.features, features)


@pytest.mark.parametrize("norm", NORMS)
def test_a_layer_is_the_formula(norm):
    """X ↦ X + P N(X), f ↦ f + Σ P_h f V_h, then the feed-forward, with torch's own norms."""
    X = tokens(2)
    model = transformer(norm)
    block = model.blocks[0]
    model.blocks = model.blocks[:1]
    scale = 1.0 if norm is None else 1 / D
    stream = X - X.mean(-1, keepdim=True) if norm == "layer" else X
    size = (scale * stream.square().sum(-1, keepdim=True) + 1e-8).sqrt().log1p()
    f = model.embedding(size)
    if norm is None:
        normal = X
    else:
        gain = block.norm.gain
        of_torch = {"rms": nn.functional.rms_norm, "layer": nn.functional.layer_norm}[norm]
        normal = gain * of_torch(X, (D,), eps=1e-5)
    standard = block.before_attention(f)
    P = block.attention.mixing(normal @ normal.mT, standard)
    weights = block.attention.weights(normal @ normal.mT, standard)
    heads = block.values(standard).unflatten(-1, (2, 4))
    means = torch.einsum("bhij,bjhk->bihk", weights, heads).flatten(-2)
    f = f + block.output(means)
    stream = stream + P @ normal
    size = (scale * stream.square().sum(-1, keepdim=True) + 1e-8).sqrt().log1p()
    f = f + block.feature_map(torch.cat((block.before_map(f), size), -1))
    inputs = torch.cat((size, block.before_gate(f)), -1)
    stream = (1 + block.feed_forward.gate(inputs).tanh()) * stream
    if norm == "layer":
        stream = stream + X.mean(-1, keepdim=True)
    result = apply(model, X)
    assert close(result.gram, stream @ stream.mT, 1e-12)
    assert close(result.features, model.last(f), 1e-12)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("readout", [None, "tokens", "sum", "mean"])
@pytest.mark.parametrize("norm", NORMS)
def test_invariant(norm, readout, batch):
    model, X = transformer(norm, readout=readout, out=4 if readout else 1), tokens(*batch)
    Y = X @ rotation(batch, norm).mT
    assert not close(Y, X, 1e-1)
    one, two = apply(model, X), apply(model, Y)
    if readout is None:
        assert close(two.gram, one.gram)
        assert close(two.features, one.features)
    else:
        assert one.shape == ((*batch, N, 4) if readout == "tokens" else (*batch, 4))
        assert close(two, one)


def test_layer_norm_keeps_only_the_stabiliser_of_ones():
    model, X = transformer("layer", readout="sum"), tokens(3)
    assert not close(apply(model, X @ random_orthogonal((3,), D).mT), apply(model, X), 1e-4)
    with pytest.raises(ValueError, match="needs ones"):
        model(embed_tokens(X))


def test_an_ordinary_transformer_is_caught():
    """Control: torch's encoder, pooled over the tokens, is not invariant."""
    layer = nn.TransformerEncoderLayer(D, 1, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    X = tokens(3)
    Y = X @ random_orthogonal((3,), D).mT
    weights = torch.randn(D, dtype=torch.float64)
    one, two = ((encoder(Z).square() @ weights).sum(-1) for Z in (X, Y))
    assert not close(two, one, 1e-3)


def test_a_coordinate_among_the_features_is_caught():
    """Control: with the first coordinate as a token feature the model is not invariant."""
    model, X = transformer(token_features=1, readout="sum"), tokens(3)
    Y = X @ random_orthogonal((3,), D).mT
    assert not close(apply(model, Y, Y[..., :1]), apply(model, X, X[..., :1]), 1e-4)
    assert close(apply(model, Y, X[..., :1]), apply(model, X, X[..., :1]))


@pytest.mark.parametrize("norm", NORMS)
def test_permutations(norm):
    X, order = tokens(2), torch.randperm(N)
    model = transformer(norm)
    one, two = apply(model, X), apply(model, X[:, order])
    assert close(two.gram, one.gram[:, order][:, :, order])
    assert close(two.features, one.features[:, order])
    pooled = transformer(norm, readout="mean", out=3)
    assert close(apply(pooled, X[:, order]), apply(pooled, X))
    ordered = transformer(norm, readout="mean", out=3, max_relative_position=2)
    assert not close(apply(ordered, X[:, order]), apply(ordered, X), 1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_rank_and_sign_stay(norm):
    values = torch.linalg.eigvalsh(apply(transformer(norm), tokens(4)).gram)
    largest = values[:, -1:]
    assert (values >= -1e-13 * largest).all()
    assert ((values > 1e-9 * largest).sum(-1) == D).all()


@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_causal_models_do_not_leak(norm, t):
    X, Y = tokens(2), tokens(2)
    Y[:, :t] = X[:, :t]
    model = transformer(norm, causal=True, max_relative_position=2)
    one, two = apply(model, X), apply(model, Y)
    assert close(two.gram[:, :t, :t], one.gram[:, :t, :t], 1e-12)
    assert close(two.features[:, :t], one.features[:, :t], 1e-12)
    assert not close(two.features[:, t:], one.features[:, t:], 1e-3)
    reading = transformer(norm, causal=True, readout="tokens", out=5)
    one, two = apply(reading, X), apply(reading, Y)
    assert close(two[:, :t], one[:, :t], 1e-12)
    seeing = transformer(norm, readout="tokens", out=5)
    assert not close(apply(seeing, Y)[:, :t], apply(seeing, X)[:, :t], 1e-3)


@pytest.mark.parametrize("readout", [None, "tokens", "sum", "mean"])
def test_padding_is_not_read(readout):
    X = tokens(2)
    padding = torch.zeros(2, N, dtype=torch.bool)
    padding[0, 4:] = True
    model = transformer("rms", readout=readout, out=3 if readout else 1)
    padded = apply(model, X, key_padding_mask=padding)
    for row, length in ((0, 4), (1, N)):
        alone = apply(model, X[row, :length])
        if readout is None:
            assert close(padded.gram[row, :length, :length], alone.gram, 1e-12)
            assert close(padded.features[row, :length], alone.features, 1e-12)
        else:
            whole = padded[row, :length] if readout == "tokens" else padded[row]
            assert close(whole, alone, 1e-12)


@pytest.mark.parametrize("readout", [None, "tokens", "sum", "mean"])
@pytest.mark.parametrize("norm", NORMS)
def test_chunks_change_nothing(norm, readout):
    X = tokens(2)
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    model = transformer(norm, readout=readout, out=3 if readout else 1)
    plain = apply(model, X, mask=mask)
    for size in (1, 4, 9):
        chunked = apply(model, X, mask=mask, chunk_size=size)
        if readout is None:
            assert close(chunked.gram, plain.gram, 1e-12)
            assert close(chunked.features, plain.features, 1e-12)
        else:
            assert close(chunked, plain, 1e-12)
    if readout is not None:
        parameters = list(model.parameters())
        one = torch.autograd.grad(plain.square().sum(), parameters)
        two = torch.autograd.grad(chunked.square().sum(), parameters)
        largest = max(a.abs().max() for a in one)
        assert all((b - a).abs().max() <= 1e-12 * largest for a, b in zip(one, two, strict=True))


def test_references_are_inner_products_with_vectors():
    """R ↦ M R: the references of the result are inner products of the lifted result."""
    model, X = transformer("rms"), tokens(2)
    E = tokens(n=9)
    result = model(embed_tokens(X), references=X @ E.mT)
    moved, _ = model.lifted(X)
    assert close(result.references, moved @ E.mT)
    assert not close(result.references, X @ E.mT, 1e-2)


def test_tied_language_model():
    """Token numbers in, logits over the vocabulary out, nothing of size d in between."""
    embedding = RelationalEmbedding(11, D, max_positions=8).double()
    model = transformer("rms", causal=True)
    ids = torch.randint(11, (2, 6))
    logits = model(embedding(ids), references=embedding.references(ids)).references
    assert logits.shape == (2, 6, 11)
    Q = random_orthogonal((), D)
    with torch.no_grad():
        embedding.tokens.copy_(embedding.tokens @ Q)
        embedding.positions.copy_(embedding.positions @ Q)
    again = model(embedding(ids), references=embedding.references(ids)).references
    assert close(again, logits)
    nn.functional.cross_entropy(again.flatten(0, 1), ids.flatten()).backward()
    assert embedding.tokens.grad.abs().max() > 0


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm):
    X = tokens(n=4).requires_grad_()
    model = transformer(norm, readout="sum", out=2)
    assert torch.autograd.gradcheck(lambda X: apply(model, X), (X,))


@pytest.mark.parametrize("norm", NORMS)
def test_every_parameter_gets_a_gradient(norm):
    model = transformer(norm, readout="sum", out=2, token_features=2, max_relative_position=2)
    apply(model, tokens(3), tokens(3, d=2)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str
)
@pytest.mark.parametrize("norm", NORMS)
def test_low_precision(norm, dtype, tolerance):
    """Computed in float32 throughout: bfloat16 rounds inputs, parameters and the result only."""
    model = transformer(norm).to(dtype)
    X = tokens(2).to(dtype)
    G, ones = embed_tokens(X), X.sum(-1)
    options = {"ones": ones} if norm == "layer" else {}
    low = model(G, **options)
    assert low.gram.dtype == dtype
    assert low.features.dtype == torch.float32
    exact = model.double()(G.double(), **{key: value.double() for key, value in options.items()})
    assert close(low.gram.double(), exact.gram, tolerance)
    assert close(low.features.double(), exact.features, tolerance)


def test_no_sets_at_all():
    assert apply(transformer("rms", readout="sum", out=2), tokens(0)).shape == (0, 2)


def test_the_optimizer_leaves_it_to_plain_adam():
    """Nothing in the model is taken for an attention whose symmetries are known."""
    X = tokens(4)
    model = transformer(readout="sum")
    twin = copy.deepcopy(model)
    start = copy.deepcopy(model)
    for one, optimizer in (
        (model, qo.QuotientAdam(model, lr=1e-2)),
        (twin, torch.optim.AdamW(twin.parameters(), lr=1e-2)),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            apply(one, X).square().mean().backward()
            optimizer.step()
    for ours, theirs, before in zip(
        model.parameters(), twin.parameters(), start.parameters(), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-12
        assert (ours - before).abs().max() > 1e-3


def test_a_single_token():
    for readout in ("tokens", "sum", "mean"):
        result = apply(transformer(readout=readout, out=2), tokens(2, n=1))
        assert torch.isfinite(result).all()


BAD_OPTIONS = {
    "features 8 is not a multiple of heads 3": {"heads": 3},
    "norm must be one of": {"norm": "batch"},
    "norm 'rms' needs width": {"norm": "rms"},
    "width is read by a norm only": {"width": 3},
    "readout must be one of": {"readout": "pairs"},
    "layers must be at least 1": {"layers": 0},
    "features must be at least 2": {"features": 1},
    "out must be at least 1": {"readout": "sum", "out": 0},
    "out is read by a readout only": {"out": 5},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options_are_refused(message):
    with pytest.raises(ValueError, match=message):
        RelationalTransformer(**{"layers": 1, "heads": 2, "features": 8, **BAD_OPTIONS[message]})


BAD_INPUT = {
    "not square": ({}, {"gram": torch.ones(2, N, N + 1)}, ValueError, r"\(\*batch, N, N\)"),
    "not symmetric": ({}, {"gram": torch.ones(N, N).triu()}, ValueError, "not symmetric"),
    "ones unasked": ({}, {"ones": torch.ones(2, N)}, ValueError, "norm='layer' only"),
    "ones of other shape": (
        {"norm": "layer"},
        {"ones": torch.ones(N)},
        ValueError,
        r"ones must have shape \(2, 6\)",
    ),
    "references with layer norm": (
        {"norm": "layer"},
        {"references": torch.ones(2, N, 2), "ones": torch.zeros(2, N)},
        ValueError,
        "not carried through norm='layer'",
    ),
    "references of other shape": (
        {},
        {"references": torch.ones(2, N)},
        ValueError,
        "references must have shape",
    ),
    "references with a readout": (
        {"readout": "sum"},
        {"references": torch.ones(2, N, 2)},
        ValueError,
        "not read by the readout",
    ),
    "token features unasked": (
        {},
        {"token_features": torch.ones(2, N, 2)},
        ValueError,
        "none are read",
    ),
    "token features missing": ({"token_features": 1}, {}, ValueError, "are missing"),
    "mask": ({}, {"mask": torch.ones(N, dtype=torch.bool)}, ValueError, "mask must broadcast"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(case):
    options, arguments, error, message = BAD_INPUT[case]
    model = transformer(**options)
    with pytest.raises(error, match=message) as caught:
        model(**{"gram": embed_tokens(tokens(2)), **arguments})
    assert "\n" not in str(caught.value)


def test_lifted_refuses_another_width():
    with pytest.raises(ValueError, match=r"shape \(\*batch, N, 3\)"):
        transformer("rms").lifted(tokens(d=4))

"""InvariantAttention computes what the attention it came from computes."""

import copy
import io

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.groups import GL, RotaryCommutant
from quotientopt.models import Attention
from quotientopt.nn import InvariantAttention

PARAMETRIZATIONS = ("fixed-rank", "chart")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
BATCH, LENGTH, WIDTH, HEADS = 3, 7, 24, 4


def ordinary(dtype=torch.float64, **options):
    """A MultiheadAttention with nothing zero."""
    arguments = {"batch_first": True, "dtype": dtype} | options
    module = nn.MultiheadAttention(WIDTH, HEADS, **arguments)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return module


def reference(shared=HEADS, causal=False, dtype=torch.float64, rotary=False):
    return Attention(WIDTH, HEADS, shared, rotary=rotary, causal=causal).to(dtype)


def deviation(one, two):
    return ((one - two).abs().max() / two.abs().max()).item()


@pytest.fixture(params=PARAMETRIZATIONS)
def parametrization(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_equals_multihead_attention(parametrization, dtype, bias, batch_first):
    module = ordinary(dtype, bias=bias, batch_first=batch_first)
    attention = InvariantAttention.from_attention(module, parametrization=parametrization)
    assert attention.query.weight.dtype == dtype
    x = torch.randn(LENGTH, BATCH, WIDTH, dtype=dtype)
    expected = module(x, x, x, need_weights=False)[0]
    assert deviation(attention(x), expected) < TOLERANCE[dtype]
    back = attention.to_attention()
    assert type(back) is nn.MultiheadAttention
    assert deviation(back(x, x, x, need_weights=False)[0], expected) < TOLERANCE[dtype]
    with torch.no_grad():
        attention.key.get_parameter("weight" if parametrization == "fixed-rank" else "free").mul_(
            1.1
        )
    assert deviation(attention(x), expected) > 100 * TOLERANCE[dtype]


@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_reference_attention(parametrization, shared, causal, rotary, dtype):
    module = reference(shared, causal, dtype, rotary)
    attention = InvariantAttention.from_attention(module, parametrization=parametrization)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype)
    assert deviation(attention(x), module(x)) < TOLERANCE[dtype]
    back = attention.to_attention()
    assert type(back) is Attention
    assert (back.causal, back.rotary) == (causal, rotary)
    assert deviation(back(x), module(x)) < TOLERANCE[dtype]


def test_cross_attention_of_other_widths(parametrization):
    module = ordinary(kdim=10, vdim=15)
    attention = InvariantAttention.from_attention(module, parametrization=parametrization)
    query, key = torch.randn(BATCH, 5, WIDTH).double(), torch.randn(BATCH, LENGTH, 10).double()
    value = torch.randn(BATCH, LENGTH, 15).double()
    expected = module(query, key, value, need_weights=False)[0]
    assert deviation(attention(query, key, value), expected) < 1e-10
    back = attention.to_attention()
    assert deviation(back(query, key, value, need_weights=False)[0], expected) < 1e-10


def test_one_sequence_without_batch(parametrization):
    module = ordinary(batch_first=False)
    attention = InvariantAttention.from_attention(module, parametrization=parametrization)
    x, padding = torch.randn(LENGTH, WIDTH).double(), torch.arange(LENGTH) > 4
    expected = module(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    assert deviation(attention(x, key_padding_mask=padding), expected) < 1e-10


# ---- masks --------------------------------------------------------------------------------------


def attn_masks():
    """Boolean and additive masks of all shapes that leave every query a key."""
    for leading in ((), (BATCH * HEADS,)):
        hidden = torch.rand(*leading, LENGTH, LENGTH) < 0.4
        hidden.diagonal(dim1=-2, dim2=-1).fill_(False)
        yield hidden
        yield torch.randn(*leading, LENGTH, LENGTH).double()
        yield torch.zeros(*leading, LENGTH, LENGTH).double().masked_fill(hidden, -torch.inf)
    yield None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["boolean", "additive", None])
def test_masks(parametrization, causal, kind):
    module = ordinary()
    attention = InvariantAttention.from_attention(module, parametrization=parametrization)
    x = torch.randn(BATCH, LENGTH, WIDTH).double()
    # The first key is seen by all, so that no row is empty.
    padding = torch.arange(LENGTH) >= torch.tensor([[7], [4], [1]])
    padding[:, 0] = False
    if kind == "additive":
        padding = torch.randn(BATCH, LENGTH).double()
    padding = None if kind is None else padding
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    for mask in attn_masks():
        merged = mask
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = False
        elif mask is not None:
            mask[..., 0] = 0
        if causal:
            zeros = torch.zeros(LENGTH, LENGTH).double()
            merged = zeros if mask is None else mask
            if merged.dtype == torch.bool:
                merged = torch.zeros(merged.shape).double().masked_fill(merged, -torch.inf)
            merged = merged.masked_fill(future, -torch.inf)
        theirs = padding
        if merged is not None and padding is not None and merged.dtype != padding.dtype:
            theirs, merged = (
                torch.zeros(m.shape).double().masked_fill(m, -torch.inf)
                if m.dtype == torch.bool
                else m
                for m in (padding, merged)
            )
        expected = module(x, x, x, attn_mask=merged, key_padding_mask=theirs, need_weights=False)[0]
        found = attention(x, attn_mask=mask, key_padding_mask=padding, is_causal=causal)
        assert deviation(found, expected) < 1e-10
        if mask is not None or padding is not None or causal:
            assert deviation(attention(x), expected) > 1e-3


def test_four_axes_mask_broadcasts():
    attention = InvariantAttention(WIDTH, HEADS, dtype=torch.float64)
    x = torch.randn(BATCH, LENGTH, WIDTH).double()
    mask = torch.randn(1, HEADS, LENGTH, LENGTH).double()
    full = mask.expand(BATCH, -1, -1, -1).flatten(0, 1)
    assert torch.equal(attention(x, attn_mask=mask), attention(x, attn_mask=full))


def test_a_query_without_keys_gets_the_bias():
    attention = InvariantAttention.from_attention(ordinary())
    x = torch.randn(BATCH, LENGTH, WIDTH).double()
    hidden = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    hidden[2] = True
    for mask in (hidden, torch.zeros(LENGTH, LENGTH).double().masked_fill(hidden, -torch.inf)):
        output = attention(x, attn_mask=mask)
        assert torch.allclose(output[:, 2], attention.output.bias.expand(BATCH, -1), atol=1e-12)
        assert deviation(output[:, 3], attention(x)[:, 3]) < 1e-10


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"attn_mask": torch.zeros(3, LENGTH)}, ValueError, "attn_mask must have shape"),
        ({"attn_mask": torch.zeros(LENGTH, LENGTH, dtype=torch.int64)}, TypeError, "boolean"),
        ({"key_padding_mask": torch.zeros(BATCH, 2)}, ValueError, "key_padding_mask must have"),
    ],
)
def test_bad_masks_are_refused(masks, error, message):
    attention = InvariantAttention(WIDTH, HEADS)
    with pytest.raises(error, match=message):
        attention(torch.randn(BATCH, LENGTH, WIDTH), **masks)


@pytest.mark.parametrize("batch_first", [True, False])
def test_lengths_and_batches_must_agree(batch_first):
    """The fused kernel would read past the end of the values, and repeat a batch of one."""
    attention = InvariantAttention(WIDTH, HEADS, batch_first=batch_first)
    x = torch.randn(BATCH, LENGTH, WIDTH)

    def attend(*tensors):
        return attention(*(t if batch_first else t.transpose(0, 1) for t in tensors))

    for tensors in ((x, x, x[:, :-1]), (x, x[:1], x[:1]), (x[:1], x, x), (x, x, x[:1])):
        with pytest.raises(ValueError, match="one batch size, and as many values as keys"):
            attend(*tensors)
    with pytest.raises(ValueError, match="as many values as keys"):
        attention(x[0], x[0], x[0, :-1])
    assert attend(x, x[:, :-1], x[:, :-1]).numel() == x.numel()


# ---- cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("parts", [(7,), (1,) * 7, (3, 1, 3), (4, 3)])
def test_cache_gives_what_the_whole_sequence_gives(parametrization, shared, rotary, parts):
    module = reference(shared, causal=True, rotary=rotary)
    attention = InvariantAttention.from_attention(module, parametrization=parametrization)
    x = torch.randn(BATCH, LENGTH, WIDTH).double()
    outputs, cache = [], None
    for part in x.split(parts, dim=1):
        output, cache = attention(part, cache=cache, use_cache=True)
        outputs.append(output)
    assert deviation(torch.cat(outputs, dim=1), module(x)) < 1e-10
    rank = WIDTH // HEADS
    assert [entry.shape for entry in cache] == [(BATCH, shared, LENGTH, rank)] * 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda keys, values: (keys[:1], values[:1]),
        lambda keys, values: (keys[:, :1], values[:, :1]),
        lambda keys, values: (keys, values[:, :, :-1]),
        lambda keys, values: (keys[..., :-1], values[..., :-1]),
        lambda keys, values: [keys, values, values],
        lambda keys, values: (keys, None),
    ],
)
def test_bad_caches_are_refused(spoil):
    attention = InvariantAttention(WIDTH, HEADS, causal=True)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    _, cache = attention(x[:, :-1], use_cache=True)
    for bad in (spoil(*cache), cache[0], 3):
        with pytest.raises(ValueError, match="cache must be keys and values of shape"):
            attention(x[:, -1:], cache=bad)
    output, _ = attention(x[:, -1:], cache=cache)
    assert deviation(output, attention(x)[:, -1:]) < 1e-5


def test_cache_with_padding():
    attention = InvariantAttention.from_attention(reference(2, causal=True))
    x = torch.randn(BATCH, LENGTH, WIDTH).double()
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 1:3] = True
    whole = attention(x, key_padding_mask=padding)
    first, cache = attention(x[:, :4], key_padding_mask=padding[:, :4], use_cache=True)
    second, _ = attention(x[:, 4:], key_padding_mask=padding, cache=cache)
    assert deviation(torch.cat((first, second), dim=1), whole) < 1e-10
    assert deviation(attention(x[:, 4:], cache=cache)[0], whole[:, 4:]) > 1e-3


# ---- dropout, dtypes, modules -------------------------------------------------------------------


def test_dropout(parametrization):
    module = ordinary(dropout=0.3)
    attention = InvariantAttention.from_attention(module, parametrization=parametrization)
    x = torch.randn(BATCH, LENGTH, WIDTH).double()
    outputs = []
    for run in (lambda: module(x, x, x, need_weights=False)[0], lambda: attention(x)):
        torch.manual_seed(3)
        outputs.append(run())
    assert deviation(*outputs) < 1e-10
    assert deviation(attention(x), outputs[0]) > 1e-3  # other random numbers
    module.eval()
    expected = module(x, x, x, need_weights=False)[0]
    assert deviation(attention.eval()(x), expected) < 1e-10
    assert not InvariantAttention.from_attention(module).training
    assert attention.to_attention().dropout == 0.3


def test_scale_belongs_to_the_module(parametrization):
    options = {"parametrization": parametrization, "dtype": torch.float64}
    attention = InvariantAttention(WIDTH, HEADS, scale=0.1, **options)
    plain = InvariantAttention(WIDTH, HEADS, **options)
    plain.load_state_dict(attention.state_dict())
    x = torch.randn(BATCH, LENGTH, WIDTH).double()
    assert deviation(attention(x), plain(x)) > 1e-3
    with torch.no_grad():
        plain.query.weight.mul_(0.1 * (WIDTH // HEADS) ** 0.5)
    assert deviation(attention(x), plain(x)) < 1e-10
    with pytest.raises(ValueError, match=r"no place for scale 0\.1"):
        attention.to_attention()


def test_bfloat16_and_autocast(parametrization):
    module = reference(2, causal=True, dtype=torch.float32)
    attention = InvariantAttention.from_attention(module, parametrization=parametrization)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, cache = attention(x, use_cache=True)
    assert output.dtype == cache[0].dtype == torch.bfloat16
    assert deviation(output, module(x)) < 3e-2
    narrow = copy.deepcopy(attention).to(torch.bfloat16)
    assert deviation(narrow(x.to(torch.bfloat16)), module(x)) < 3e-2
    again = InvariantAttention.from_attention(
        module.to(torch.bfloat16), parametrization=parametrization
    )
    assert again.query.weight.dtype == torch.bfloat16
    assert deviation(again(x.to(torch.bfloat16)), module(x.to(torch.bfloat16))) < 3e-2


@pytest.mark.parametrize("rotary", [True, False])
def test_state_dict_copy_and_compile(parametrization, rotary):
    shared = {"key_value_heads": 2, "causal": True, "rotary": rotary}
    shared["parametrization"] = parametrization
    attention = InvariantAttention(WIDTH, HEADS, bias=True, **shared)
    other = InvariantAttention(WIDTH, HEADS, bias=True, **shared)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    expected = attention(x)
    assert deviation(other(x), expected) > 1e-3
    file = io.BytesIO()
    torch.save(attention.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(attention)(x), expected)
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    padding = torch.arange(LENGTH).expand(BATCH, -1) > 4
    assert torch.equal(compiled(x), expected)
    _, cache = compiled(x[:, :4], use_cache=True)
    assert torch.equal(compiled(x[:, 4:], cache=cache)[0], attention(x[:, 4:], cache=cache)[0])
    found = compiled(x, key_padding_mask=padding)
    assert torch.equal(found, attention(x, key_padding_mask=padding))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("rotary", [True, False])
def test_parameter_counts(bias, shared, rotary):
    rank, group = WIDTH // HEADS, HEADS // shared
    n_qk, n_vo, m = group * (WIDTH + bias), group * WIDTH, WIDTH
    redundant = 1 if rotary else rank
    # Rotation makes the keys' bias seen; that of the values is in the output's.
    keys = m + (bias and rotary)
    expected = shared * rank * ((n_qk + keys - redundant) + (n_vo + m - rank))
    options = {"key_value_heads": shared, "bias": bias, "rotary": rotary}
    chart = InvariantAttention(WIDTH, HEADS, parametrization="chart", **options)
    pair = InvariantAttention(WIDTH, HEADS, **options)
    counts = [
        sum(p.numel() for name, p in module.named_parameters() if name != "output.bias")
        for module in (chart, pair)
    ]
    gauge = {"qk": shared * rank * redundant, "vo": shared * rank**2}
    assert chart.dim == pair.dim == expected
    assert counts == [expected, expected + sum(gauge.values())]
    redundancy = qo.find_symmetries(pair).redundancy()
    assert redundancy == gauge | {"total": sum(gauge.values())}
    assert qo.find_symmetries(chart).heads == ()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_chart_of_biased_maps_has_as_many_numbers_as_are_free(dropout):
    """132 numbers of which 12 were gauge: the rank of the derivative of all outputs says 120."""
    module = nn.MultiheadAttention(6, 2, dropout=dropout, batch_first=True).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    chart = InvariantAttention.from_attention(module, parametrization="chart")
    x = torch.randn(16, 5, 6).double()
    assert deviation(chart(x), module(x, x, x, need_weights=False)[0]) < 1e-10
    # Dropout of the weights makes the values' bias seen while training, but not in this mode.
    count = sum(parameter.numel() for parameter in chart.parameters())
    assert count == 120 + (6 if dropout else 0)
    names = [name for name, _ in chart.named_parameters()]
    derivatives = torch.autograd.functional.jacobian(
        lambda *values: torch.func.functional_call(
            chart, dict(zip(names, values, strict=True)), (x,)
        ).flatten(),
        tuple(parameter.detach() for parameter in chart.parameters()),
    )
    assert int(torch.linalg.matrix_rank(torch.cat([d.flatten(1) for d in derivatives], 1))) == 120
    back = chart.to_attention()
    assert deviation(back(x, x, x, need_weights=False)[0], chart(x)) < 1e-10
    assert not back.in_proj_bias[6:12].any()
    assert bool(back.in_proj_bias[12:].any()) == bool(dropout)


@pytest.mark.parametrize("parametrization", ["fixed-rank", "chart"])
def test_translates_are_one_point(parametrization):
    module = nn.MultiheadAttention(6, 2, batch_first=True).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        shift = torch.randn(12).double()
        twin.in_proj_bias[6:] += shift
        twin.out_proj.bias -= twin.out_proj.weight @ shift[6:]
    one, two = (
        InvariantAttention.from_attention(m, parametrization=parametrization)
        for m in (module, twin)
    )
    for name, ours in one.state_dict().items():
        assert (ours - two.state_dict()[name]).abs().max() < 1e-12, name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [4, 2])
@pytest.mark.parametrize("rotary", [True, False])
def test_symmetries_are_found_and_exact(bias, shared, rotary):
    options = {"bias": bias, "rotary": rotary, "dtype": torch.float64}
    attention = InvariantAttention(WIDTH, HEADS, key_value_heads=shared, **options)
    x = torch.randn(BATCH, LENGTH, WIDTH).double()
    symmetries = qo.find_symmetries(attention)
    qk, vo = (symmetry.group for symmetry in symmetries.heads)
    assert (qk, vo) == (RotaryCommutant(6) if rotary else GL(6), GL(6))
    assert max(symmetries.verify(attention, x).values()) < 1e-10
    element = symmetries.random_element()
    expected = attention(x)
    symmetries.act_(element)
    attention.output.weight.data[:, 0] *= 1.1
    assert deviation(attention(x), expected) > 1e-6


def test_initial_weights_come_from_the_generator(parametrization):
    def build(seed):
        generator = torch.Generator().manual_seed(seed)
        return InvariantAttention(
            WIDTH, HEADS, parametrization=parametrization, generator=generator
        )

    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one, two, other = build(1), build(1), build(2)
    assert torch.equal(torch.rand(1), expected)
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert not torch.equal(one.query.weight, other.query.weight)

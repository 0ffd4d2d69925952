"""The census: counts by kind are the numerical null space of the derivative of all outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import quotientopt as qo
from quotientopt.canonical import redundancy
from quotientopt.groups import (
    GL,
    O,
    PlaneCommutant,
    RotaryCommutant,
    RotaryPhases,
    Scale,
    StabilizerOfOnes,
)
from quotientopt.symmetries import Contribution, HeadSymmetry, fold_norms_, register
from quotientopt.symmetries.adapters.layers import (
    add_attention,
    add_branch,
    add_embedding,
    add_norm,
    add_reader,
    consecutive,
    input_heads,
    output_heads,
)
from quotientopt.symmetries.orbits import orbit_dimension, rotation_dimension
from tests.canonical.affine import affine
from tests.canonical.null_space import null_dimension
from tests.symmetries.families import FAMILIES, transformers

VOCABULARY, LENGTH, WIDTH, HEADS = 10, 8, 8, 2


class NanoGPT(nn.Module):
    """A fused projection, LayerNorm and GELU; the head is tied to the embedding or not."""

    def __init__(self, *, bias: bool, heads: int = HEADS, tied: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.ln_1, self.ln_2, self.ln_f = (nn.LayerNorm(WIDTH, bias=bias) for _ in range(3))
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.c_fc = nn.Linear(WIDTH, 12, bias=bias)
        self.c_out = nn.Linear(12, WIDTH, bias=bias)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[-1]))
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        )
        scores = (q @ k.mT).masked_fill(torch.ones(x.shape[-2], x.shape[-2]).triu(1) > 0, -1e9)
        x = x + self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + self.c_out(functional.gelu(self.c_fc(self.ln_2(x))))
        return self.lm_head(self.ln_f(x))


@register(f"{__name__}.NanoGPT")
def nano_gpt(module: NanoGPT, name: str) -> Contribution:
    assert not name
    contribution = Contribution()
    heads = {
        part: output_heads(
            module.c_attn, "c_attn", 3 * WIDTH, consecutive(module.heads, index, parts=3)
        )
        for index, part in enumerate(("query", "key", "value"))
    }
    output = input_heads(module.c_proj, "c_proj", WIDTH, consecutive(module.heads))
    add_attention(contribution, "", output=output, qk_group=GL(WIDTH // module.heads), **heads)
    add_branch(contribution, module, "", readers=["c_attn"], writers=["c_proj"], norm="ln_1")
    add_branch(contribution, module, "", readers=["c_fc"], writers=["c_out"], norm="ln_2")
    for table in ("wte", "wpe"):
        add_embedding(contribution, getattr(module, table), table)
    head = add_reader(contribution, module.lm_head, "lm_head")
    add_norm(contribution, module.ln_f, "ln_f", [head])
    return contribution


def build(class_name, **settings):
    package = transformers()
    package.logging.set_verbosity_error()
    model_class = getattr(package, class_name)
    configuration = model_class.config_class(attn_implementation="eager", **settings)
    return model_class(configuration)


def llama(tied):
    return build(
        "LlamaForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        rms_norm_eps=1e-2,
        tie_word_embeddings=tied,
        pad_token_id=None,
    )


def gpt2(tied, positions=LENGTH):
    return build(
        "GPT2LMHeadModel",
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=1,
        n_head=HEADS,
        n_positions=positions,
        n_inner=12,
        layer_norm_epsilon=1e-2,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )


def bert(class_name="BertModel"):
    return build(
        class_name,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        layer_norm_eps=1e-2,
        pad_token_id=None,
    )


def t5(tied):
    model = build(
        "T5ForConditionalGeneration",
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=4,
        d_ff=6,
        num_layers=1,
        num_heads=HEADS,
        relative_attention_num_buckets=4,
        relative_attention_max_distance=6,
        layer_norm_epsilon=1e-2,
        feed_forward_proj="relu" if tied else "gated-gelu",
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model


def random(model):
    """Values in general position, in float64.

    A small ε of the norms leaves the length of the stream almost without effect.
    """
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-2
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            gain = parameter.ndim == 1 and "weight" in name
            parameter.copy_(0.4 * values + gain)
    return model


def tokens(seed, batch=6):
    shape = (batch, LENGTH)
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def run_on(seed):
    """One batch through any of these models."""

    def run(model):
        ids = tokens(seed)
        name = type(model).__name__
        if name.startswith("T5"):
            return model(input_ids=ids, decoder_input_ids=tokens(seed + 50)).logits
        if name == "BertModel":
            found = model(input_ids=ids, token_type_ids=tokens(seed + 50) % 2)
            return torch.cat((found.last_hidden_state.flatten(), found.pooler_output.flatten()))
        if name.startswith("Bert"):
            return model(input_ids=ids, token_type_ids=tokens(seed + 50) % 2).logits
        found = model(ids)
        return getattr(found, "logits", found)

    return run


def null(model):
    size = sum(parameter.numel() for parameter in model.parameters())
    batches = size // run_on(0)(model).numel() + 2
    return null_dimension(model, [run_on(seed) for seed in range(batches)])


# LayerNorm, biases, two heads of width four, hidden width 12: what one layer of GPT-2 has.
BLOCK = {
    "heads": 2 * HEADS * 16,
    "translations of biases": 2 * WIDTH,
    "gains of norms": 2 * WIDTH,
    "biases of norms": 2 * WIDTH,
    "means of readers": 3 * WIDTH + 12,
    # Columns and bias of both output matrices, and the positions.
    "means of writers": (WIDTH + 1) + (12 + 1) + LENGTH,
}
UNTIED = BLOCK | {
    "gains of norms": 3 * WIDTH,
    "biases of norms": 3 * WIDTH,
    "means of writers": BLOCK["means of writers"] + VOCABULARY,
    "sums of embeddings": WIDTH - 1,
    "rotations of the residual stream": 7 * 6 // 2,
}
# BERT's norms write to the stream: their gains stay, their biases move on into those of the branch.
ENCODER = {
    "heads": 2 * HEADS * 16,
    "translations of biases": 2 * WIDTH,
    "biases of norms": 2 * WIDTH,
    "means of readers": 3 * WIDTH + 12,
    "means of writers": (WIDTH + 1) + (12 + 1) + LENGTH + 2,
}
WITHOUT_BIAS = {
    "heads": 2 * HEADS * 16,
    "gains of norms": 2 * WIDTH,
    "means of readers": 3 * WIDTH + 12,
    "means of writers": WIDTH + 12 + LENGTH,
    # The tied table, by one multiple of 1/γ in all rows.
    "sums of embeddings": 1,
}
T5 = {
    "heads": 3 * 2 * HEADS * 16,
    "scales of hidden units": 2 * 6,
    "gains of norms": (5 + 1) * WIDTH,
    "biases of scores": 2 * HEADS,
    "values never used": HEADS,
}
LLAMA = {"heads": 4 + 16, "scales of hidden units": 16, "gains of norms": 2 * WIDTH}
# Name to the model, the counts by kind, and directions that are known to be missing.
MODELS = {
    "llama-tied": (lambda: llama(True), LLAMA, 0),
    "llama": (
        lambda: llama(False),
        LLAMA | {"gains of norms": 3 * WIDTH, "rotations of the residual stream": 8 * 7 // 2},
        0,
    ),
    "gpt2": (lambda: gpt2(True), BLOCK, 0),
    "gpt2-untied": (lambda: gpt2(False), UNTIED, 0),
    "bert": (
        bert,
        ENCODER
        | {
            "means of readers": ENCODER["means of readers"] + WIDTH,
            "means of writers": ENCODER["means of writers"] + VOCABULARY,
            "sums of embeddings": 2 * (WIDTH - 1),
        },
        0,
    ),
    # Its head has a norm of its own, off the stream: d ways to move its bias into the decoder's,
    # and a constant of the table, which its two uses take up in two ways.
    "bert-masked": (
        lambda: bert("BertForMaskedLM"),
        ENCODER
        | {
            "gains of norms": WIDTH,
            "biases of norms": 3 * WIDTH,
            "means of readers": ENCODER["means of readers"] + WIDTH,
            "sums of embeddings": WIDTH - 1,
        },
        WIDTH + 1,
    ),
    "t5": (lambda: t5(True), T5, 0),
    "t5-untied": (
        lambda: t5(False),
        T5 | {"gains of norms": 7 * WIDTH, "rotations of the residual stream": 8 * 7 // 2},
        0,
    ),
    "nano": (lambda: NanoGPT(bias=True), BLOCK, 0),
    "nano-without-bias": (lambda: NanoGPT(bias=False), WITHOUT_BIAS, 0),
    # One head as wide as the stream, of which centring leaves one dimension less: both factors of
    # each pair lack a rank in effect, and the stabiliser has dimension one.
    "nano-one-head": (
        lambda: NanoGPT(bias=False, heads=1),
        WITHOUT_BIAS | {"heads": 63 + 63},
        0,
    ),
    "reference": (
        lambda: qo.models.GPT(VOCABULARY, layers=1, width=WIDTH, heads=HEADS, context=LENGTH),
        {
            "heads": 2 * HEADS * 16,
            "rotations of the residual stream": 8 * 7 // 2,
            "sums of embeddings": WIDTH,
        },
        0,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_census_is_the_null_space(name, monkeypatch):
    monkeypatch.setattr("quotientopt.models.gpt.NORM_EPS", 1e-2)
    make, kinds, missing = MODELS[name]
    model = random(make())
    symmetries = affine(model)
    counts = redundancy(model, symmetries=symmetries)
    assert counts.kinds == kinds
    assert counts.total.redundant == symmetries.redundancy()["total"] == sum(kinds.values())
    assert counts.unknown == ()
    assert null(model) == sum(kinds.values()) + missing


def test_gains_of_queries_and_keys_are_counted_by_what_mixes_their_rows():
    """One for a rotary plane, one for a row that passes, in each head that has gains of its own."""
    counts = {}
    for name in ("qwen3", "olmo2"):
        family = FAMILIES[name]
        for kv in (1, 2):
            settings = {k: SMALL.get(k, value) for k, value in family.settings.items()}
            model = family.model(**(settings | {"num_key_value_heads": kv}))
            counts[name, kv] = redundancy(model).kinds.get("gains of queries and keys")
    # OLMo 2 normalises all heads at once, with a gain for every row of all of them.
    assert counts == {("qwen3", 1): 2, ("qwen3", 2): 2, ("olmo2", 1): 2, ("olmo2", 2): 4}


def test_hidden_units_are_found_with_and_without_a_batch():
    """Without a map made by hand: the class tells heads, norms and hidden units."""
    model = random(llama(True))
    batch = {"input_ids": tokens(7)}
    assert redundancy(model, example_inputs=batch).kinds == LLAMA
    assert redundancy(model).kinds == LLAMA
    found = qo.invariants(model, example_inputs=batch)
    assert any(invariant.left.shape[:2] == (16, 1) for invariant in found.values())


class Stranger(NanoGPT):
    """What a class changes is not understood by the class it comes from."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)


def test_of_a_stranger_a_batch_gives_a_lower_bound():
    model = random(Stranger(bias=True))
    counts = redundancy(model, example_inputs=tokens(7))
    assert counts.kinds == {key: BLOCK[key] for key in ("heads", "translations of biases")}
    assert counts.total.redundant < null(model)
    assert str(counts).splitlines()[-1].startswith("at least ")


def test_rows_that_are_never_used_are_beside_the_census():
    """Two positions more than there are tokens: d − 1 directions each beside their means."""
    model = random(gpt2(True, positions=LENGTH + 2))
    claimed = affine(model).redundancy()["total"]
    assert null(model) == claimed + 2 * (WIDTH - 1)


def test_what_reads_the_stream_as_it_is_takes_the_means_of_writers():
    """A control: with RMS norms nothing is centred, and a claim of means would be wrong."""
    model = NanoGPT(bias=True)
    for name in ("ln_1", "ln_2", "ln_f"):
        setattr(model, name, nn.RMSNorm(WIDTH))
    model = random(model)
    counts = redundancy(model, symmetries=affine(model))
    assert not {"means of writers", "means of readers", "biases of norms"} & set(counts.kinds)
    assert counts.kinds["gains of norms"] == 2 * WIDTH
    assert null(model) == counts.total.redundant


def test_folding_turns_means_into_rotations():
    """Centring is gone, and with it the means: at the weights of such a model in general.

    What folding writes is special, in that all writers have mean zero.
    """
    model = NanoGPT(bias=True, tied=False)
    fold_norms_(model)
    model = random(model)
    counts = redundancy(model, symmetries=affine(model))
    assert counts.kinds["rotations of the residual stream"] == 8 * 7 // 2
    assert "means of writers" not in counts.kinds
    assert counts.kinds["gains of norms"] == 3 * WIDTH
    # The head has no bias that could take up that of its norm.
    assert counts.kinds["biases of norms"] == 2 * WIDTH
    assert null(model) == counts.total.redundant


GROUPS = [
    GL(4),
    RotaryCommutant(4),
    RotaryCommutant(4, rotary_dim=2),
    O(4),
    StabilizerOfOnes(4),
    RotaryPhases(4, rotary_dim=2),
    RotaryPhases(4),
    PlaneCommutant(4, [[(0, 2), (1, 3)]]),
    PlaneCommutant(4, [[(3, 1)]]),
    RotaryPhases.of(PlaneCommutant(4, [[(0, 2), (1, 3)]])),
    RotaryPhases.of(PlaneCommutant(4, [[(3, 1)]])),
]


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("ranks", [(4, 4), (0, 4), (2, 3), (1, 1), (0, 0)], ids=str)
def test_orbits_of_deficient_pairs_are_smaller(group, ranks):
    """The rank of ``Λ ↦ (−Λᵀ A, Λ B)`` on the Lie algebra, head by head."""
    generator = torch.Generator().manual_seed(3)
    heads, columns = 2, 6
    factors = []
    for rank in ranks:
        outer, inner = (
            torch.randn(heads, *shape, generator=generator, dtype=torch.float64)
            for shape in ((4, rank), (rank, columns))
        )
        factors.append(nn.Parameter(outer @ inner))
    symmetry = HeadSymmetry([factors[0]], [factors[1]], group, "pair")
    algebra = group.algebra_projection(torch.eye(16, dtype=torch.float64).reshape(16, 4, 4))
    expected = 0
    for A, B in zip(*(factor.detach() for factor in factors), strict=True):
        moved = torch.cat((-algebra.mT @ A, algebra @ B), dim=-1).flatten(1)
        expected += int(torch.linalg.matrix_rank(moved, atol=1e-10)) if moved.any() else 0
    assert orbit_dimension(symmetry) == expected
    if min(ranks) == 4:
        assert expected == heads * group.dim


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rank", [0, 2, 5, 6])
@pytest.mark.parametrize("shapes", [((7, 6), (3, 6)), ((2, 6), (3, 6), (6,), (6,))], ids=str)
def test_rotations_of_a_stream_that_is_not_spanned(shapes, rank, centred):
    """The rank of ``Ω ↦ W Ωᵀ`` over all matrices at once, for skew Ω (that kill ones)."""
    generator = torch.Generator().manual_seed(4)
    basis = torch.randn(rank, 6, generator=generator, dtype=torch.float64)
    matrices = [
        torch.randn(*shape[:-1], rank, generator=generator, dtype=torch.float64) @ basis
        for shape in shapes
    ]
    skew = torch.randn(40, 6, 6, generator=generator, dtype=torch.float64)
    if centred:
        centring = torch.eye(6, dtype=torch.float64) - 1 / 6
        skew = centring @ skew @ centring
    skew = skew - skew.mT
    stack = torch.cat([matrix.reshape(-1, 6) for matrix in matrices])
    moved = (stack @ skew).flatten(1)
    expected = int(torch.linalg.matrix_rank(moved, rtol=1e-10)) if rank else 0
    full = 10 if centred else 15
    axes = [(matrix, matrix.ndim - 1) for matrix in matrices]
    assert rotation_dimension(axes, centred, full) == expected


def test_dead_units_and_new_adapters():
    up, down = (nn.Parameter(torch.randn(5, 1, 3)) for _ in range(2))
    with torch.no_grad():
        up[0], down[1] = 0, 0
        up[2], down[2] = 0, 0
    for group in (GL(1), Scale(1)):
        assert orbit_dimension(HeadSymmetry([down], [up], group, "units")) == 4
    # LoRA starts with one factor zero: its orbit is as large as ever.
    left, right = nn.Parameter(torch.zeros(1, 4, 6)), nn.Parameter(torch.randn(1, 4, 6))
    assert orbit_dimension(HeadSymmetry([left], [right], GL(4), "lora")) == 16


class MyAttention(nn.Module):
    """Known to nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)


@pytest.mark.parametrize("model", [MyAttention(), nn.Linear(3, 3)], ids=["attention", "linear"])
def test_what_is_not_understood_is_no_zero(model):
    text = str(redundancy(model))
    assert "0.00%" not in text
    last = text.splitlines()[-1]
    assert last.startswith("how many parameters are gauge is not known, not understood: ")
    assert ("MyAttention" in last) == isinstance(model, MyAttention)


def test_half_understood_models_have_a_lower_bound():
    model = nn.ModuleDict({"known": nn.MultiheadAttention(8, 2), "unknown": MyAttention()})
    last = str(redundancy(model)).splitlines()[-1]
    assert last.startswith("at least ")
    assert "unknown" in last


def test_an_attention_without_a_gauge_is_understood():
    attention = qo.nn.InvariantAttention(8, 2, parametrization="chart")
    assert str(redundancy(attention)).splitlines()[-1] == "no parameter is gauge"


def test_the_census_changes_nothing():
    model = random(NanoGPT(bias=True))
    before = copy.deepcopy(model.state_dict())
    redundancy(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


SMALL = {
    **dict.fromkeys(("hidden_size", "d_model"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 12),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), 1),
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "max_seq_len": LENGTH,
}
# Family to directions that are known to be missing.
FURTHER = {
    "qwen2": 0,
    "gemma2": 0,
    "granite": 0,
    "starcoder2": 0,
    "olmo": 0,
    "mpt": 0,
    "qwen3": 0,
    "olmo2": 0,
    "gemma3": 0,
    # Branches one after the other; biases of keys on two rows of every head are dropped by softmax.
    "gpt-neox": 0,
}


PARALLEL = {
    "gpt-neox": ("attention.dense.bias", "mlp.dense_4h_to_h.bias"),
    "phi": ("self_attn.dense.bias", "mlp.fc2.bias"),
    "falcon": ("self_attention.dense.bias", "mlp.dense_4h_to_h.bias"),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_biases_of_branches_that_are_added_at_once(name):
    """What one of them gives the other takes; each has a direction of its mean besides."""
    family = FAMILIES[name]
    settings = {key: SMALL.get(key, value) for key, value in family.settings.items()}
    settings |= {"num_hidden_layers": 2, "attn_implementation": "eager"}
    models = [random(family.model(**settings))]
    if name == "gpt-neox":
        models.append(random(family.model(**settings | {"use_parallel_residual": False})))
    for model, exact in zip(models, (True, False), strict=False):
        parameters = dict(model.named_parameters())
        one, two = (next(p for n, p in parameters.items() if n.endswith(k)) for k in PARALLEL[name])
        before = model(tokens(0)).logits
        with torch.no_grad():
            constant = torch.randn(WIDTH, dtype=torch.float64)
            one += constant
            two -= constant
        change = (model(tokens(0)).logits - before).abs().max()
        assert bool(change < 1e-5) == exact
        kinds = redundancy(model).kinds
        assert kinds.get("sums of biases", 0) == (2 * (WIDTH - 1) if exact else 0)


@pytest.mark.parametrize("name", FURTHER)
def test_the_census_of_further_families(name):
    family = FAMILIES[name]
    settings = {key: SMALL.get(key, value) for key, value in family.settings.items()}
    settings.setdefault("attn_implementation", "eager")
    if name == "gpt-neox":
        settings["use_parallel_residual"] = False
    model = random(family.model(**settings))
    assert redundancy(model).kinds.get("biases of unrotated keys", 0) == (name == "gpt-neox") * 4
    for module in model.modules():
        for epsilon in ("eps", "variance_epsilon"):
            if "Norm" in type(module).__name__ and hasattr(module, epsilon):
                setattr(module, epsilon, 1e-2)
        if isinstance(module, nn.Embedding):
            # Padding is read like other tokens, its derivative is left out.
            module.padding_idx = None
    claimed = affine(model).redundancy()["total"]
    assert null(model) == claimed + FURTHER[name]

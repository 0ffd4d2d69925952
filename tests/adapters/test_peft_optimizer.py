"""qo.peft: an optimizer for all that is trained of a PEFT model."""

import copy
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.peft import create_quotient_optimizer, find_trained_pairs

peft = pytest.importorskip("peft", reason="needs peft: pip install peft")

from tests.symmetries.double import KeepFloat64  # noqa: E402
from tests.symmetries.families import FAMILIES  # noqa: E402

RANK = 3
ROOT = Path(__file__).parents[2]


def adapted(name="llama", dtype=torch.float32, **options):
    settings = {"r": RANK, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | options
    torch.manual_seed(0)
    model = peft.get_peft_model(FAMILIES[name].model(), peft.LoraConfig(**settings))
    return model.to(dtype)


def train(model, optimizer, steps, name="llama", seed=1):
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(30, (4, 8), generator=generator)
        optimizer.zero_grad()
        outputs = model(input_ids=tokens)
        values = outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
        loss = (values - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def twins(monkeypatch):
    pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer: pip install it")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("lora_twins")


def test_twins_and_controls(twins):
    rows = twins.twin_table()
    print(twins.as_text(rows))
    apart = {(row["optimizer"], row["start"]): row["largest_difference"] for row in rows}
    for start in dict.fromkeys(row["start"] for row in rows):
        exact = 1e-5 if "float32" in start else 1e-10
        assert apart["quotient-adam", start] < exact
        assert apart["adamw", start] > 1e-2
        assert apart["riemannian", start] > 1e-2
    falls = {row["optimizer"]: row["losses"][0][0] - row["losses"][0][-1] for row in rows}
    assert min(falls.values()) > 0.05


def make_orthogonal_exactly_(model):
    """A and B of half rank with BA = 0 in float64; peft makes them in float32."""
    parameters = dict(model.named_parameters())
    for name, A in parameters.items():
        if "lora_A" in name:
            half = torch.linalg.svd(A.detach())[0][:, : len(A) // 2]
            B = parameters[name.replace("lora_A", "lora_B")]
            A.data.copy_(half @ half.T @ A.detach())
            B.data.sub_(B.detach() @ half @ half.T)
            assert (B @ A).abs().max() < 1e-15


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal", "gaussian", True, False])
def test_initialisations(twins, start):
    """Factors that start elsewhere: the curve is that of a twin, and goes down."""
    model = twins.adapted("as given", torch.float64, init_lora_weights=start)
    if start == "orthogonal":
        make_orthogonal_exactly_(model)
    twin = twins.twin_of(model, cond=100.0 if start == "orthogonal" else 1000.0)
    curves = [twins.train(m, twins.quotient_adam(m), 20) for m in (model, twin)]
    assert (curves[0] - curves[1]).abs().max() < 1e-10
    assert curves[0][-1] < curves[0][0]


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.1},
    "lora bias": {"lora_bias": True},
    "all biases": {"bias": "all"},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 5},
        "alpha_pattern": {"q_proj": 11},
    },
    "modules to save": {"modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"},
    "trained norms": {"modules_to_save": ["norm"], "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_pair_is_one_and_the_rest_is_adamw(variant):
    model = adapted(**VARIANTS[variant])
    optimizer = create_quotient_optimizer(model, lr=1e-3, weight_decay=0.1)
    pairs = optimizer.symmetries.heads
    assert len(pairs) == 4
    assert optimizer.symmetries.unrecognized == ()
    covered = {block.name for pair in pairs for block in pair.blocks}
    assert covered == {
        name for name in trained_names(model) if ".lora_A." in name or ".lora_B." in name
    } - {name for name in trained_names(model) if name.endswith("lora_B.default.bias")}
    found = {s.name for s in qo.find_symmetries(model).heads if ".lora." in s.name}
    assert found == {pair.name for pair in pairs}
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(trained_names(model))
    parameters = dict(model.named_parameters())
    for group in optimizer.param_groups:
        vector = all(parameters[name].ndim == 1 for name in group["param_names"])
        assert group["weight_decay"] == (0.0 if vector else 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 3)
    for name, p in model.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved <= p.requires_grad, name
        if p.requires_grad and p.grad.any():
            assert moved, name
        if p.requires_grad:
            assert ("head_frame" in optimizer.state[p]) == (name in covered)


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "lora bias", "patterns"])
def test_pairs_of_variants_are_exact_in_training(variant):
    with KeepFloat64():
        model = adapted(dtype=torch.float64, **VARIANTS[variant])
        for name, p in model.named_parameters():
            if ".lora_B." in name and name.endswith("weight"):
                nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(3))
        symmetries = find_trained_pairs(model)
        inputs = FAMILIES["llama"].inputs()
        assert max(symmetries.verify(model, cond=100.0, **inputs).values()) <= 1e-10
        twin = copy.deepcopy(model)
        own = find_trained_pairs(twin)
        own.act_(own.random_element(cond=100.0, generator=torch.Generator().manual_seed(2)))
        apart = []
        for options in ({}, {"lora_frame": None}):
            curves = []
            for own in map(copy.deepcopy, (model, twin)):
                optimizer = create_quotient_optimizer(own, lr=3e-3, other_lr=1e-3, **options)
                curves.append(train(own, optimizer, 15))
            apart.append((curves[0] - curves[1]).abs().max())
    assert apart[0] < 1e-10
    assert apart[1] > 1e-5


def test_conv1d_and_embeddings():
    model = adapted("gpt2", target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True)
    optimizer = create_quotient_optimizer(model, lr=1e-3, embedding_lr=1e-4)
    assert len(optimizer.symmetries.heads) == 7
    pairs, embeddings = optimizer.param_groups
    assert (pairs["lr"], embeddings["lr"]) == (1e-3, 1e-4)
    assert all("lora_embedding_" in name for name in embeddings["param_names"])
    assert len(embeddings["params"]) == 2
    losses = train(model, optimizer, 8, "gpt2")
    assert losses[-1] < losses[0]


def test_schedulers_of_a_tensor_lr_reach_every_group_once():
    model = adapted(modules_to_save=["lm_head"])
    optimizer = create_quotient_optimizer(model, lr=torch.tensor(1e-3))
    rates = [group["lr"] for group in optimizer.param_groups]
    assert len({id(rate) for rate in rates}) == len(rates) > 1
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    optimizer.step()
    scheduler.step()
    assert [float(rate) for rate in rates] == pytest.approx([5e-4] * len(rates))


def test_the_active_one_of_several_adapters():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=5, target_modules=["q_proj", "o_proj"]))
    model.set_adapter("other")
    optimizer = create_quotient_optimizer(model, lr=1e-3)
    assert {pair.name.rsplit(".", 1)[1] for pair in optimizer.symmetries.heads} == {"other"}
    assert {pair.rank for pair in optimizer.symmetries.heads} == {5}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    train(model, optimizer, 3)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], old) for name, old in before.items())


def test_a_quantised_base_is_no_obstacle():
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    codes = torch.zeros(layer.weight.shape, dtype=torch.uint8)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    optimizer = create_quotient_optimizer(model, lr=1e-3)
    assert len(optimizer.symmetries.heads) == 4
    assert all(p is not layer.weight for p in optimizer.param_groups[0]["params"])


class Linear4bit(nn.Module):
    """Built like peft's, which needs bitsandbytes."""

    def __init__(self):
        super().__init__()
        self.r, self.lora_variant = {"default": 2}, {}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 5, bias=False)})

    def forward(self, x):
        return self.lora_B["default"](self.lora_A["default"](x))


Linear4bit.__module__ = "peft.tuners.lora.bnb"


def test_layers_over_a_quantised_base_are_known_by_name():
    pairs = find_trained_pairs(nn.Sequential(Linear4bit())).heads
    assert [(pair.name, pair.rank, pair.columns) for pair in pairs] == [
        ("0.lora.default", 2, (5, 6))
    ]


def test_merging_and_saving_are_untouched(tmp_path):
    model = adapted().eval()
    optimizer = create_quotient_optimizer(model, lr=1e-2)
    train(model, optimizer, 5)
    inputs = FAMILIES["llama"].inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        loaded = peft.PeftModel.from_pretrained(FAMILIES["llama"].model(), tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits, expected)
        merged = model.merge_and_unload()
        assert torch.allclose(merged(**inputs).logits, expected, atol=1e-5)


def test_loaded_for_inference_only_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(FAMILIES["llama"].model(), tmp_path)
    with pytest.raises(ValueError, match=r"none is trained.*is_trainable"):
        create_quotient_optimizer(loaded, lr=1e-3)
    again = peft.PeftModel.from_pretrained(FAMILIES["llama"].model(), tmp_path, is_trainable=True)
    assert len(create_quotient_optimizer(again, lr=1e-3).symmetries.heads) == 4


def half_frozen(model):
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    return model


def on_meta(model):
    return model.to("meta")


def quantised(model):
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    layer.weight = nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda m: m.base_model.model.model.norm, ValueError, "has no LoRA adapter; add one"),
        (lambda m: "model", TypeError, "expected a torch.nn.Module, got str"),
        (half_frozen, ValueError, r"q_proj\.lora\.default' is half frozen: .*lora_B.*lora_A"),
        (on_meta, ValueError, r"lora_A\.default\.weight' is on the meta device"),
        (quantised, ValueError, r"lora_A\.default\.weight' is quantised"),
    ],
)
def test_bad_models_are_refused_in_one_line(spoil, error, message):
    model = spoil(adapted())
    with pytest.raises(error, match=message) as caught:
        create_quotient_optimizer(model, lr=1e-3)
    assert "\n" not in str(caught.value)


def test_a_pair_split_over_groups_is_refused():
    model = adapted()
    parts = [[p for n, p in model.named_parameters() if part in n] for part in ("_A.", "_B.")]
    groups = [{"params": part} for part in parts]
    with pytest.raises(ValueError, match=r"q_proj\.lora\.default' is split over param groups"):
        qo.QuotientAdam(groups, symmetries=find_trained_pairs(model))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be"),
        ({"lr": 1e-3, "lora_frame": "eigen"}, ValueError, "lora_frame must be"),
        ({"lr": 1e-3, "momentum": 0.9}, TypeError, "momentum"),
        ({"lr": 1e-3, "lora_polar": True}, TypeError, "no 'lora_polar'; use polar"),
        ({"lr": 1e-3, "symmetries": []}, TypeError, "no 'symmetries'; use QuotientAdam itself"),
        ({"lr": 1e-3, "optimizer_cls": torch.optim.AdamW}, TypeError, "must be QuotientAdam"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        create_quotient_optimizer(adapted(), **options)


@pytest.mark.parametrize("polar", [False, True])
def test_polar_reaches_the_pairs_in_every_frame(polar):
    options = create_quotient_optimizer(adapted(), lr=1e-3, polar=polar).defaults
    assert options["lora_polar"] is polar
    framed = {"lora_frame": "orthonormal", "polar": polar}
    options = create_quotient_optimizer(adapted(), lr=1e-3, **framed).defaults
    assert options["polar"] is polar
    assert options["lora_polar"] is False


def test_factors_of_other_layers_are_named_and_left_to_adamw():
    body = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "linear": nn.Linear(6, 7)})
    config = peft.LoraConfig(r=2, target_modules=["conv", "linear"])
    model = peft.get_peft_model(body, config)
    with pytest.warns(UserWarning, match=r"conv\.lora_A\.default\.weight' and 1 more"):
        optimizer = create_quotient_optimizer(model, lr=1e-3)
    assert [pair.name for pair in optimizer.symmetries.heads] == [
        "base_model.model.linear.lora.default"
    ]
    assert len(optimizer.symmetries.unrecognized) == 2


def test_it_works_with_the_trainer_and_resumes_bit_for_bit(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    data = [
        {"input_ids": tokens, "labels": tokens}
        for tokens in torch.randint(30, (64, 8), generator=torch.Generator().manual_seed(4))
    ]

    def trainer(folder, steps):
        model = adapted(task_type="CAUSAL_LM")
        optimizer = create_quotient_optimizer(model, lr=1e-2, weight_decay=0.0)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=8,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            save_steps=4,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
        )
        return transformers.Trainer(
            model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None)
        )

    straight = trainer("straight", 8)
    straight.train()
    rates = [row["learning_rate"] for row in straight.state.log_history if "loss" in row]
    assert len(set(rates)) > 4
    assert len(straight.optimizer.optimizer.symmetries.heads) == 4
    resumed = trainer("resumed", 8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert resumed.state.global_step == 8
    first, second = (peft.get_peft_model_state_dict(t.model) for t in (straight, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(value.any() for key, value in first.items() if "lora_B" in key)


def test_importing_it_imports_no_peft():
    code = "import sys, quotientopt.peft; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

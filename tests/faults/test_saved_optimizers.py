"""The state of an optimizer beside the weights that are dressed: moved, or left out, never kept."""

import pytest
import torch

import quotientopt as qo
from quotientopt.checkpoints import dress_checkpoint
from tests.symmetries.families import FAMILIES, transformers

STEPS = 6


def badly_scaled(model):
    """The same function from a start whose gauges have condition number 1000."""
    symmetries = qo.find_symmetries(model)
    generator = torch.Generator().manual_seed(0)
    element = symmetries.random_element(1000.0, generator=generator)
    symmetries.act_({name: g for name, g in element.items() if name != "residual"})


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, model.config.vocab_size, (4, 12), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def build():
    torch.manual_seed(5)
    model = FAMILIES["llama"].model().double()
    badly_scaled(model)
    return model


def load(path):
    package = transformers()
    return package.LlamaForCausalLM.from_pretrained(path, dtype=torch.float64)


OPTIMIZERS = {
    "quotient-adam": lambda model: qo.QuotientAdam(model, lr=3e-3),
    "named groups": lambda model: qo.QuotientAdam(
        [
            {"params": [(n, p) for n, p in model.named_parameters() if "norm" not in n]},
            {
                "params": [(n, p) for n, p in model.named_parameters() if "norm" in n],
                "weight_decay": 0.0,
            },
        ],
        lr=3e-3,
        symmetries=qo.find_symmetries(model),
    ),
    "quotient-sgd": lambda model: qo.QuotientSGD(model, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_a_dressed_checkpoint(tmp_path, name):
    make = OPTIMIZERS[name]
    model = build()
    optimizer = make(model)
    train(model, optimizer, STEPS, 0)
    model.save_pretrained(tmp_path / "run")
    torch.save(optimizer.state_dict(), tmp_path / "run" / "optimizer.pt")
    expected = train(model, optimizer, STEPS, 1)

    report = dress_checkpoint(tmp_path / "run", tmp_path / "dressed")
    assert (report.moved, report.left_out) == (("optimizer.pt",), ())

    def resumed(folder):
        again = load(tmp_path / "dressed")
        own = make(again)
        own.load_state_dict(torch.load(tmp_path / folder / "optimizer.pt", weights_only=True))
        losses = train(again, own, STEPS, 1)
        return max(abs(a - b) for a, b in zip(losses, expected, strict=True))

    print("moved:", resumed("dressed"), "as it was saved:", resumed("run"))
    # Transformers computes the loss, about four, in float32: one unit in its last place is 4.8e-7.
    assert resumed("dressed") < 5e-7
    assert resumed("run") > 1e-4


def save_run(folder, state, name="optimizer.pt"):
    model = build()
    model.save_pretrained(folder)
    torch.save(state(model), folder / name)


def adam_state(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 2, 0)
    return optimizer.state_dict()


def unframed_state(model):
    optimizer = qo.QuotientAdam(model, lr=1e-3, head_frame=None, residual_frame=None)
    train(model, optimizer, 2, 0)
    return optimizer.state_dict()


def unnamed_groups(model):
    parameters = list(model.parameters())
    optimizer = qo.QuotientAdam(
        [{"params": parameters[:1]}, {"params": parameters[1:]}],
        lr=1e-3,
        symmetries=qo.find_symmetries(model),
    )
    train(model, optimizer, 2, 0)
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("state", "name", "reason"),
    [
        (adam_state, "optimizer.pt", "depends on the gauge"),
        (adam_state, "optimizer.bin", "depends on the gauge"),
        (unframed_state, "optimizer.pt", "plain Adam"),
        (unnamed_groups, "optimizer.pt", "no names"),
        (lambda model: {"a": 1}, "optimizer_1.pt", "cannot be read as a state"),
    ],
    ids=["AdamW", "accelerate", "no frames", "no names", "damaged"],
)
def test_what_cannot_be_moved_is_left_out(tmp_path, state, name, reason):
    save_run(tmp_path / "run", state, name)
    (tmp_path / "run" / "rng_state.pth").write_bytes(b"kept")
    report = dress_checkpoint(tmp_path / "run", tmp_path / "dressed")
    assert report.moved == ()
    assert report.left_out[0].startswith(name)
    assert reason in report.left_out[0]
    assert f"left out: {name}" in str(report)
    assert not (tmp_path / "dressed" / name).exists()
    assert (tmp_path / "dressed" / "rng_state.pth").read_bytes() == b"kept"


def test_folders_of_states_are_left_out(tmp_path):
    build().save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "global_step7").mkdir()
    (tmp_path / "run" / "global_step7" / "rank_0_optim_states.pt").write_bytes(b"of DeepSpeed")
    report = dress_checkpoint(tmp_path / "run", tmp_path / "dressed")
    assert report.left_out[0].startswith("global_step7")
    assert not (tmp_path / "dressed" / "global_step7").exists()

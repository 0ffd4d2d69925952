"""Wrapped modules are seen through: compiled blocks, checkpointing, accelerate's regions."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from quotientopt import QuotientAdam
from quotientopt.symmetries import find_symmetries, fold_norms_
from tests.symmetries.architectures import small_gpt, small_gpt2, small_llama, tokens
from tests.symmetries.families import FAMILIES

TOLERANCE = 1e-10
MARKS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def compiled(module):
    return torch.compile(module, backend="eager")


def wrap_blocks_(model, wrap):
    """Wrap the entries of every list of a model."""
    for blocks in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for index, block in enumerate(blocks):
            blocks[index] = wrap(block)
    return model


def bare(name):
    for mark in MARKS:
        name = name.replace(mark, "")
    return name


def same(wrapped, model):
    """What is found in both is the same, under the wrapped model's own names of parameters."""
    found, expected = find_symmetries(wrapped), find_symmetries(model)
    assert [pair.name for pair in found.pairs] == [pair.name for pair in expected.pairs]
    for pair, other in zip(found.pairs, expected.pairs, strict=True):
        assert pair.group == other.group
        assert [bare(b.name) for b in pair.blocks] == [b.name for b in other.blocks]
    own = dict(wrapped.named_parameters())
    for block in [block for pair in found.pairs for block in pair.blocks]:
        assert own[block.name] is block.parameter
    assert {bare(name): axis for name, axis in found.residual.axes.items()} == dict(
        expected.residual.axes
    )
    assert all(own[name] is p for name, p in found.residual.parameters.items())
    assert found.residual.exact == expected.residual.exact
    assert found.residual.broken_by == tuple(map(bare, found.residual.broken_by))
    assert len(found.residual.broken_by) == len(expected.residual.broken_by)
    assert found.unrecognized == expected.unrecognized == ()
    return found


WRAPS = {"compiled": compiled, "checkpointed": checkpoint_wrapper}
WRAPS["both"] = lambda block: compiled(checkpoint_wrapper(block))
MODELS = {
    "gpt": small_gpt,
    "llama": small_llama,
    "gpt2": small_gpt2,
    "hf-llama": FAMILIES["llama"].model,
    "bert": FAMILIES["bert"].model,
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", MODELS)
def test_wrapped_blocks_keep_heads_and_stream(name, wrap):
    model = MODELS[name]()
    wrapped = wrap_blocks_(copy.deepcopy(model), WRAPS[wrap])
    assert any(mark in key for key, _ in wrapped.named_parameters() for mark in MARKS)
    same(wrapped, model)


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_model_and_a_wrapped_layer(wrap):
    model = small_gpt()
    same(WRAPS[wrap](copy.deepcopy(model)), model)
    wrapped = copy.deepcopy(model)
    attention = wrapped.blocks[0].attention
    wrapped.blocks[0].attention = WRAPS[wrap](attention)
    attention.query = WRAPS[wrap](attention.query)
    same(wrapped, model)


def test_claims_of_wrapped_models_are_exact():
    wrapped = wrap_blocks_(small_gpt().double(), checkpoint_wrapper)
    result = find_symmetries(wrapped).verify(wrapped, tokens(), cond=100.0)
    assert "residual" in result
    assert max(result.values()) <= TOLERANCE, result


def test_wrapped_models_fold():
    model = small_llama().double()
    wrapped = wrap_blocks_(model, checkpoint_wrapper)
    with torch.no_grad():
        before = wrapped(tokens())
        symmetries = fold_norms_(wrapped)
        assert symmetries.residual.exact
        assert (wrapped(tokens()) - before).abs().max() <= TOLERANCE * before.abs().max()


def test_a_compiled_model_trains_like_the_model():
    torch.manual_seed(0)
    model = small_gpt().double()
    wrapped = wrap_blocks_(copy.deepcopy(model), compiled)
    losses = []
    for candidate in (model, wrapped):
        optimizer = QuotientAdam(candidate, lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            loss = candidate(tokens()).logsumexp(-1).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) <= TOLERANCE * abs(losses[0])


class Other(nn.Module):
    """A wrapper that nobody knows, with a module of its own inside."""

    def __init__(self, inner):
        super().__init__()
        self._inner = inner

    def forward(self, *arguments):
        return 2 * self._inner(*arguments)


def test_other_wrappers_are_not_seen_through():
    model = wrap_blocks_(small_gpt(), Other)
    assert find_symmetries(model).residual is None


def test_accelerate():
    accelerate = pytest.importorskip(
        "accelerate", reason="needs accelerate: pip install accelerate"
    )
    model = small_gpt2()
    regions = accelerate.utils.compile_regions(copy.deepcopy(model), backend="eager")
    assert any("_orig_mod." in name for name, _ in regions.named_parameters())
    same(regions, model)
    for precision in ("no", "bf16"):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        same(accelerator.prepare(copy.deepcopy(model)), model)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

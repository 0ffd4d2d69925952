"""verify leaves the model as it was, whatever happens, and refuses what it cannot judge."""

import math

import pytest
import torch
from torch import nn

from quotientopt.groups import GL
from quotientopt.symmetries import Block, HeadSymmetry, SymmetryMap, find_symmetries
from tests.symmetries.architectures import WIDTH, attention, small_gpt, small_gpt2, tokens, values


class Stateful(nn.Module):
    """Counts calls, keeps statistics and a cache, as some models do."""

    def __init__(self, fail=False):
        super().__init__()
        self.attention = attention()[0]
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.fail = fail
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.ones(1).expand(WIDTH))
        self.register_buffer("last", None)

    def forward(self, x):
        self.calls += 1
        self.last = x
        if self.fail:
            raise RuntimeError("no forward")
        assert not self.training
        noise = 1 + torch.rand(1)
        x = self.attention(x, x, x)[0] * self.scale * noise
        return self.dropout(self.norm(x.transpose(0, 1)))


def snapshot(model):
    return {
        name: (tensor.data_ptr(), tensor.dtype, tensor.stride(), tensor.clone())
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def assert_same(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (*where, value) in before.items():
        assert where == list(after[name][:3])
        assert torch.equal(value, after[name][3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_everything_is_put_back(dtype):
    model = Stateful().to(dtype)
    model.norm.eval()
    model.attention.in_proj_bias.requires_grad_(False)
    model.attention.in_proj_weight.grad = torch.ones_like(model.attention.in_proj_weight)
    before, state = snapshot(model), torch.random.get_rng_state()
    result = find_symmetries(model).verify(model, values(WIDTH, 4, WIDTH))
    assert max(result.values()) < 1e-10
    assert_same(model, before)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert model.attention.training
    assert not model.norm.training
    assert not model.attention.in_proj_bias.requires_grad
    assert model.attention.in_proj_weight.grad.dtype == dtype
    assert model.last is None


def test_everything_is_put_back_after_an_error():
    model = Stateful(fail=True)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no forward"):
        find_symmetries(model).verify(model, values(WIDTH, 4, WIDTH))
    assert_same(model, before)
    assert model.training


def test_strided_parameters():
    model, inputs, _ = attention()
    model.in_proj_weight = nn.Parameter(model.in_proj_weight.detach().T.contiguous().T)
    symmetries = find_symmetries(model)
    assert not model.in_proj_weight.is_contiguous()
    assert max(symmetries.verify(model, *inputs).values()) < 1e-10


def test_arguments_are_not_changed():
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install transformers"
    )
    model = small_gpt2().eval()
    cache = transformers.DynamicCache(config=model.config)
    mask = torch.ones(2, 7, dtype=torch.long)
    symmetries = find_symmetries(model)
    options = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
    result = symmetries.verify(model, tokens(), labels=tokens(), **options)
    assert max(result.values()) < 1e-10
    assert cache.get_seq_length() == 0


def test_attention_weights_are_compared():
    model, inputs, _ = attention()
    model.out_proj.weight.data.zero_()
    model.out_proj.bias.data.zero_()
    qk = find_symmetries(model).heads[0]
    wrong = HeadSymmetry(qk.left_blocks[:1], qk.right_blocks, qk.group, "wrong")
    symmetries = SymmetryMap([wrong])
    assert symmetries.verify(model, *inputs)["wrong"] > 1e-3
    # Without them the outputs do not depend on the pair, and nothing is verified.
    assert math.isnan(symmetries.verify(model, *inputs, need_weights=False)["wrong"])


def test_outputs_that_cannot_be_compared():
    model, inputs, _ = attention()
    symmetries = find_symmetries(model)
    with pytest.raises(ValueError, match="not finite"):
        symmetries.verify(model, inputs[0] * float("nan"), *inputs[1:])
    gpt = small_gpt()
    gpt.forward = lambda x: x
    found = SymmetryMap(find_symmetries(small_gpt()).heads)
    with pytest.raises(ValueError, match="no parameter of this GPT"):
        found.verify(gpt, tokens())
    with pytest.raises(ValueError, match="no floating-point tensor"):
        SymmetryMap().verify(gpt, tokens())


def test_blocks_refuse_copies():
    layer = nn.Linear(6, 4)
    with pytest.raises(ValueError, match="not a view"):
        Block.of(layer.weight.view(2, 2, 6).clone())
    with pytest.raises(ValueError, match="copy"):
        Block.of(layer.weight.detach().view(2, 2, 6).clone(), layer.weight, "weight")
    with pytest.raises(ValueError, match="shape"):
        Block.of(layer.weight.view(2, 2, 2, 3))


def test_head_symmetry_refuses_what_does_not_fit():
    layer = nn.Linear(6, 4)
    weight, bias = layer.weight.view(2, 2, 6), layer.bias.view(2, 2)
    with pytest.raises(ValueError, match="same heads and rows"):
        HeadSymmetry([weight], [layer.weight.view(1, 4, 6)], GL(2), "pair")
    with pytest.raises(ValueError, match="does not act"):
        HeadSymmetry([weight], [weight], GL(3), "pair")
    with pytest.raises(ValueError, match="full row rank"):
        HeadSymmetry([weight], [bias], GL(2), "pair")
    with pytest.raises(ValueError, match="shape"):
        HeadSymmetry([weight], [weight], GL(2), "pair").act_(torch.eye(2))


def test_acting_on_a_model_whose_tensors_were_replaced_is_refused():
    model = small_gpt()
    symmetries = find_symmetries(model)
    element = symmetries.random_element(generator=torch.Generator().manual_seed(0))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="no parameter of this GPT"):
        symmetries.act_(element, model=model)
    assert all(map(torch.equal, before, model.parameters()))
    find_symmetries(model).act_(element, model=model)
    assert not all(map(torch.equal, before, model.parameters()))


def test_elements_that_overflow_float16_are_refused():
    model = small_gpt().half()
    symmetries = find_symmetries(model)
    name = symmetries.heads[0].name
    identity = torch.eye(symmetries.heads[0].rank, dtype=torch.float64)
    element = {name: 1e7 * identity.expand(symmetries.heads[0].heads, -1, -1)}
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"does not fit torch.float16; convert"):
        symmetries.act_(element)
    assert all(map(torch.equal, before, model.parameters()))
    wide = small_gpt().float()
    find_symmetries(wide).act_(element)
    assert all(parameter.isfinite().all() for parameter in wide.parameters())

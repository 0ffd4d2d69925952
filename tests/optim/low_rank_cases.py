"""LoRA pairs by hand, for tests of optimizers: a small regression without peft."""

from __future__ import annotations

import torch
from torch import nn

from quotientopt.groups import GL
from quotientopt.symmetries import Block, HeadSymmetry, SymmetryMap

# (in, out, rank); two of a kind so that there is something to stack.
SHAPES = ((12, 10, 3), (12, 10, 3), (10, 14, 3), (12, 12, 4))


class Adapted(nn.Module):
    """Frozen linear maps, each with a low-rank pair, and a trained bias."""

    def __init__(self, seed=0, dtype=torch.float64, start="zero", shapes=SHAPES):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.base = [normal(out, width) / width**0.5 for width, out, _ in shapes]
        self.lora_A = nn.ParameterList([nn.Parameter(normal(r, w) / w**0.5) for w, _, r in shapes])
        zero = 0.0 if start == "zero" else 0.3
        self.lora_B = nn.ParameterList([nn.Parameter(zero * normal(o, r)) for _, o, r in shapes])
        self.bias = nn.Parameter(torch.zeros(shapes[0][1], dtype=dtype))

    def forward(self, data):
        outputs = [
            x @ (W + B @ A).T
            for x, W, A, B in zip(data, self.base, self.lora_A, self.lora_B, strict=True)
        ]
        outputs[0] = outputs[0] + self.bias
        return outputs


def symmetries_of(model):
    """The pairs as the adapter of peft names them."""
    heads = []
    for i, (A, B) in enumerate(zip(model.lora_A, model.lora_B, strict=True)):
        left = Block.of(B.detach().mT.unsqueeze(0), B, f"layers.{i}.lora_B.default.weight")
        right = Block.of(A.detach().unsqueeze(0), A, f"layers.{i}.lora_A.default.weight")
        heads.append(HeadSymmetry([left], [right], GL(A.size(0)), f"layers.{i}.lora.default"))
    return SymmetryMap(heads)


def loss_of(model, generator, size=32):
    """Regression onto outputs of other weights; the inputs' scales differ, as gradients' do."""
    dtype = model.bias.dtype
    data, targets = [], []
    for i, W in enumerate(model.base):
        x = torch.randn(size, W.size(1), generator=generator, dtype=torch.float64)
        x = x * torch.logspace(0, -1, W.size(1), dtype=torch.float64)
        data.append(x.to(dtype))
        targets.append(torch.tanh((2 + i) * data[-1] @ W.T.flip(0)))
    outputs = model(data)
    return sum((y - t).square().mean() for y, t in zip(outputs, targets, strict=True))


def train(model, optimizer, steps, seed=1, after=None):
    """Losses of some steps, in float64."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, generator)
        loss.backward()
        if after is not None:
            after(model)
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)

"""Small language models in training, for tests of optimizers."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn
from torch.nn import functional

import quotientopt as qo
from quotientopt.models import reference_model

VOCABULARY, CONTEXT = 32, 16
# From this step on frames last ten steps, and covariances take every second gradient.
GROWN = 80
EXPERTS = 3


def small_model(name="gpt", seed=0, dtype=torch.float64, **options):
    """A reference model of width 32 with 4 heads."""
    options = {"layers": 2, "width": 32, "heads": 4, "context": CONTEXT} | options
    return reference_model(name, seed, vocabulary=VOCABULARY, **options).to(dtype)


class Experts(nn.Module):
    """Small MLPs in two parameters, as transformers keeps them, mixed by a router."""

    def __init__(self, width, hidden, transposed=False):
        super().__init__()
        self.router = nn.Linear(width, EXPERTS, bias=False)
        self.transposed = transposed
        shapes = [(EXPERTS, hidden, width), (EXPERTS, width, hidden)]
        self.up, self.down = (
            nn.Parameter(torch.randn(s[0], *(s[:0:-1] if transposed else s[1:])) / s[2] ** 0.5)
            for s in shapes
        )

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        up, down = (w.mT if self.transposed else w for w in (self.up, self.down))
        hidden = functional.silu(torch.einsum("...d,ehd->...eh", x, up))
        return torch.einsum("...eh,edh,...e->...d", hidden, down, weights)


def random_gains_(model, seed=0):
    """Gains that differ from one, so that folding has something to fold."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.copy_(0.5 + noise)
                assert "norm" in name
    return model


def batches(steps, seed=1, size=8):
    """Token sequences with some structure to learn: noisy repetition."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        start = torch.randint(VOCABULARY, (size, 1), generator=generator)
        stride = torch.randint(1, 4, (size, 1), generator=generator)
        yield (start + stride * torch.arange(CONTEXT + 1)) % VOCABULARY


def loss_of(model, tokens):
    """Cross-entropy of the next token."""
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model, optimizer, steps, seed=1):
    """Losses of ``steps`` steps."""
    losses = []
    for tokens in batches(steps, seed):
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def random_heads_and_rotation(symmetries, *, cond=10.0, generator=None):
    """The linear parts of a random element that act on heads and the residual stream."""
    element = symmetries.random_element(cond=cond, generator=generator)
    names = {*(symmetry.name for symmetry in symmetries.heads), "residual"}
    return {name: g for name, g in element.items() if name in names}


def twin_of(model, *, cond, seed=2, only=None):
    """A copy of the model moved by a random element of its structure group, and that element."""
    twin = copy.deepcopy(model)
    symmetries = qo.find_symmetries(twin)
    generator = torch.Generator().manual_seed(seed)
    element = random_heads_and_rotation(symmetries, cond=cond, generator=generator)
    if only is not None:
        element = {name: g for name, g in element.items() if only(name)}
    symmetries.act_(element)
    return twin, element


def in_two_axes_alone(found):
    """Symmetries as version 0.2.0 used them: what has more than two axes was AdamW's."""
    stream = found.residual
    kept = {n: p for n, p in stream.parameters.items() if p.ndim <= 2}
    axes = {name: axis for name, axis in stream.axes.items() if name in kept}
    return qo.SymmetryMap(found.heads, dataclasses.replace(stream, axes=axes, parameters=kept))

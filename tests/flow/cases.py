"""Attentions with few parameters and gentle curvature, for flows."""

import torch

import quotientopt as qo
from quotientopt.models import Attention


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def attention(heads=2, width=6, seed=0, scale=1.0, **options):
    """An attention in float64 with weights of its own."""
    torch.manual_seed(seed)
    model = Attention(width, heads, **options).double()
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(scale * width**-0.5 * randn(*parameter.shape, seed=10 * seed + k))
    return model


class Regression:
    """Mean squared error to the outputs of another attention, on one fixed batch."""

    def __init__(self, width=6, length=5, batch=4, **options):
        self.inputs = randn(batch, length, width, seed=50)
        with torch.no_grad():
            self.targets = attention(width=width, seed=7, scale=1.3, **options)(self.inputs)

    def __call__(self, model):
        return (model(self.inputs) - self.targets).square().mean(dim=(0, 1)).sum()


def setting(**options):
    return attention(**options), Regression(**options)


def heads_of(model):
    return qo.find_symmetries(model).heads


def train(model, loss, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


SETTINGS = {
    "plain": {},
    "rotary": {"rotary": True, "width": 8},
    "grouped": {"heads": 4, "key_value_heads": 2, "width": 8},
    "grouped rotary": {"heads": 4, "key_value_heads": 2, "width": 16, "rotary": True},
}

"""Noether's charges of every head: gradient flow conserves them, SGD nearly, Adam does not."""

import argparse
import copy

import torch
from torch.nn import functional

import quotientopt as qo
from quotientopt.models import reference_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50)
steps = parser.parse_args().steps

torch.manual_seed(0)
start = reference_model("gpt", layers=1, width=32).double()
tokens = torch.randint(256, (8, 33))
optimizers = {
    "SGD, rate 1e-1": lambda p: torch.optim.SGD(p, lr=1e-1),
    "SGD, rate 1e-2": lambda p: torch.optim.SGD(p, lr=1e-2),
    "Adam, rate 1e-3": lambda p: torch.optim.Adam(p, lr=1e-3),
}
for name, make in optimizers.items():
    model = copy.deepcopy(start)
    optimizer = make(model.parameters())
    with qo.ChargeLog(model, optimizer) as log:
        for _ in range(steps):
            loss = functional.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    drift = log.records[-1].drift
    print(f"{name}: loss {loss:.3f}, charges drifted by", end=" ")
    print(", ".join(f"{value:.0e} ({symmetry})" for symmetry, value in drift.items()))

"""A Transformer whose classes nobody knows: symmetries found from gradients, proved, and used."""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import quotientopt as qo

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
steps = parser.parse_args().steps


class Block(nn.Module):
    """One fused projection for queries, keys and values; norm, attention, gated MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Causal self-attention and MLP, both added to x."""
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Mine(nn.Module):
    """Bytes in, logits out."""

    def __init__(self, width: int = 48, heads: int = 4, layers: int = 2, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the next byte."""
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


torch.manual_seed(0)
text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
model = Mine()
example = text[:64].view(2, 32)

symmetries = qo.find_symmetries(model, example)
print(symmetries)
worst = max(symmetries.verify(model, example).values())
print(f"acting with random group elements moves the outputs by {worst:.0e}, in float64")

optimizer = qo.QuotientAdam(model, lr=2e-3, symmetries=symmetries)
for _ in range(steps):
    batch = text[torch.randint(len(text) - 65, (8, 1)) + torch.arange(65)]
    loss = functional.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"{loss.item():.2f} nats per byte after {steps} steps")

"""Transformers as their users write them: no class that anybody knows, every layout they choose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, relu, rms_norm, silu

from quotientopt.groups import (
    GL,
    O,
    PlaneCommutant,
    RotaryCommutant,
    RotaryPhases,
    Scale,
    StructureGroup,
    commutant_of,
)

VOCABULARY, TOKENS = 30, 9


@dataclass(frozen=True)
class Plan:
    """One way to write an attention and an MLP.

    Attributes
    ----------
    layout : str
        ``"separate"``; ``"fused"`` [q k v]; ``"per head"``: q of a group, k and v of its head, head
        by head; ``"transposed"``: x @ W; ``"einsum"``: W of shape (heads, d, r); ``"key value"``:
        queries alone, [k v] fused.
    heads, shared, rank : int
        Query heads, key-value heads, rows of a head.
    strided : bool
        Query head m of key head j is number m·shared + j instead of j·group + m.
    rows_first : bool
        Heads are cut by ``view(r, heads)`` instead of ``view(heads, r)``.
    bias : bool
    positions : str
        ``"none"``, ``"half"``, ``"interleaved"``, ``"relative"``.
    rotated : int
        Rotated rows.
    tail : bool
        The last rows of a head are rotated instead of the first.
    periods : str
        Of the planes: ``"distinct"``; ``"repeated"``: two and two; ``"opposite"``: two and two that
        turn in opposite directions; ``"stopped"``: every third one does not turn; ``"one"``.
    norm : str
        Of queries and keys: ``"none"``, ``"rms"``, ``"unit"``, ``"gain"``.
    extra : str
        ``"none"``, or what is done to the heads: ``"gate"``, ``"tanh"``, ``"sink"``,
        ``"temperature"``, ``"head gate"``, ``"soft cap"``, ``"same"`` (W_K is W_Q).
    mlp : str
        ``"gelu"``, ``"relu"``, ``"swiglu"``, ``"linear"``.
    layer_norm : bool
    """

    layout: str = "separate"
    heads: int = 4
    shared: int = 4
    rank: int = 4
    strided: bool = False
    rows_first: bool = False
    bias: bool = False
    positions: str = "none"
    rotated: int = 4
    tail: bool = False
    periods: str = "distinct"
    norm: str = "none"
    extra: str = "none"
    mlp: str = "gelu"
    layer_norm: bool = True

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.shared

    def planes(self) -> list[tuple[int, int]]:
        """Rotated planes."""
        first = self.rank - self.rotated if self.tail else 0
        planes = RotaryCommutant(self.rotated, layout=self.positions).planes
        return [(i + first, j + first) for i, j in planes]

    def frequencies(self) -> list[float]:
        """Those of the planes."""
        count = self.rotated // 2
        distinct = [10.0 ** -(k / count) for k in range(count)]
        if self.periods == "one":
            return distinct[:1] * count
        if self.periods == "stopped":
            return [0.0 if k % 3 == 1 else distinct[k] for k in range(count)]
        if self.periods == "repeated":
            return [distinct[k // 2] for k in range(count)]
        if self.periods == "opposite":
            return [distinct[k // 2] * (-1) ** k for k in range(count)]
        return distinct

    def scores_group(self) -> StructureGroup | None:
        """The group of queries and keys."""
        rotary = self.positions in ("half", "interleaved")
        if self.extra == "same" or self.norm == "gain":
            return None
        if self.norm != "none":
            if rotary:
                commutant = commutant_of(self.rank, self.planes(), self.frequencies())
                if isinstance(commutant, PlaneCommutant):
                    return RotaryPhases.of(commutant)
                return RotaryPhases(self.rank, self.rotated, self.positions)
            return O(self.rank)
        if rotary:
            return commutant_of(self.rank, self.planes(), self.frequencies())
        return GL(self.rank)

    def values_group(self) -> StructureGroup | None:
        """The group of values and outputs."""
        return None if self.extra in ("gate", "tanh") else GL(self.rank)

    def units_group(self) -> StructureGroup | None:
        """The group of every hidden unit."""
        return {"relu": Scale(1), "swiglu": GL(1)}.get(self.mlp)

    def key_bias_is_free(self) -> bool:
        """Whether softmax drops the bias of the keys."""
        free = self.positions in ("none", "relative") and self.norm == "none"
        return self.bias and free and self.extra not in ("sink", "soft cap", "same")

    def value_bias_is_free(self) -> bool:
        """Whether the output bias can take the bias of the values."""
        return self.bias and self.extra not in ("sink", "gate", "tanh", "head gate")


class Mixer(nn.Module):
    """What its author did not call attention."""

    def __init__(self, plan: Plan, width: int) -> None:
        super().__init__()
        self.plan, self.width = plan, width
        q, k = plan.heads * plan.rank, plan.shared * plan.rank
        bias = plan.bias
        if plan.layout == "separate":
            self.a, self.b, self.c = (nn.Linear(width, n, bias=bias) for n in (q, k, k))
        elif plan.layout in ("fused", "per head"):
            self.all = nn.Linear(width, q + 2 * k, bias=bias)
        elif plan.layout == "key value":
            self.a, self.bc = nn.Linear(width, q, bias=bias), nn.Linear(width, 2 * k, bias=bias)
        elif plan.layout == "transposed":
            for name, n in (("a", q), ("b", k), ("c", k)):
                setattr(self, f"w_{name}", nn.Parameter(torch.randn(width, n) / 4))
                if bias:
                    setattr(self, f"b_{name}", nn.Parameter(torch.randn(n)))
        else:
            for name, n in (("a", plan.heads), ("b", plan.shared), ("c", plan.shared)):
                setattr(self, f"w_{name}", nn.Parameter(torch.randn(n, width, plan.rank) / 4))
                if bias:
                    setattr(self, f"b_{name}", nn.Parameter(torch.randn(n, plan.rank)))
        self.back = nn.Linear(q, width, bias=bias)
        if plan.norm == "gain":
            self.gain_a, self.gain_b = (nn.Parameter(torch.rand(plan.rank) + 0.5) for _ in "ab")
        if plan.extra in ("gate", "head gate"):
            self.gate = nn.Linear(width, q if plan.extra == "gate" else plan.heads)
        if plan.extra == "sink":
            self.sink = nn.Parameter(torch.randn(plan.heads))
        if plan.extra == "temperature":
            self.temperature = nn.Parameter(torch.rand(plan.heads) + 0.5)
        if plan.positions == "relative":
            self.distances = nn.Parameter(torch.randn(plan.heads, 2 * TOKENS))

    def heads_of(self, x: Tensor, count: int) -> Tensor:
        """(batch, heads, tokens, r)."""
        if self.plan.rows_first:
            return x.unflatten(-1, (self.plan.rank, count)).permute(0, 3, 1, 2)
        return x.unflatten(-1, (count, self.plan.rank)).transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plan = self.plan
        counts = (plan.heads, plan.shared, plan.shared)
        if plan.layout == "separate":
            parts = [self.a(x), self.b(x), self.c(x)]
        elif plan.layout == "fused":
            parts = list(self.all(x).split([n * plan.rank for n in counts], -1))
        elif plan.layout == "key value":
            parts = [self.a(x), *self.bc(x).chunk(2, -1)]
        elif plan.layout == "transposed":
            parts = [x @ getattr(self, f"w_{n}") for n in "abc"]
            if plan.bias:
                parts = [y + getattr(self, f"b_{n}") for y, n in zip(parts, "abc", strict=True)]
        elif plan.layout == "einsum":
            parts = [torch.einsum("btd,hdr->bhtr", x, getattr(self, f"w_{n}")) for n in "abc"]
            if plan.bias:
                biases = [getattr(self, f"b_{n}").unsqueeze(1) for n in "abc"]
                parts = [y + b for y, b in zip(parts, biases, strict=True)]
            return tuple(parts)
        else:
            y = self.all(x).unflatten(-1, (plan.shared, plan.group + 2, plan.rank))
            q, k, v = y.split([plan.group, 1, 1], -2)
            return tuple(z.flatten(-3, -2).transpose(1, 2) for z in (q, k, v))
        return tuple(self.heads_of(y, n) for y, n in zip(parts, counts, strict=True))

    def rotate(self, x: Tensor) -> Tensor:
        plan = self.plan
        if plan.positions not in ("half", "interleaved"):
            return x
        i, j = torch.tensor(plan.planes()).T
        frequencies = torch.tensor(plan.frequencies(), dtype=x.dtype)
        angle = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), frequencies)
        y = x.clone()
        y[..., i] = x[..., i] * angle.cos() - x[..., j] * angle.sin()
        y[..., j] = x[..., i] * angle.sin() + x[..., j] * angle.cos()
        return y

    def forward(self, x: Tensor) -> Tensor:
        plan = self.plan
        q, k, v = self.project(x)
        if plan.extra == "same":
            k = q[:, : plan.shared]
        if plan.norm in ("rms", "gain"):
            q, k = (rms_norm(z, (plan.rank,), eps=1e-6) for z in (q, k))
        if plan.norm == "unit":
            q, k = normalize(q, dim=-1) * 3, normalize(k, dim=-1)
        if plan.norm == "gain":
            q, k = q * self.gain_a, k * self.gain_b
        if plan.extra == "tanh":
            v = v.tanh()
        q, k = self.rotate(q), self.rotate(k)
        # Consecutive: query head j·group + m reads key head j; einsum's query heads likewise.
        repeat = torch.arange(plan.heads)
        repeat = repeat % plan.shared if plan.strided else repeat // plan.group
        k, v = k[:, repeat], v[:, repeat]
        scores = q @ k.mT / math.sqrt(plan.rank)
        length = x.shape[1]
        if plan.positions == "relative":
            at = torch.arange(length)
            scores = scores + self.distances[:, at[:, None] - at[None, :] + TOKENS]
        if plan.extra == "temperature":
            scores = scores * self.temperature[:, None, None]
        if plan.extra == "soft cap":
            scores = 4 * torch.tanh(scores / 4)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        if plan.extra == "sink":
            sink = self.sink[:, None, None].expand(len(x), -1, length, 1).to(scores)
            p = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            p = scores.softmax(-1)
        y = p @ v
        if plan.extra == "head gate":
            y = y * self.gate(x).sigmoid().mT.unsqueeze(-1)
        if plan.layout in ("einsum", "per head") or not plan.rows_first:
            y = y.transpose(1, 2).flatten(2)
        else:
            y = y.permute(0, 2, 3, 1).flatten(2)
        if plan.extra == "gate":
            y = y * self.gate(x).sigmoid()
        return self.back(y)


class Stuff(nn.Module):
    """An MLP."""

    def __init__(self, plan: Plan, width: int) -> None:
        super().__init__()
        self.kind = plan.mlp
        hidden = 14 if plan.mlp == "linear" else 22
        self.one = nn.Linear(width, hidden, bias=plan.bias)
        self.two = nn.Linear(hidden, width, bias=plan.bias)
        if plan.mlp == "swiglu":
            self.other = nn.Linear(width, hidden, bias=plan.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.two(silu(self.other(x)) * self.one(x))
        if self.kind == "linear":
            return self.two(self.one(x))
        return self.two(relu(self.one(x)) if self.kind == "relu" else gelu(self.one(x)))


class Step(nn.Module):
    """One layer."""

    def __init__(self, plan: Plan, width: int) -> None:
        super().__init__()
        norm = nn.LayerNorm if plan.layer_norm else nn.RMSNorm
        self.n1, self.n2 = norm(width), norm(width)
        self.mixer, self.stuff = Mixer(plan, width), Stuff(plan, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.n1(x))
        return x + self.stuff(self.n2(x))


class Stranger(nn.Module):
    """A language model of somebody's own."""

    def __init__(self, plan: Plan, layers: int = 2, width: int = 20, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.table = nn.Embedding(VOCABULARY, width)
            self.places = nn.Parameter(torch.randn(TOKENS, width))
            self.steps = nn.ModuleList(Step(plan, width) for _ in range(layers))
            self.last = nn.LayerNorm(width)
            self.out = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.places[: tokens.shape[1]]
        for step in self.steps:
            x = step(x)
        return self.out(self.last(x))


def tokens(batch: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (batch, TOKENS), generator=torch.Generator().manual_seed(5))

"""What all optimizers of the LoRA benchmark share."""

from __future__ import annotations

from dataclasses import dataclass

from quotientopt.compare.protocol import Protocol


@dataclass(frozen=True)
class LoraProtocol(Protocol):
    """A comparison's protocol, with what adapters add to it.

    Attributes
    ----------
    rank, alpha : int
        Of every adapter; its product is scaled by alpha / rank.
    beta1, beta2 : float
        Of every optimizer with two moments.
    head_rate : float
        Peak learning rate of AdamW on the head; the same whatever trains the adapters.
    autocast : bool
        Whether the model runs under autocast to bfloat16; weights, gradients and optimizers are
        float32 either way.
    """

    longest_warmup: int = 20
    weight_decay: float = 0.0
    rank: int = 8
    alpha: int = 16
    beta1: float = 0.9
    beta2: float = 0.999
    head_rate: float = 3e-3
    autocast: bool = True

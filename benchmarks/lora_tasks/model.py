"""An encoder with adapters, and the head that reads it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_tasks.batches import IGNORED, Batch
from lora_tasks.protocol import LoraProtocol
from lora_tasks.tasks import CLASSES, REPLIES, Task


class Adapted(nn.Module):
    """A frozen encoder with LoRA adapters, and a head.

    Attributes
    ----------
    encoder : PeftModel
    head : Linear
        Trained on the mean of the hidden states; for replies the model's own, frozen.
    """

    def __init__(self, task: Task, protocol: LoraProtocol, seed: int) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__()
        self.kind = task.kind
        self.autocast = protocol.autocast
        config = LoraConfig(
            r=protocol.rank,
            lora_alpha=protocol.alpha,
            lora_dropout=0.0,
            target_modules=list(task.matrices),
        )
        torch.manual_seed(seed)
        self.encoder = get_peft_model(copy.deepcopy(task.encoder), config)
        self.head = task.output
        if self.head is None:
            self.head = nn.Linear(self.encoder.config.hidden_size, task.outputs)

    def predictions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs of the head and their targets, one row each."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            states = self.encoder(input_ids=batch.tokens, attention_mask=batch.mask)
            hidden = states.last_hidden_state
            if self.kind == REPLIES:
                wanted = batch.targets != IGNORED
                return self.head(hidden[wanted]).float(), batch.targets[wanted]
        there = batch.mask.unsqueeze(-1).float()
        return self.head((hidden.float() * there).sum(1) / there.sum(1)), batch.targets

    def losses(self, batch: Batch) -> Tensor:
        """Loss of every prediction in `batch`."""
        outputs, targets = self.predictions(batch)
        if self.kind in (CLASSES, REPLIES):
            return functional.cross_entropy(outputs, targets, reduction="none")
        return (outputs.squeeze(-1) - targets).square()

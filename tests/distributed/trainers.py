"""Training as users' trainers do it, on several processes."""

import contextlib
import functools

import torch
import torch.distributed as dist
from torch import nn

from quotientopt import QuotientAdam

from .models import batches, gpt, gpt2, layers_of, lora, loss_of, part_of, train, whole


@contextlib.contextmanager
def accelerate_shards_on_cpus():
    """accelerate uses its FSDP plugin on accelerators alone: here on CPUs as well."""
    from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

    ordinary = AcceleratorState.__init__

    def with_plugin(self, *arguments, fsdp_plugin=None, **options):
        ordinary(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_plugin
    try:
        yield
    finally:
        AcceleratorState.__init__ = ordinary
        for kind in (AcceleratorState, GradientState, PartialState):
            kind._reset_state()


def accelerator_of(model):
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    kinds = {type(layer) for layer in layers_of(model)}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=policy)
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def accelerated(name):
    """accelerate's FSDP2, which shards the model after its optimizer was made."""
    make = {"gpt": gpt, "gpt2": gpt2, "lora": lora}[name]
    data = batches(6)
    alone = make()
    expected = train(alone, QuotientAdam(alone, lr=5e-3), data)
    with accelerate_shards_on_cpus():
        model = make()
        optimizer = QuotientAdam(model, lr=5e-3)
        accelerator = accelerator_of(model)
        model, optimizer = accelerator.prepare(model, optimizer)
        losses = []
        for tokens in data:
            loss = loss_of(model, part_of(tokens, "fsdp"))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            value = loss.detach()
            dist.all_reduce(value)
            losses.append(float(value) / dist.get_world_size())
    sharded = sum(hasattr(p, "full_tensor") for p in model.parameters())
    return max(abs(a - b) for a, b in zip(expected, losses, strict=True)), sharded

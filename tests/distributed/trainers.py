"""Training as users' trainers do it, on several processes."""

import argparse
import contextlib
import functools
import inspect

import torch
import torch.distributed as dist

from quotientopt import QuotientAdam
from quotientopt.integrations import for_trainer

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
    expected = train(alone, QuotientAdam(alone, lr=1.25e-3), data)
    with accelerate_shards_on_cpus():
        model = make()
        optimizer = QuotientAdam(model, lr=1.25e-3)
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


class Text(torch.utils.data.Dataset):
    """Bytes of the standard library, in pieces."""

    def __init__(self, length=32, pieces=64):
        text = inspect.getsource(argparse).encode()[: length * pieces]
        self.pieces = torch.tensor(list(text)).view(pieces, length)

    def __len__(self):
        return len(self.pieces)

    def __getitem__(self, index):
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def hugging_face(folder, way, resume):
    """transformers' Trainer over 8 steps, saved at the fourth; the losses and weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=32, n_embd=32, n_layer=3, n_head=2, tie_word_embeddings=False
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config.bos_token_id = config.eos_token_id = 0
    model = GPT2LMHeadModel(config)
    sharded = {}
    if way == "fsdp":
        wrapped = {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["GPT2Block"],
            "state_dict_type": "SHARDED_STATE_DICT",
        }
        sharded = {"fsdp": "full_shard auto_wrap", "fsdp_config": wrapped}
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        per_device_train_batch_size=4 // dist.get_world_size() if dist.is_initialized() else 4,
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        **sharded,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Text(),
        optimizer_cls_and_kwargs=(for_trainer, {"lr": 1.25e-3, "max_grad_norm": 1.0}),
    )
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-4" if resume else None)
    log = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    weights = [whole(p).detach().clone() for p in trainer.model.parameters()]
    inner = trainer.optimizer.optimizer
    return log, weights, len(inner.symmetries.heads), inner._sharded is not None


def resumed(folder, way):
    """Uninterrupted and resumed, in one folder."""
    context = accelerate_shards_on_cpus if way == "fsdp" else contextlib.nullcontext
    found = []
    for again in (False, True):
        with context():
            found.append(hugging_face(folder, way, again))
        dist.barrier()
    (log, weights, heads, sharded), (later, others, _, _) = found
    equal = all(map(torch.equal, weights, others))
    return (
        [log[step] for step in range(1, 9)],
        [later[s] for s in range(5, 9)],
        equal,
        heads,
        sharded,
    )

"""Small models in float64, their data, and the ways to shard them."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional

from quotientopt.models import GPT

WORDS = 48


def gpt():
    return GPT(WORDS, 3, 32, 2, 8, generator=torch.Generator().manual_seed(0)).double()


def wordy():
    """Layers that are less together than the embedding, which a process has alone."""
    model = GPT(6000, 3, 32, 2, 8, generator=torch.Generator().manual_seed(0)).double()
    model.head.requires_grad_(False)
    return model


def llama(gains=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    # Those of transformers compute in float32, whose rounding would hide all else.
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, nn.RMSNorm(32, eps=1e-6))
    return model.double()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=16,
        n_embd=32,
        n_layer=3,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    return model


def lora(rank=4):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(llama(), config).double()


MODELS = {
    "gpt": gpt,
    "wordy": wordy,
    "llama": llama,
    "gpt2": gpt2,
    "lora": lora,
    "thin": lambda: lora(1),
}


def layers_of(model):
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == 3:
            return module
    raise AssertionError("no layers")


def shard(model, way):
    """Shard a model in place: ``fsdp``, ``tp``, ``both`` on a mesh of two axes, ``hybrid``."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    if way in ("both", "hybrid"):
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "model"))
    if way in ("tp", "both"):
        split(model, mesh if way == "tp" else mesh["model"])
    if way == "tp":
        return
    data = mesh["data"] if way == "both" else mesh
    for layer in layers_of(model):
        fully_shard(layer, mesh=data)
    fully_shard(model, mesh=data)


def split(model, mesh):
    """Whole heads on every process: q, k, v by columns, o by rows."""
    plan = {
        f"self_attn.{name}_proj": RowwiseParallel() if name == "o" else ColwiseParallel()
        for name in "qkvo"
    }
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan["mlp.down_proj"] = RowwiseParallel()
    for layer in layers_of(model):
        parallelize_module(layer, mesh, plan)


def batches(steps, size=4):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(WORDS, (steps, size, 9), generator=generator)


def loss_of(model, tokens):
    out = model(tokens[:, :-1])
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def part_of(tokens, way):
    """This process's part of a batch; all of it where processes only split the model."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if way == "tp":
        return tokens
    if way == "both":
        return tokens.chunk(2)[rank // (size // 2)]
    return tokens.chunk(size)[rank]


def train(model, optimizer, data, way=None, parts=1):
    """The losses of one run, of whole batches; their gradients are added up from ``parts``."""
    losses = []
    for tokens in data:
        own = tokens if way is None else part_of(tokens, way)
        value = torch.zeros((), dtype=next(model.parameters()).dtype)
        for part in own.chunk(parts):
            loss = loss_of(model, part) / parts
            loss.backward()
            value += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if way not in (None, "tp"):
            dist.all_reduce(value)
            value = value / dist.get_world_size()
        losses.append(float(value))
    return losses


def state_size(optimizer):
    """Elements of the state on this process."""
    return sum(
        local(value).numel()
        for own in optimizer.state.values()
        for value in own.values()
        if value.ndim
    )


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

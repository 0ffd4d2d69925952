"""What wrappers other than FSDP2 get to hear."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import quotientopt as qo

from .models import batches, gpt, loss_of, shard


def message(function):
    try:
        function()
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing was refused"


def fsdp1(original):
    model = gpt()
    symmetries = qo.find_symmetries(model)
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=original, device_id=torch.device("cpu")
    )
    return [
        message(lambda: qo.QuotientAdam(wrapped)),
        message(lambda: qo.QuotientAdam(wrapped.parameters(), symmetries=symmetries)),
        message(lambda: qo.QuotientAdam(wrapped.parameters(), symmetries=())),
        message(lambda: qo.QuotientSGD(wrapped, lr=1.0)),
        message(lambda: qo.find_symmetries(wrapped)),
    ]


def fsdp1_later():
    """The optimizer is older than the wrapper."""
    model = gpt()
    optimizer = qo.QuotientAdam(model)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    loss_of(wrapped, batches(1)[0]).backward()
    return [message(optimizer.step)]


def zero_redundancy():
    model = gpt()
    symmetries = qo.find_symmetries(model)

    def make(kind):
        options = {"symmetries": symmetries, "lr": 0.1}
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, **options)

    return [message(lambda: make(qo.QuotientAdam)), message(lambda: make(qo.QuotientSGD))]


def of_sharded_models():
    model = gpt()
    shard(model, "fsdp")
    symmetries = qo.find_symmetries(model)
    element = symmetries.random_element()
    optimizer = qo.QuotientAdam(model)
    before = [p.to_local().clone() for p in model.parameters()]
    tokens = batches(1)[0]
    messages = [
        message(lambda: symmetries.act_(element)),
        message(lambda: symmetries.heads[0].act_(element[symmetries.heads[0].name])),
        message(lambda: symmetries.residual.act_(element["residual"])),
        message(lambda: symmetries.verify(model, tokens)),
        message(symmetries.redundancy),
        message(lambda: optimizer.move_state_(element)),
        message(lambda: qo.dress_(model)),
        message(lambda: qo.invariants(model)),
        message(lambda: qo.fold_norms_(model)),
        message(lambda: qo.find_symmetries(model, tokens)),
        message(lambda: qo.QuotientSGD(model, lr=1.0)),
        message(lambda: qo.invariant_grad_norm(model)),
        message(lambda: qo.QuotientAdam(model, residual_frame="shared")),
        message(lambda: qo.QuotientAdam(model, capturable=True)),
    ]
    for p, own in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.to_local(), own)
    try:
        optimizer.__getstate__()
    except TypeError as error:
        messages.append(str(error))
    return messages


def data_parallel():
    """DDP is ordinary: every process steps all."""
    model = DistributedDataParallel(gpt())
    optimizer = qo.QuotientAdam(model, lr=1e-2)
    heads = len(optimizer.symmetries.heads)
    for tokens in batches(3):
        loss_of(model, tokens.chunk(dist.get_world_size())[dist.get_rank()]).backward()
        optimizer.step()
        optimizer.zero_grad()
    alone = gpt()
    single = qo.QuotientAdam(alone, lr=1e-2)
    for tokens in batches(3):
        loss_of(alone, tokens).backward()
        single.step()
        single.zero_grad()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return heads, max(float((p - q).detach().abs().max()) for p, q in pairs)

"""What goes wrong on one process, and what the others do then."""

import torch
import torch.distributed as dist

from quotientopt import QuotientAdam, find_symmetries
from quotientopt.optim.bookkeeping.checks import StepRefusedError
from tests.optim.training import Experts, in_two_axes_alone

from .models import batches, gpt, local, loss_of, part_of, shard, train


def ready(**options):
    model = gpt()
    shard(model, "fsdp")
    return model, QuotientAdam(model, lr=5e-3, **options)


def one_step(model, optimizer, tokens):
    loss = loss_of(model, part_of(tokens, "fsdp"))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def snapshot(model, optimizer):
    values = [local(p).detach().clone() for p in model.parameters()]
    for own in optimizer.state.values():
        values += [local(v).clone() for v in own.values()]
    return values


def alike(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def refused(step):
    try:
        step()
    except StepRefusedError as error:
        return str(error)
    return "nothing was refused"


def nan_on_one(name, first):
    """NaN in one entry of a gradient on the last process; first step or later."""
    data = batches(6)
    model, optimizer = ready()
    clean, undisturbed = ready()
    for tokens in data[: 0 if first else 3]:
        one_step(model, optimizer, tokens)
        one_step(clean, undisturbed, tokens)
    loss_of(model, part_of(data[3], "fsdp")).backward()
    gradient = local(dict(model.named_parameters())[name].grad)
    if dist.get_rank() == dist.get_world_size() - 1:
        gradient[-1, 0] = torch.nan
    before = snapshot(model, optimizer)
    text = refused(optimizer.step)
    unchanged = first or alike(before, snapshot(model, optimizer))
    optimizer.zero_grad()
    for tokens in data[4:]:
        one_step(model, optimizer, tokens)
        one_step(clean, undisturbed, tokens)
    return text, unchanged, alike(snapshot(model, optimizer), snapshot(clean, undisturbed))


def broken_pair():
    """A weight is infinite when the first frames are made: only its owner sees it."""
    model, optimizer = ready()
    loss_of(model, part_of(batches(1)[0], "fsdp")).backward()
    if dist.get_rank() == 0:
        local(model.blocks[1].attention.query.weight.detach())[0, 0] = torch.inf
    before = [local(p).detach().clone() for p in model.parameters()]
    text = refused(optimizer.step)
    return text, alike(before, [local(p).detach() for p in model.parameters()])


def missing_gradient(everywhere):
    """A matrix has no gradient on the last process, or on none."""
    runs = []
    for absent in (True, False):
        model, optimizer = ready()
        for tokens in batches(4):
            loss_of(model, part_of(tokens, "fsdp")).backward()
            here = everywhere or dist.get_rank() == dist.get_world_size() - 1
            for parameter in (model.blocks[1].mlp.up.weight, model.blocks[0].attention.key.weight):
                if here and absent:
                    parameter.grad = None
                elif here and not everywhere:
                    local(parameter.grad).zero_()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((snapshot(model, optimizer), model))
    (first, model), (second, _) = runs
    return alike(first, second), bool(all(p.isfinite().all() for p in first))


def no_gradients():
    model, optimizer = ready()
    before = [local(p).detach().clone() for p in model.parameters()]
    optimizer.step()
    return alike(before, [local(p).detach() for p in model.parameters()]), len(optimizer.state)


def thawed():
    """A layer is frozen at first: owners change when it is trained, and states move along."""
    models = []
    for sharded in (False, True):
        model = gpt()
        model.blocks[0].requires_grad_(False)
        if sharded:
            shard(model, "fsdp")
        optimizer = QuotientAdam(model, lr=1e-3)
        for i, tokens in enumerate(batches(6)):
            if i == 3:
                model.blocks[0].requires_grad_(True)
            own = part_of(tokens, "fsdp") if sharded else tokens
            loss_of(model, own).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    pairs = zip(*(m.parameters() for m in models), strict=True)
    return max(float((p - q.full_tensor()).detach().abs().max()) for p, q in pairs)


def found_before_sharding(experts):
    """Symmetries found from a batch on whole parameters, then on the shards."""
    data = batches(4)
    losses = []
    for way in (None, "fsdp"):
        model = gpt()
        torch.manual_seed(1)
        for block in model.blocks if experts else ():
            block.mlp = Experts(32, 24).double()
        symmetries = find_symmetries(model, data[0][:, :-1])
        if way:
            shard(model, way)
            symmetries = symmetries.for_model(model)
        optimizer = QuotientAdam(model, lr=5e-3, symmetries=symmetries)
        losses.append(train(model, optimizer, data, way))
    try:
        symmetries.for_model(torch.nn.Linear(2, 2))
    except ValueError as error:
        return max(abs(a - b) for a, b in zip(*losses, strict=True)), str(error)
    return None


def older_state_of_experts():
    """Moments that AdamW had of experts, as in version 0.2.0, go on in frames."""
    data = batches(6)
    losses = []
    for way in (None, "fsdp"):
        model = gpt()
        torch.manual_seed(1)
        for block in model.blocks:
            block.mlp = Experts(32, 24).double()
        found = find_symmetries(model, data[0][:, :-1])
        if way:
            shard(model, way)
            found = found.for_model(model)
        older = QuotientAdam(model, lr=5e-3, symmetries=in_two_axes_alone(found))
        train(model, older, data[:3], way)
        optimizer = QuotientAdam(model, lr=5e-3, symmetries=found)
        optimizer.load_state_dict(older.state_dict())
        losses.append(train(model, optimizer, data[3:], way))
    return max(abs(a - b) for a, b in zip(*losses, strict=True))


def added_group(tensor_rate, row_frame):
    """A group that is added after some steps, and rates that a scheduler changes."""
    runs = []
    for way in (None, "fsdp"):
        model = gpt()
        if way:
            shard(model, way)
        rate = torch.tensor(1e-3, dtype=torch.float64) if tensor_rate else 1e-3
        symmetries = find_symmetries(model)
        later = list(model.blocks[2].parameters())
        first = [p for p in model.parameters() if not any(p is own for own in later)]
        optimizer = QuotientAdam(
            first, lr=rate, weight_decay=0.1, symmetries=symmetries, row_frame=row_frame
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        losses = []
        for i, tokens in enumerate(batches(6)):
            if i == 3:
                optimizer.add_param_group({"params": later, "lr": 1e-3, "weight_decay": 0.0})
            losses += train(model, optimizer, tokens[None], way)
            if i < 3:
                scheduler.step()
            if i == 4:
                optimizer.refresh_frames()
        runs.append(losses)
    return max(abs(a - b) for a, b in zip(*runs, strict=True))


def example_of(text):
    """Run an example of the documents, and take a step."""
    names = {}
    exec(text, names)
    model, optimizer = names["model"], names["optimizer"]
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    return len(optimizer.symmetries.heads), optimizer._sharded is not None

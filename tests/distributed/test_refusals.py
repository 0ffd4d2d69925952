"""Wrappers that cut pairs are refused in one line that names the way out."""

import pytest
import torch

from quotientopt import QuotientAdam, find_symmetries
from quotientopt.models import GPT

from .refusals import data_parallel, fsdp1, fsdp1_later, of_sharded_models, zero_redundancy


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_is_refused(two, original):
    for found in two.run(fsdp1, original):
        for text in found:
            assert "FSDP1" in text
            assert "fully_shard" in text
            assert "\n" not in text


def test_fsdp1_around_a_model_with_an_optimizer_is_refused(two):
    for (text,) in two.run(fsdp1_later):
        assert "FSDP1" in text
        assert "fully_shard" in text


def test_zero_redundancy_is_refused(two):
    for found in two.run(zero_redundancy):
        for text in found:
            assert text.startswith("ZeroRedundancyOptimizer")
            assert "fully_shard" in text


def test_what_needs_values_of_sharded_parameters_is_refused(two):
    for found in two.run(of_sharded_models):
        assert len(found) == 15
        for text in found:
            assert "shard" in text
            assert "\n" not in text


def test_data_parallel_steps_are_those_of_one_process(two):
    for heads, deviation in two.run(data_parallel):
        assert heads == 6
        assert deviation < 1e-8


def test_flat_partitions_are_refused():
    """DeepSpeed's ZeRO replaces the parameters of a group by one flat tensor."""
    model = GPT(16, 1, 8, 2, 4)
    optimizer = QuotientAdam(model)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    with pytest.raises(ValueError, match=r"hold flat tensors .*fully_shard"):
        optimizer.step()
    assert bool(
        (flat.detach() == torch.cat([p.detach().flatten() for p in model.parameters()])).all()
    )


def test_partitioned_parameters_are_refused():
    model = GPT(16, 1, 8, 2, 4)
    model.head.weight.ds_id = 3
    with pytest.raises(ValueError, match=r"DeepSpeed's ZeRO flattens .*fully_shard"):
        find_symmetries(model)

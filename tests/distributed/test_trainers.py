"""Trainers that shard models train as one process does."""

import pytest

from .trainers import accelerated, resumed


@pytest.mark.parametrize(
    "name", ["gpt", *(pytest.param(name, marks=pytest.mark.long) for name in ("gpt2", "lora"))]
)
def test_accelerate_shards_after_the_optimizer_was_made(two, name):
    for deviation, sharded in two.run(accelerated, name):
        assert sharded > 20
        assert deviation < 1e-10


@pytest.mark.long
def test_trainer_resumes_sharded_training_bit_for_bit(two, tmp_path):
    for losses, later, equal, heads, sharded in two.run(resumed, str(tmp_path), "fsdp"):
        assert sharded
        assert heads == 6
        assert losses[-1] < losses[0] - 0.25
        assert later == losses[4:]
        assert equal

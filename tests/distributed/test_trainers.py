"""Trainers that shard models train as one process does."""

import pytest

from .trainers import accelerated


@pytest.mark.parametrize("name", ["gpt", "gpt2", "lora"])
def test_accelerate_shards_after_the_optimizer_was_made(two, name):
    for deviation, sharded in two.run(accelerated, name):
        assert sharded > 20
        assert deviation < 1e-10

"""Sharded runs are those of one process, step by step."""

import pytest

from .curves import compared

HEADS = {"gpt": 6, "llama": 6, "gpt2": 6, "lora": 18}


def check(results, name):
    for found in results:
        print(name, found)
        assert found["losses"] < 1e-10
        assert found["weights"] < 1e-9
        assert found["moved"] > 1e-2
        assert found["heads"] == HEADS[name]


@pytest.mark.parametrize("name", ["gpt", "llama", "gpt2", "lora"])
def test_fsdp_equals_one_process(two, name):
    results = two.run(compared, name, "fsdp", 12, {})
    check(results, name)
    for found in results:
        assert found["share"] < 0.6

"""Sharded runs are those of one process, step by step."""

import pytest
import torch

from .curves import (
    BY_HEAD,
    compared,
    factory,
    in_float32,
    left_behind,
    same_batch,
    traffic,
    twins,
    without_being_told,
    without_pooling,
)

# Of losses of more than four nats, as the first ones are, in float32.
HALF_AN_ULP = 2.0**-22
HEADS = {"gpt": 6, "llama": 6, "gpt2": 6, "lora": 12, "thin": 12}


def check(results, name, share):
    for found in results:
        print(name, found)
        assert found["losses"] < 1e-10
        assert found["weights"] < 1e-8
        assert found["moved"] > 1e-2
        assert found["heads"] == HEADS[name]
        assert found["share"] < share


SHORT = ["gpt2", "lora", *(pytest.param(n, marks=pytest.mark.long) for n in ("gpt", "llama"))]


@pytest.mark.parametrize("name", SHORT)
def test_fsdp_equals_one_process(two, name):
    check(two.run(compared, name, "fsdp", 12, {}), name, 0.6)


@pytest.mark.parametrize("name", ["llama"])
def test_tensor_parallel_equals_one_process(two, name):
    check(two.run(compared, name, "tp", 12, {}), name, 0.6)


@pytest.mark.parametrize(
    ("name", "options"), [("wordy", {}), ("gpt", {"head_frame": None, "nesterov": False})]
)
def test_embeddings_are_known_without_the_layers(two, name, options):
    """A process with an embedding alone, and without head frames, has no layers to tell it by."""
    for found in two.run(compared, name, "fsdp", 6, options):
        print(name, options, found)
        assert found["losses"] < 1e-10
        assert found["weights"] < 1e-8


def test_an_embedding_taken_for_a_matrix_is_stepped_otherwise(two):
    """The control: without being told."""
    assert min(two.run(without_being_told, "wordy")) > 1e-4


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt", "llama", "gpt2", "lora"])
def test_fsdp_on_four_processes(four, name):
    check(four.run(compared, name, "fsdp", 30, {}), name, 0.35)


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt", "llama", "gpt2", "lora"])
def test_thirty_steps(two, name):
    check(two.run(compared, name, "fsdp", 30, {}), name, 0.6)


@pytest.mark.long
@pytest.mark.parametrize("way", ["both", "hybrid"])
def test_two_axes_equal_one_process(four, way):
    check(four.run(compared, "llama", way, 30, {}), "llama", 0.35)


def test_ties_are_broken_by_all_matrices(two):
    """The control: with Grams of its own matrices alone every process makes other frames."""
    assert min(two.run(without_pooling, "gpt")) > 1e-6


@pytest.mark.parametrize("name", SHORT)
def test_sharded_twins(two, name):
    for deviation in two.run(twins, name, "fsdp", 8, "quotient"):
        print(name, deviation)
        assert deviation < 1e-8


def test_sharded_adamw_sees_the_gauge(two):
    assert min(two.run(twins, "gpt", "fsdp", 8, "adamw")) > 1e-4


def test_what_a_step_sends(two):
    """Gradients to the owners and updates back; weights too where frames are made."""
    for calls, kinds, away, back in two.run(traffic, "gpt"):
        assert away > 0
        assert kinds > 2
        for step, events in enumerate(calls):
            fresh = step in (0, 3)
            sent = [size for kind, size in events if kind == "start"]
            reduced = [size for kind, size in events if kind == "reduce"]
            assert len(sent) == 2 * kinds
            assert sum(sent[:kinds]) == away * (2 if fresh else 1)
            assert sum(sent[kinds:]) == back
            # Which gradients there are, the norm, streams without frames, their Grams at first.
            assert len(reduced) == 2 + fresh + (step == 0)
            assert max(reduced) <= 8 * 32**2


def test_exchanges_go_on_while_a_step_computes(two):
    """Work begins on what has arrived first, and what is done leaves before the rest is."""
    for calls, kinds, _, _ in two.run(traffic, "gpt"):
        for step, events in enumerate(calls):
            names = [name for name, _ in events]
            starts = [i for i, name in enumerate(names) if name == "start"]
            dressed = [i for i, name in enumerate(names) if name == "dressed"]
            updated = [i for i, name in enumerate(names) if name == "updated"]
            arrived = [i for i, (name, left) in enumerate(events) if (name, left) == ("arrived", 1)]
            assert starts[kinds - 1] < arrived[0]
            assert starts[kinds] < updated[-1]
            if step not in (0, 3):
                assert dressed[0] < arrived[kinds - 1]
            else:
                # The control: where frames are made the weights of all come first.
                assert dressed[0] > arrived[kinds - 1]


@pytest.mark.parametrize("name", ["gpt", "lora"])
def test_a_step_leaves_nothing_behind(two, name):
    """Gradients of whole matrices must not stay until the next step."""
    for taken, alive in two.run(left_behind, name):
        assert taken > 20
        assert alive == 0


def test_shards_without_rows(two):
    """Of LoRA factors of rank one a process holds nothing."""
    check(two.run(compared, "thin", "fsdp", 6, {}), "thin", 0.6)


def test_the_factory_of_peft(two):
    assert max(two.run(factory, 6)) < 1e-10


@pytest.mark.parametrize(
    ("dtype", "options", "least"),
    [
        (torch.float32, {}, 1e-5),
        (torch.float32, {"foreach": False}, 1e-5),
        # The same arithmetic on the same numbers.
        (torch.bfloat16, {}, 0.0),
        (torch.bfloat16, {"master_weights": True}, 0.0),
    ],
)
def test_other_dtypes(two, dtype, options, least):
    for deviation in two.run(same_batch, dtype, options):
        print(dtype, options, deviation)
        assert deviation <= least


@pytest.mark.parametrize("options", [{}, BY_HEAD])
@pytest.mark.parametrize("name", SHORT)
def test_float32_differs_no_more_than_adamw(two, name, options):
    """By ten times as much. AdamW's are often the same, which float32 tells to half an ulp."""
    for own, adamw in two.run(in_float32, name, 10, options):
        print(name, options, own, adamw)
        assert own <= 10 * max(adamw, HALF_AN_ULP)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt", {"polar": True, "hidden_units": True}),
        ("gpt", {"residual_frame": None}),
        ("gpt", {"row_frame": "per_matrix"}),
        ("gpt", {"hidden_frame": "per_matrix"}),
        ("gpt", {"hidden_frame": "leading"}),
        ("gpt", {"embedding_frame": "fixed_but_head", "refresh_every": 3}),
        ("gpt", {"second_moment": "factored", "embedding_scale": 1.0}),
        ("gpt2", {"second_moment": "factored", "head_frame": "svd"}),
        ("gpt2", {"polar": False, "refresh_every": 3}),
        ("gpt", {"head_frame": "orthonormal", "residual_frame": None}),
        ("gpt2", {"head_frame": "svd", "polar": False}),
        ("gpt2", {"head_frame": None, "residual_frame": None}),
        ("llama", {"polar": True}),
        ("llama", {"maximize": True}),
        ("lora", {"lora_frame": None}),
        ("lora", {"lora_frame": "balanced"}),
        ("lora", {"lora_polar": True, "refresh_every": 3}),
    ],
)
def test_options(two, name, options):
    for found in two.run(compared, name, "fsdp", 10, options):
        print(name, options, found)
        assert found["losses"] < 1e-10
        assert found["weights"] < 1e-7

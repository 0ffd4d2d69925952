"""Checkpoints go from any number of processes to any other, bit for bit."""

import os

import pytest
import torch

from .checkpointing import (
    damaged,
    full,
    killed_in_a_save,
    killed_in_a_step,
    load,
    same,
    save,
)
from .workers import Workers

SHORT = ["gpt", *(pytest.param(name, marks=pytest.mark.long) for name in ("llama", "gpt2", "lora"))]


@pytest.mark.parametrize("name", SHORT)
def test_two_processes_resume_bit_for_bit(two, name, tmp_path):
    written = two.run(save, name, "fsdp", str(tmp_path))
    for first, second in zip(written, two.run(load, name, "fsdp", str(tmp_path)), strict=True):
        assert len(first[0]) > 50
        assert same(first[0], second[0]) == []
        assert first[1] == second[1]
        assert same(first[2], second[2]) == []


@pytest.mark.parametrize("name", SHORT)
def test_one_process_loads_what_two_have_saved(two, name, tmp_path):
    values, losses, _ = two.run(save, name, "fsdp", str(tmp_path))[0]
    loaded, others, _ = load(name, None, str(tmp_path))
    assert same(values, loaded) == []
    assert max(abs(a - b) for a, b in zip(losses, others, strict=True)) < 1e-10


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt", "llama", "gpt2", "lora"])
def test_two_processes_load_what_one_has_saved(two, name, tmp_path):
    values, losses, _ = save(name, None, str(tmp_path))
    for loaded, others, _ in two.run(load, name, "fsdp", str(tmp_path)):
        assert same(values, loaded) == []
        assert max(abs(a - b) for a, b in zip(losses, others, strict=True)) < 1e-10


@pytest.mark.long
@pytest.mark.parametrize("way", ["fsdp", "tp", "both", "hybrid"])
def test_four_processes_load_what_two_have_saved(two, four, way, tmp_path):
    name = "llama"
    if way == "tp":
        values, losses, _ = two.run(save, name, way, str(tmp_path))[0]
        found = two.run(load, name, way, str(tmp_path))
    else:
        values, losses, _ = two.run(save, name, "fsdp", str(tmp_path))[0]
        found = four.run(load, name, way, str(tmp_path))
    for loaded, others, _ in found:
        assert same(values, loaded) == []
        assert max(abs(a - b) for a, b in zip(losses, others, strict=True)) < 1e-10


@pytest.mark.parametrize("name", SHORT)
def test_full_state_dicts(two, name):
    for complete, different in two.run(full, name, "fsdp"):
        assert complete
        assert different == []


def test_a_state_that_does_not_fit_is_refused_by_all(two):
    for messages, different in two.run(damaged, "gpt", "fsdp"):
        assert len(messages) == 3
        assert "NaN" in messages[0]
        assert "shape" in messages[1]
        assert "is missing" in messages[2]
        assert different == []


@pytest.mark.long
def test_a_process_killed_in_a_save_leaves_the_old_checkpoint(two, tmp_path):
    dying = Workers(2)
    try:
        with pytest.raises((AssertionError, EOFError, ConnectionError)):
            dying.run(killed_in_a_save, "gpt", "fsdp", str(tmp_path), timeout=120)
    finally:
        dying.close()
    assert not os.path.exists(tmp_path / "new" / ".metadata")
    values = torch.load(tmp_path / "values.pt")
    for loaded, _, _ in two.run(load, "gpt", "fsdp", str(tmp_path / "old")):
        assert same(values, loaded) == []


@pytest.mark.long
def test_a_process_killed_in_a_step_ends_the_others(two, tmp_path):
    """They end with an error instead of waiting; the run goes on from the checkpoint."""
    dying = Workers(2)
    try:
        with pytest.raises(EOFError):
            dying.run(killed_in_a_step, "gpt", "fsdp", str(tmp_path / "own"), timeout=120)
        dying.processes[0].join(60)
        ok, problem = dying.results[0]
    finally:
        dying.close()
    assert not ok
    assert "Connection closed by peer" in problem or "reset by peer" in problem
    uninterrupted = two.run(save, "gpt", "fsdp", str(tmp_path / "whole"))
    resumed = two.run(load, "gpt", "fsdp", str(tmp_path / "own"))
    for first, second in zip(uninterrupted, resumed, strict=True):
        assert first[1] == second[1]
        assert same(first[2], second[2]) == []

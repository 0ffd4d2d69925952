"""Autocast and torch's global precision switches change no result of the package."""

import contextlib

import pytest
import torch

import quotientopt as qo
from tests.symmetries.families import FAMILIES


@contextlib.contextmanager
def medium_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


SWITCHES = {
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "medium": medium_products,
}


def found_by(model, other):
    """Everything the package computes of two models, as tensors."""
    invariants = qo.invariants(model)
    spectra = qo.spectra(model)
    charges = qo.noether_charges(model)
    return {
        **{f"dense {k}": v.dense() for k, v in invariants.items()},
        **{f"left {k}": v.left for k, v in invariants.items()},
        **{f"values {k}": v.singular_values for k, v in invariants.items()},
        **{f"spectra {k}": v.singular_values for k, v in spectra.items()},
        **{f"charges {k}": torch.as_tensor(v) for k, v in charges.items()},
        **{f"distance {k}": torch.as_tensor(v) for k, v in qo.distance(model, other).items()},
    }


def changed(operation, family):
    model, other = FAMILIES[family].model(), FAMILIES[family].model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    operation(model, other)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def act(model, other):
    symmetries = qo.find_symmetries(model)
    generator = torch.Generator().manual_seed(3)
    symmetries.act_(symmetries.random_element(generator=generator))


OPERATIONS = {
    "dress_": lambda model, other: qo.dress_(model),
    "align_": lambda model, other: qo.align_(model, other),
    "fold_norms_": lambda model, other: qo.fold_norms_(model, untie=True),
    "act_": act,
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_what_is_computed(switch, family):
    model, other = FAMILIES[family].model(), FAMILIES[family].model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    expected = found_by(model, other)
    with SWITCHES[switch]():
        found = found_by(model, other)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_changed(switch, name, family):
    expected = changed(OPERATIONS[name], family)
    with SWITCHES[switch]():
        found = changed(OPERATIONS[name], family)
    assert torch.equal(found, expected)

"""spectra and their picture."""

import os
import sys

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.canonical import Spectrum, dress_, plot_spectra, spectra
from quotientopt.canonical.spectra import _short
from tests.canonical.models import ARCHITECTURES, example, twin_of
from tests.symmetries.architectures import small_gpt, small_llama


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_singular_values_are_invariant(name):
    model, _ = example(name)
    twin = twin_of(model)
    ours, theirs = spectra(model), spectra(twin)
    for key, one in ours.items():
        assert torch.allclose(one.singular_values, theirs[key].singular_values, atol=1e-10)
        assert (one.charge_imbalance - theirs[key].charge_imbalance).abs().max() > 1e-3


def test_singular_values_of_products_per_query_head():
    model = small_llama().double()
    found = spectra(model)["blocks.0.attention.qk"].singular_values
    attention = model.blocks[0].attention
    query = attention.query.weight.detach().unflatten(0, (4, 8))
    key = attention.key.weight.detach().unflatten(0, (2, 8)).repeat_interleave(2, dim=0)
    assert torch.allclose(found, torch.linalg.svdvals(query.mT @ key)[:, :8], atol=1e-12)


def test_numbers():
    values = torch.tensor([[4.0, 4, 4, 4], [1, 0, 0, 0], [4, 3, 1, 0.5], [0, 0, 0, 0]]).double()
    spectrum = Spectrum(values, torch.zeros(4))
    rank = spectrum.effective_rank
    assert torch.allclose(rank[[0, 1, 3]], torch.tensor([4.0, 1.0, 0.0]).double())
    assert 1 < rank[2] < 4
    expected = torch.tensor([0.0, 0.0, 0.125, 0.0]).double()
    assert torch.allclose(spectrum.gap, expected)


def test_charge_imbalance():
    model = small_gpt().double()
    dress_(model, "balanced")
    assert max(s.charge_imbalance.max() for s in spectra(model).values()) < 1e-12
    qo.find_symmetries(model).heads[0].left[0].mul_(1e4)
    found = spectra(model)["blocks.0.attention.qk"].charge_imbalance
    assert (found > 0.999).all()
    assert (found <= 1).all()


def test_deficient_pairs_are_no_error_but_nonfinite_ones_are():
    model = small_gpt()
    with torch.no_grad():
        model.blocks[0].attention.output.weight.zero_()
    found = spectra(model)["blocks.0.attention.vo"]
    assert torch.equal(found.singular_values, torch.zeros(3, 8, dtype=torch.float64))
    assert torch.equal(found.effective_rank, torch.zeros(3, dtype=torch.float64))
    with torch.no_grad():
        model.blocks[1].attention.key.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'blocks\.1\.attention\.qk' has non-finite entries"):
        spectra(model)


# ---- the picture --------------------------------------------------------------------------------

matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")


@pytest.mark.parametrize("name", ["gpt", "llama-multi-query", "gpt2-cross-attention", "attention"])
def test_a_picture(name, tmp_path):
    model, _ = example(name)
    path = plot_spectra(model, str(tmp_path / "spectra.png"))
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert os.listdir(tmp_path) == ["spectra.png"]
    before = path.read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    plot_spectra(model, path)
    assert path.read_bytes() != before


def test_zero_pairs_can_be_drawn(tmp_path):
    model = small_gpt()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.output.weight.zero_()
    assert plot_spectra(model, tmp_path / "spectra.png").exists()


def test_refusals_leave_no_file(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no head symmetry of Linear"):
        plot_spectra(nn.Linear(2, 2), tmp_path / "spectra.png")
    with pytest.raises(FileNotFoundError):
        plot_spectra(small_gpt(), tmp_path / "nowhere" / "spectra.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_spectra(small_gpt(), tmp_path / "spectra.png")
    assert os.listdir(tmp_path) == []


def test_short_names():
    names = ["model.layers.0.attn", "model.layers.1.attn"]
    assert _short(names) == ["0", "1"]
    assert _short(["attention"]) == ["attention"]
    assert _short(["a.0.self", "a.0.cross"]) == ["self", "cross"]

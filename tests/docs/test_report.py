"""``python -m quotientopt.report`` says what a bug report needs, also where something fails."""

import subprocess
import sys

import pytest
import torch

import quotientopt as qo
from quotientopt.models import reference_model
from quotientopt.report import main, report


def test_the_installation_describes_and_checks_itself(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    for part in (f"quotientopt {qo.__version__}", f"torch {torch.__version__}", "accelerator: "):
        assert part in text
    worst = float(text.split()[-1])
    assert 0 < worst < 1e-12


def test_a_model_is_described():
    text = report(reference_model("gpt", layers=1, width=32))
    assert "quotientopt.models.gpt.GPT" in text
    assert "blocks.0.attention.qk" in text
    assert "torch.float32 on cpu" in text


def test_symmetries_are_found_from_gradients_too():
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16) for _ in range(4))

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (2, 8)).mT.mT for f in (self.q, self.k, self.v))
            q, k, v = (y.transpose(-3, -2) for y in (q, k, v))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return x + self.o(y.transpose(-3, -2).flatten(-2))

    assert "found, proved" not in report(Mine())
    assert "found, proved" in report(Mine(), torch.randn(2, 6, 16))


def test_an_error_is_part_of_the_report(tmp_path, capsys):
    pytest.importorskip("transformers", reason="needs transformers")
    assert main([str(tmp_path / "nowhere")]) == 1
    text = capsys.readouterr().out
    assert "symmetries: failed" in text
    assert "CheckpointError" in text
    assert f"quotientopt {qo.__version__}" in text


def test_it_runs_as_a_module_without_a_warning():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "quotientopt.report"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

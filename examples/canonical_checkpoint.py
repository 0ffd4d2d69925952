"""Two gauges of one checkpoint become the same files: ``quotientopt dress``, as a program."""

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

import quotientopt as qo
from quotientopt.checkpoints import dress_checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=3, help="gauges to try")
gauges = parser.parse_args().steps

transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
config = transformers.GPT2Config(
    n_layer=2, n_embd=64, n_head=4, vocab_size=256, bos_token_id=0, eos_token_id=0
)
model = transformers.GPT2LMHeadModel(config).double()
with torch.no_grad():
    for parameter in model.parameters():  # random biases and gains too
        parameter.add_(0.1 * torch.randn_like(parameter))

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    dressed = []
    for number in range(gauges):
        if number:
            symmetries = qo.find_symmetries(model)
            symmetries.act_(symmetries.random_element(cond=10))  # other weights, same function
        model.save_pretrained(folder / f"gauge-{number}")
        report = dress_checkpoint(folder / f"gauge-{number}", folder / f"dressed-{number}", "svd")
        dressed.append(
            (
                load_file(folder / f"gauge-{number}" / "model.safetensors"),
                load_file(folder / f"dressed-{number}" / "model.safetensors"),
            )
        )
    print(report)
    for title, which in (("as saved", 0), ("dressed", 1)):
        first = dressed[0][which]
        apart = max(
            (first[key] - other[which][key]).abs().max().item()
            for other in dressed
            for key in first
        )
        print(f"{title}: largest difference of a weight between {gauges} gauges {apart:.0e}")

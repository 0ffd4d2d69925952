"""LoRA adapters in Hugging Face's Trainer, with an optimizer that does not see their gauge."""

import argparse
from pathlib import Path

import peft
import torch
import transformers

from quotientopt.peft import create_quotient_optimizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
steps = parser.parse_args().steps

# A small model with random weights, in the place of one loaded by from_pretrained.
torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=256,
    max_position_embeddings=64,
)
base = transformers.LlamaForCausalLM(config)
adapters = peft.LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
model = peft.get_peft_model(base, adapters)

text = list(Path(argparse.__file__).read_bytes())
pieces = [text[i : i + 48] for i in range(0, len(text) - 48, 48)]
dataset = [{"input_ids": piece, "labels": piece} for piece in pieces]

# The Trainer's own clipping measures the gradient in one gauge: it is off, this one is dressed.
optimizer = create_quotient_optimizer(model, lr=2e-3, max_grad_norm=1.0)
print(f"{len(optimizer.symmetries.heads)} adapters, each modulo GL(8)")
arguments = transformers.TrainingArguments(
    "lora-out",
    max_steps=steps,
    max_grad_norm=0.0,
    per_device_train_batch_size=8,
    logging_steps=max(1, steps // 4),
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
trainer = transformers.Trainer(
    model=model, args=arguments, train_dataset=dataset, optimizers=(optimizer, None)
)
result = trainer.train()
print(f"training loss {result.training_loss:.3f}")

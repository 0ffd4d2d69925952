"""Adam on low-rank pairs, those of LoRA: coordinates, stacked factors, the step."""

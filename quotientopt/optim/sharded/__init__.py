"""QuotientAdam on sharded parameters: who owns what, how it travels, the step, its state."""

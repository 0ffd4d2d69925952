"""What an optimizer keeps apart from its algorithm: slices, stacks, checks, state."""

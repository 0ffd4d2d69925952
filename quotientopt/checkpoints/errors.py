"""What can be wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, dressed or written; its message is one line."""


def first_line(error: BaseException) -> str:
    """Kind and first line of an error that another package has raised."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

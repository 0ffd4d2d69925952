"""What optional packages are installed with: their own names, which package indexes know."""

# As in the extras of pyproject.toml.
REQUIREMENTS = {
    "geoopt": "geoopt>=0.5.1",
    "heavyball": "heavyball>=3.2,<4",
    "matplotlib": "matplotlib>=3.8",
    "peft": "peft>=0.18",
    "pymanopt": "pymanopt>=2.2",
    "pytorch_optimizer": "pytorch_optimizer>=3.5",
    "scipy": "scipy>=1.10",
    "transformers": "transformers>=5.0",
}


def install_command(package: str) -> str:
    """The command that installs an optional package."""
    return f"pip install '{REQUIREMENTS.get(package, package)}'"

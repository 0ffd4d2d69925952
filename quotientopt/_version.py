"""The version, in one place: also where the source tree is used without being installed."""

__version__ = "0.2.0"

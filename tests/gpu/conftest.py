"""The command line for the GPU tests that call it."""

from tests.cli.command import command

__all__ = ["command"]

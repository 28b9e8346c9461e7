"""Fixtures of the tests of the command line."""

import pytest
import torch

from tests.cli.command import command

__all__ = ["command"]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

"""Tests of kernels in Triton's interpreter: the files ``test_*_interpreted.py``.

Triton selects the interpreter when a kernel is decorated, so that one process cannot use both. ``test_interpreted.py``
runs all of these files in a process of their own.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process uses the interpreter."""
HERE = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")


def dtypes(most_in_fp16: float = 1e-3) -> pytest.MarkDecorator:
    """The dtypes of the activations with the largest error.

    fp16 has the narrower bound, and the kernels' source is the same for both. The interpreter truncates fp32 to bf16,
    where a GPU rounds, which doubles the error.
    """
    bf16 = pytest.param(torch.bfloat16, 1.6e-2, marks=pytest.mark.slow)
    return pytest.mark.parametrize(("dtype", "most"), [(torch.float16, most_in_fp16), bf16])

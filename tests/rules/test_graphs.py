"""Before and after as text: what each target makes of what torch.export leaves. `make golden` rewrites the texts."""

from collections.abc import Callable

import pytest
import torch

import et_cuda_passes as ecp
from et_cuda_passes.testing import as_text
from tests import golden_models
from tests.golden_models import CASES, exported


@pytest.mark.parametrize("target", ["cuda", "metal", "cpu", "xnnpack"])
@pytest.mark.parametrize("case", CASES)
def test_before_and_after(
    case: str, target: str, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A report names hosts on which a kernel is slower.
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    before = exported(case)
    after, report = ecp.rewrite(before, target)
    page = f"before\n\n{as_text(before)}\n\nafter\n\n{as_text(after)}\n\nreport\n\n{report}"
    # The path is that of this checkout.
    golden(f"graphs/{case}-{target}", page.replace(golden_models.__file__, "model.py"))

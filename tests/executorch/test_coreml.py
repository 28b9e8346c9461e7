"""Core ML: what the rule predicts, what the stock backend converts, and the weights that stand in the model.

Core ML runs on macOS only. The tests read the weights of the model back and compute with them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.hf.schemes import quantize_model_
from et_cuda_passes.rules.fold import DropActivationQuantization
from et_cuda_passes.testing import Quantized, export
from tests.coreml import CoreMLPartitioner, decompressed, lowered, stock

ct = pytest.importorskip("coremltools")

Make = Callable[[], ExportedProgram]


def plain(*shape: int, change: Callable[[Quantized], None] = lambda model: None, **options: Any) -> ExportedProgram:
    options = {"n": 64, "k": 256, "dtype": torch.float32, **options}
    model = Quantized(**options)
    change(model)
    return export(model, torch.randn(*(shape or (4,)), options["k"]).to(options["dtype"]))


def table(**options: Any) -> ExportedProgram:
    model = Quantized(64, 256, dtype=torch.float32, form=lambda x, weight, bias: F.embedding(x, weight), **options)
    return torch.export.export(model, (torch.tensor([[1, 5, 0], [2, 2, 7]]),))


def linear(config: Any, dynamic: bool = False) -> ExportedProgram:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64)).eval()
    quantize_(model, config)
    sizes = ({0: Dim("rows", min=2, max=64)},) if dynamic else None
    return torch.export.export(model, (torch.randn(4, 256),), dynamic_shapes=sizes)


def tiny_scales(model: Quantized) -> None:
    model.scale *= 1e-6


def far_zero_points(model: Quantized) -> None:
    """Zero points beyond 4 bits, for integers of 8 bits that all fit in 4."""
    model.low, model.high = -128, 127
    model.zero_point += 100


def row_of_padding(model: Quantized) -> None:
    """A row of zeros, with the scale that torchao gives it."""
    model.data[0], model.scale[0] = 0, 1.2e-7


def wide_integers(model: Quantized) -> None:
    model.data[0, 0] = 100


def half_zero_points(model: Quantized) -> None:
    model.register_buffer("zero_point", torch.full_like(model.scale, 0.5))


class WithoutRange(Quantized):
    """The range of int8 by the operator's defaults."""

    def weight(self) -> Tensor:
        weight: Tensor = torch.ops.torchao.dequantize_affine(
            self.data, self.block, self.scale, self.zero_point, torch.int8
        )
        return weight


KEPT: dict[str, Make] = {
    "4 bits in groups": lambda: plain(),
    "4 bits per row": lambda: plain(group=256),
    "4 bits, groups of 12, K 36, N 7": lambda: plain(n=7, k=36, group=12),
    "4 bits, K 30": lambda: plain(k=30, group=10),
    "4 bits, asymmetric": lambda: plain(zero_points="random"),
    "4 bits, no zero points": lambda: plain(zero_points=None),
    "4 bits in float16": lambda: plain(dtype=torch.float16),
    "4 bits, batches": lambda: plain(2, 3),
    "4 bits, a vector": lambda: plain(1),
    "4 bits, dynamic length": lambda: linear(IntxWeightOnlyConfig(torch.int4, PerGroup(32)), dynamic=True),
    "4 bits stored as int32": lambda: plain(storage=torch.int32),
    "8 bits per row": lambda: plain(group=256, low=-128, high=127),
    "8 bits in groups, asymmetric": lambda: plain(low=-128, high=127, zero_points="random"),
    "table": lambda: table(),
    "a row of zeros": lambda: plain(change=row_of_padding),
    "table, 8 bits": lambda: table(low=-128, high=127, group=256),
}
# Those that the stock backend does not convert, and those that it converts to other weights.
REFUSED: dict[str, Make] = {
    "2 bits": lambda: plain(low=-2, high=1),
    "3 bits": lambda: plain(low=-4, high=3),
    "5 bits": lambda: plain(low=-16, high=15),
    "unsigned 4 bits": lambda: plain(low=0, high=15),
    "4 bits stored as uint8": lambda: plain(low=0, high=7, storage=torch.uint8),
    "8 bits, no range": lambda: export(WithoutRange(64, 256, dtype=torch.float32), torch.randn(4, 256)),
    "4 bits in bfloat16": lambda: plain(dtype=torch.bfloat16),
    "4 bits, scales in bfloat16": lambda: plain(scale_dtype=torch.bfloat16),
    "zero points beyond 4 bits": lambda: plain(change=far_zero_points),
    "integers beyond 4 bits": lambda: plain(change=wide_integers),
}
WRONG: dict[str, tuple[Make, str]] = {
    "scales below float16": (lambda: plain(change=tiny_scales), "positive and normal in float16"),
}

# The quick suite predicts everything, shows what the stock backend fails on, and lowers only these.
QUICK = (
    "4 bits, asymmetric", "4 bits, no zero points", "8 bits per row", "table",
    "integers beyond 4 bits", "scales below float16", "4 bits in bfloat16",
)  # fmt: skip


def _folded(program: ExportedProgram) -> Tensor:
    """The weight as the program dequantizes it."""
    result, _ = ecp.rewrite(program, "coreml", passes=[DropActivationQuantization(), ecp.FoldDequantize()])
    held = {**result.state_dict, **result.constants}
    ((_, weight),) = [(name, tensor) for name, tensor in held.items() if name.endswith(".dequantized")]
    return weight


def _is_right(weights: list[Tensor], wanted: Tensor) -> bool:
    """Whether there is one compressed weight, with the numbers of ``wanted`` but for the rounding of float16."""
    if len(weights) != 1:
        return False
    difference = (weights[0].double() - wanted.double()).abs()
    return bool((difference <= wanted.double().abs() * 2**-10).all())


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in KEPT])
def test_kept_weight_stands_compressed_in_the_model(name: str) -> None:
    program = KEPT[name]()
    partitioner = CoreMLPartitioner(expect={"kept": 1})
    outside, (delegate,) = lowered(program, partitioner)
    assert not [each for each in outside if "dequantize" in each]
    assert _is_right(decompressed(delegate), _folded(program))


@pytest.mark.parametrize("name", KEPT)
def test_rule_keeps_the_weight(name: str) -> None:
    _, report = ecp.rewrite(KEPT[name](), "coreml")
    assert report.counts()["kept"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_stock_backend_compresses_what_is_kept(name: str) -> None:
    program = KEPT[name]()
    _, (delegate,) = lowered(program, stock())
    assert _is_right(decompressed(delegate), _folded(program))


@pytest.mark.parametrize("name", REFUSED)
def test_stock_backend_fails_on_what_is_not_kept(name: str) -> None:
    program = REFUSED[name]()
    _, report = ecp.rewrite(program, "coreml")
    assert report.counts()["kept"] == 0
    with pytest.raises((ValueError, TypeError, KeyError, AssertionError)):
        lowered(program, stock())


@pytest.mark.parametrize("name", WRONG)
def test_stock_backend_stores_other_weights_without_an_error(name: str) -> None:
    make, reason = WRONG[name]
    program = make()
    _, report = ecp.rewrite(program, "coreml")
    texts = [*map(str, report.outcomes[0].reasons), *(text for each in report.rejected.values() for text in each)]
    assert report.counts()["kept"] == 0 and any(reason in text for text in texts)
    _, (delegate,) = lowered(program, stock())
    assert not _is_right(decompressed(delegate), _folded(program))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*REFUSED, *WRONG)]
)
def test_other_weights_are_folded_or_refused(name: str) -> None:
    program = REFUSED[name]() if name in REFUSED else WRONG[name][0]()
    if "in bfloat16" in name and "scales" not in name:
        with pytest.raises(ValueError, match="coreml has float32, float16: export the model in one of these"):
            lowered(program, CoreMLPartitioner())
        return
    outside, (delegate,) = lowered(program, CoreMLPartitioner(expect={"fold_dequantize": 1}))
    assert outside == [] and decompressed(delegate) == []


def test_dynamic_activations_are_computed_in_float() -> None:
    program = linear(Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)))
    outside, (delegate,) = lowered(program, CoreMLPartitioner(expect={"kept": 1, "drop_activation_quantization": 1}))
    assert outside == [] and _is_right(decompressed(delegate), _folded(program))


def test_zero_points_that_are_no_integers_are_folded() -> None:
    _, report = ecp.rewrite(plain(change=half_zero_points), "coreml")
    assert report.counts()["fold_dequantize"] == 1


def test_tied_weight_is_kept_for_both_readers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(64, 64), nn.Linear(64, 64, bias=False)
            self.last.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(self.table(ids))

    model = Tied().eval()
    quantize_model_(model, qlinear="4w", qembedding="4w", qembedding_group_size=32)
    outside, (delegate,) = lowered(
        torch.export.export(model, (torch.tensor([1, 5]),)), CoreMLPartitioner(expect={"kept": 2})
    )
    wanted = model.last.weight.dequantize()
    assert outside == [] and all(_is_right([weight], wanted) for weight in decompressed(delegate))


def test_partitioner_needs_ios18() -> None:
    specs = CoreMLBackend.generate_compile_specs(minimum_deployment_target=ct.target.iOS17)
    with pytest.raises(ValueError, match=r"minimum_deployment_target=iOS17, and weights in groups need iOS18"):
        CoreMLPartitioner(compile_specs=specs)


@pytest.mark.parametrize("target", [None, "iOS18", "iOS26"])
def test_partitioner_sets_deployment_target_where_it_is_missing(target: str | None) -> None:
    given = None if target is None else ct.target[target]
    precision = ct.precision.FLOAT32
    specs = CoreMLBackend.generate_compile_specs(minimum_deployment_target=given, compute_precision=precision)
    found = CoreMLPartitioner(compile_specs=specs).delegation_spec.compile_specs
    assert CoreMLBackend.min_deployment_target_from_compile_specs(found) == (given or ct.target.iOS18)
    assert CoreMLBackend.model_compute_precision_from_compile_specs(found) == precision


def test_int8_in_groups_of_torchao_is_kept() -> None:
    _, report = ecp.rewrite(linear(IntxWeightOnlyConfig(torch.int8, PerAxis(0))), "coreml")
    assert report.counts()["keep_coreml_weight"] == 1


class Branch(nn.Module):
    """A linear in a branch, and one outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = (Quantized(64, 64, dtype=torch.float32, seed=seed) for seed in (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        inside: Tensor = torch.cond(x.sum() > 0, self.inner, lambda y: y * 3, (x,))
        return inside + self.outer(x)


def test_branches_stay_outside_the_delegate_with_folded_weights() -> None:
    """The stock partitioner claims the branches without the call, and ExecuTorch stops with an assertion."""
    model, x = Branch(), torch.randn(4, 64)
    program, report = ecp.rewrite(torch.export.export(model, (x,)), "coreml", expect={"missed": 0})
    assert {each.fqn: each.status for each in report.outcomes} == {"inner.data": "rewritten", "outer.data": "kept"}
    outside, delegates = lowered(program, CoreMLPartitioner())
    assert "cond" in outside
    ((weight,),) = (found for each in delegates if (found := decompressed(each)))
    scale = model.outer.scale.half().float().repeat_interleave(32, dim=1)
    torch.testing.assert_close(weight.float(), model.outer.data * scale, rtol=2.0**-10, atol=0)

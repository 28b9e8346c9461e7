"""Linears with quantized weights on this CPU, compiled with AOTInductor: unrewritten, rewritten, with floats, others.

python -m benchmarks.cpu_linear [--bits 8] [--shapes 2048x2048] [--groups 32 128 0] [--zeros no yes]
    [--dtypes bfloat16 float16 float32] [--rows 1 8 64] [--forms NAME ...] [--rounds 7]

One line for each setting, in microseconds of processor time a call, in the fastest round; the last columns are bytes a
weight and the relative error against fp64 of the rewritten program. A group of 0 is one scale per row. The forms of a
setting are timed in turns in one process and thread, so that other load on the machine meets all.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.export import ExportedProgram
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup, quantize_

import et_cuda_passes as ecp
from et_cuda_passes.quant.weight import WeightValues

aten = torch.ops.aten
ENOUGH = 0.05
"""Seconds of calls in a round."""


@dataclass(frozen=True)
class Setting:
    """One linear: bits, N x K, elements that share a scale, whether it has zero points, dtype of x, rows."""

    bits: int
    n: int
    k: int
    group: int
    zeros: bool
    dtype: torch.dtype
    rows: int


class Products(nn.Module):
    """One product a group in plain operators, from integers [groups, group, N]."""

    def __init__(self, values: WeightValues, dtype: torch.dtype) -> None:
        super().__init__()
        n, groups = values.scale.shape
        self.register_buffer("data", values.data.t().reshape(groups, -1, n).contiguous())
        self.register_buffer("scale", values.scale.float().t().contiguous())
        points = torch.zeros_like(values.scale) if values.zero_point is None else values.zero_point
        self.register_buffer("zero", (points.float() * values.scale.float()).t().contiguous())
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """The linear."""
        parts = x.reshape(x.shape[0], self.data.shape[0], -1).transpose(0, 1)
        products = torch.bmm(parts, self.data.to(self.dtype)).float() * self.scale.unsqueeze(1)
        sums = parts.float().sum(-1, keepdim=True) * self.zero.unsqueeze(1)
        return (products - sums).sum(0).to(self.dtype)


class Columns(Products):
    """Sums over the rows of integers [groups, group, N], which Inductor fuses into one loop."""

    def forward(self, x: Tensor) -> Tensor:
        """The linear."""
        parts = x.float().view(x.shape[0], self.data.shape[0], -1)
        products = (parts.unsqueeze(-1) * self.data.float()).sum(2) * self.scale
        return (products - parts.sum(-1, keepdim=True) * self.zero).sum(1).to(self.dtype)


class Pack8(nn.Module):
    """torch's int8 kernel on each group; symmetric weights only."""

    def __init__(self, values: WeightValues, dtype: torch.dtype) -> None:
        super().__init__()
        n, groups = values.scale.shape
        self.register_buffer("data", values.data.view(n, groups, -1).transpose(0, 1).contiguous())
        self.register_buffer("scale", values.scale.to(dtype).t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """The linear."""
        parts = x.chunk(self.data.shape[0], dim=1)
        pairs = zip(parts, self.data, self.scale, strict=True)
        products = [aten._weight_int8pack_mm(part.contiguous(), data, scale) for part, data, scale in pairs]
        return torch.stack(products).float().sum(0).to(x.dtype)


class TwoInt4(nn.Module):
    """The int4 kernel on the upper and on the lower four bits."""

    def __init__(self, values: WeightValues, dtype: torch.dtype) -> None:
        super().__init__()
        q, scale = values.data.int() + 128, values.scale.float()
        zero = torch.zeros_like(scale) if values.zero_point is None else -values.zero_point.float() * scale
        self.group = q.shape[1] // scale.shape[1]
        upper = zero.to(dtype)
        lower = zero - upper.float() + 8 * scale
        for name, bits, scales, zeros in (("upper", q >> 4, 16 * scale, upper), ("lower", q & 15, scale, lower)):
            self.register_buffer(name, aten._convert_weight_to_int4pack_for_cpu(bits, 2))
            both = torch.stack([scales.t().to(dtype), zeros.t().to(dtype)], -1).contiguous()
            self.register_buffer(f"{name}_scales", both)

    def forward(self, x: Tensor) -> Tensor:
        """The linear."""
        product = aten._weight_int4pack_mm_for_cpu
        return product(x, self.upper, self.group, self.upper_scales) + product(
            x, self.lower, self.group, self.lower_scales
        )


class Int4Kernel(nn.Module):
    """torch's int4 kernel, which is scalar code in float16 and float32."""

    def __init__(self, values: WeightValues, dtype: torch.dtype) -> None:
        super().__init__()
        scale = values.scale.float()
        zero = torch.zeros_like(scale) if values.zero_point is None else -values.zero_point.float() * scale
        self.group = values.data.shape[1] // scale.shape[1]
        self.register_buffer("data", aten._convert_weight_to_int4pack_for_cpu(values.data.int() + 8, 2))
        self.register_buffer("tables", torch.stack([scale.t().to(dtype), zero.t().to(dtype)], -1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """The linear."""
        return aten._weight_int4pack_mm_for_cpu(x, self.data, self.group, self.tables)


OTHERS: dict[str, type[nn.Module]] = {
    "a product a group": Products,
    "columns": Columns,
    "int8 kernel a group": Pack8,
    "two int4 kernels": TwoInt4,
}
INT4 = {"int4 kernel": Int4Kernel}
FORMS = ("unrewritten", "rewritten", "floats", "as int8", "by row", *INT4, *OTHERS)


def exported(setting: Setting, x: Tensor) -> ExportedProgram:
    """The linear with a weight that torchao quantized."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(setting.k, setting.n, bias=False)).to(setting.dtype).eval()
    mapping = MappingType.ASYMMETRIC if setting.zeros else MappingType.SYMMETRIC
    granularity = PerGroup(setting.group) if setting.group else PerAxis(0)
    weight_dtype = torch.int4 if setting.bits == 4 else torch.int8
    quantize_(model, IntxWeightOnlyConfig(weight_dtype, granularity, mapping_type=mapping))
    return torch.export.export(model, (x,)).run_decompositions({})


def values_of(setting: Setting, program: ExportedProgram) -> WeightValues:
    """The weight that torchao quantized."""
    data, scale, zero_point = (value.detach() for _, value in sorted(program.state_dict.items()))
    return WeightValues(lambda: data, scale.view(setting.n, -1), zero_point.view(setting.n, -1))


def exact_product(values: WeightValues, x: Tensor) -> Tensor:
    """The linear in fp64."""
    assert values.zero_point is not None
    groups = values.data.double().view(*values.scale.shape, -1) - values.zero_point.double().unsqueeze(-1)
    return x.double() @ (groups * values.scale.double().unsqueeze(-1)).flatten(1).T


def programs(
    setting: Setting, names: list[str], program: ExportedProgram, values: WeightValues, x: Tensor
) -> Iterator[tuple[str, ExportedProgram]]:
    """The setting in each of the forms that it has."""
    for name in names:
        if name == "unrewritten":
            yield name, program
        elif name == "rewritten":
            yield name, ecp.rewrite(program, "cpu", expect={"missed": 0})[0]
        elif name == "floats":
            linear = nn.Linear(setting.k, setting.n, bias=False).to(setting.dtype)
            yield name, torch.export.export(linear, (x,))
        elif name == "as int8":
            yield name, ecp.rewrite(program, "cpu", [ecp.LinearInt8()], expect={"missed": 0})[0]
        elif name == "by row":
            yield name, ecp.rewrite(program, "cpu", [ecp.LinearInt4("plain operators")], expect={"missed": 0})[0]
        elif name in INT4:
            yield name, torch.export.export(INT4[name](values, setting.dtype), (x,))
        elif name in ("int8 kernel a group", "two int4 kernels") and setting.dtype is torch.float32:
            continue  # scalar code
        elif (name == "int8 kernel a group" and setting.zeros) or (name == "two int4 kernels" and not setting.group):
            continue
        else:
            yield name, torch.export.export(OTHERS[name](values, setting.dtype), (x,))


def fastest(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Microseconds of the fastest round of each call; the rounds of the calls alternate."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            count, begin = 0, time.process_time()
            while (elapsed := time.process_time() - begin) < ENOUGH:
                call()
                count += 1
            best[name] = min(best[name], elapsed / count * 1e6)
    return best


def measure(setting: Setting, names: list[str], rounds: int, folder: Path) -> str:
    """A line of the table: times, and those of the rewritten program relative to others."""
    x = torch.randn(setting.rows, setting.k, generator=torch.Generator().manual_seed(1)).to(setting.dtype)
    source = exported(setting, x)
    values = values_of(setting, source)
    exact = exact_product(values, x)
    size, error = float("nan"), float("nan")
    calls: dict[str, Callable[[], Tensor]] = {}
    for number, (name, program) in enumerate(programs(setting, names, source, values, x)):
        path = aoti_compile_and_package(program, package_path=str(folder / f"{number}.pt2"))
        calls[name] = partial(aoti_load_package(path), x)
        if name == "rewritten":
            size = sum(value.nbytes for value in program.state_dict.values()) / (setting.n * setting.k)
            error = float((calls[name]().double() - exact).norm() / exact.norm())
    best = fastest(calls, rounds)
    times = [f"{best[name]:.0f}" if name in best else "" for name in names]
    ratios = [
        f"{best['rewritten'] / best[name]:.2f}" if {name, "rewritten"} <= set(best) else ""
        for name in ("unrewritten", "floats")
    ]
    group = str(setting.group) if setting.group else "per axis"
    described = [f"{setting.n} x {setting.k}", group, "yes" if setting.zeros else "no"]
    dtype = str(setting.dtype).removeprefix("torch.")
    return (
        "| " + " | ".join([*described, dtype, str(setting.rows), *times, *ratios, f"{size:.3f}", f"{error:.1e}"]) + " |"
    )


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=[4, 8], default=8)
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "2048x2048", "8192x3072"])
    parser.add_argument("--groups", nargs="+", type=int, default=[32, 128, 0])
    parser.add_argument("--zeros", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["unrewritten", "rewritten", "floats"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["N x K", "group", "zeros", "dtype", "rows", *args.forms, "rewritten / unrewritten", "rewritten / floats"]
    columns += ["bytes a weight", "error"]
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    grid = itertools.product(args.shapes, args.groups, args.zeros, args.dtypes, args.rows)
    for shape, group, zeros, dtype, rows in grid:
        n, k = map(int, shape.split("x"))
        setting = Setting(args.bits, n, k, group, zeros == "yes", getattr(torch, dtype), rows)
        with tempfile.TemporaryDirectory() as folder:
            print(measure(setting, args.forms, args.rounds, Path(folder)), flush=True)


if __name__ == "__main__":
    main()

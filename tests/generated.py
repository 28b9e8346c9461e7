"""Random quantized models: a plan drawn by hypothesis, the module that follows it, and the expected outcomes.

A plan is data, so that hypothesis can shrink it and a failure prints all of it. A step's result is an output, or only
later steps read it. Steps mutate buffers, caches and an input. Each read of a quantized weight that torch.export leaves
in the graph is one candidate of the report.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._higher_order_ops.map import map as over
from torch.export import Dim, ExportedProgram
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

Kind = Literal[
    "linear", "matmul", "no bias", "written bias", "wide bias", "gate", "subclass", "no_grad", "cond", "cond both",
    "nested", "map", "lookup", "expert", "all experts", "both ways", "chosen experts", "grouped experts", "attention",
    "no_grad write",
]  # fmt: skip
# dynamo traces a branch, which takes longer than the rest of a model. So these kinds share one entry.
KINDS: list[Kind] = [
    "linear", "linear", "linear", "no bias", "no bias", "written bias", "wide bias", "gate", "matmul", "subclass",
    "no_grad", "lookup", "attention", "no_grad write",
]  # fmt: skip
EXPERTS: list[Kind] = ["expert", "all experts", "both ways", "chosen experts", "grouped experts"]
BRANCHES: list[Kind] = ["cond", "cond both", "nested", "map"]
After = Literal[
    "", "relu", "tanh", "transpose", "in place", "view", "store", "sum", "turned sum", "product and sum", "dropout",
    "slice in place", "view in place", "cache", "cache rows", "cache slice", "read, write, read", "input", "input sum",
]  # fmt: skip
AFTER: list[After] = [
    "", "", "relu", "tanh", "transpose", "in place", "view", "store", "sum", "turned sum", "product and sum", "dropout",
    "slice in place", "view in place", "cache", "cache rows", "cache slice", "read, write, read", "input", "input sum",
]  # fmt: skip
CACHED: list[After] = ["cache", "cache rows", "cache slice", "read, write, read"]
"""These kinds mutate a buffer [4, n]."""
OUT = (3, 64)
"""The shape of the input that a program may mutate: some weights have 64 rows or columns."""


@dataclass(frozen=True)
class Weight:
    """A quantized weight [n, k]: blocks of ``group`` along k, integers ``low`` to ``high``."""

    n: int
    k: int
    group: int
    low: int
    high: int
    zero_points: str | None
    wide_scale: bool
    tied_to: int | None
    floats: str = ""
    """"float8" or "float4" for numbers in place of integers."""


STACK = 3
"""Experts in a stack, each [32, k]."""
INT4 = Weight(32, 32, 32, -8, 7, "zero", False, None)
"""A linear quantized by torchao's own configuration; its N and K are arbitrary."""


@dataclass(frozen=True)
class Read:
    """A read of a weight: its kind, and whether its operand is a vector."""

    kind: Kind
    weight: Weight
    vector: bool = False


@dataclass(frozen=True)
class Step:
    """One read of weight ``weight`` by value ``source``, both modulo the number that fit, and the use of its result.

    The result of an unused step is no output; a later step may read it.
    """

    kind: Kind
    weight: int
    source: int
    after: After
    unused: bool = False
    write: int = 0
    """The mutation in attention: 0 none, 1 q before, 2 k and v after, 3 the result."""


@dataclass(frozen=True)
class Plan:
    """A model, the options of its export, and the target of its rewrite."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    dynamic: bool
    weights: tuple[Weight, ...]
    steps: tuple[Step, ...]
    decomposed: bool
    target: str
    fused: bool
    seed: int


@st.composite
def weights(draw: Callable[[Any], Any], earlier: int) -> Weight:
    """A weight; now and then one that shares its integers with an earlier one."""
    k = draw(st.sampled_from([32, 64, 96]))
    low, high = draw(st.sampled_from([(-8, 7), (-8, 7), (-8, 7), (0, 15), (-4, 3), (-128, 127)]))
    return Weight(
        n=draw(st.sampled_from([32, 64, 20])),
        k=k,
        group=draw(st.sampled_from([32, k, 16])),
        low=low,
        high=high,
        zero_points=draw(st.sampled_from(["zero", "random", None])),
        wide_scale=draw(st.booleans()),
        tied_to=draw(st.sampled_from([None, None, *range(earlier)])),
        floats=draw(st.sampled_from(["", "", "", "", "", "float8", "float4"])),
    )


@st.composite
def plans(draw: Callable[[Any], Any]) -> Plan:
    """Plans of up to three weights and three steps that read them."""
    held = tuple(draw(weights(index)) for index in range(draw(st.integers(1, 3))))
    kinds = KINDS + EXPERTS + (2 * BRANCHES if draw(st.integers(0, 14)) == 0 else [])
    step = st.builds(
        Step,
        st.sampled_from(kinds),
        st.integers(0, 9),
        st.integers(0, 9),
        st.sampled_from(AFTER),
        st.sampled_from([False, False, True]),
        st.integers(0, 3),
    )
    rank = draw(st.integers(1, 4))
    return Plan(
        # The width fits some weight.
        shape=(*(draw(st.integers(2, 3)) for _ in range(rank - 1)), draw(st.sampled_from([w.k for w in held]))),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float32])),
        dynamic=rank > 1 and draw(st.booleans()),
        weights=held,
        steps=tuple(draw(st.lists(step, min_size=1, max_size=3))),
        decomposed=draw(st.booleans()),
        target=draw(st.sampled_from(["cuda", "cuda", "cpu", "metal", "xnnpack"])),
        fused=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


class Log:
    """The reads of a model in a trace; torch.export restores lists of a module, but not this object."""

    def __init__(self) -> None:
        self.reads: list[Read] = []


class Floats(nn.Module):
    """A linear whose weight has 8-bit or 4-bit floats."""

    def __init__(self, weight: Weight, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.bits, self.group, self.dtype = 8 if weight.floats == "float8" else 4, weight.group, dtype
        numbers = torch.randn(weight.n, weight.k, generator=random).to(torch.float8_e4m3fn)
        codes = torch.randint(0, 256, (weight.n, weight.k // 2), generator=random).to(torch.uint8)
        self.register_buffer("data", numbers if self.bits == 8 else codes)
        scale = torch.rand(weight.n, weight.k // weight.group, generator=random) * 0.1 + 0.05
        self.register_buffer("scale", scale if self.bits == 8 else scale.to(torch.float8_e4m3fn))
        self.register_buffer("bias", torch.randn(weight.n, generator=random).to(dtype))

    def weight(self) -> Tensor:
        """The dequantized weight."""
        ops = torch.ops.et_cuda_passes
        if self.bits == 8:
            result: Tensor = ops.dequantize_float8(self.data, self.scale, self.dtype)
        else:
            result = ops.dequantize_float4(self.data, self.scale, None, self.group, self.dtype)
        return result

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)


def quantized(x: Tensor) -> Tensor:
    """``x`` as torchao quantizes activations while a program runs: to 8 bits, with a scale and a zero point a row."""
    ao, block = torch.ops.torchao, [*(1 for _ in x.shape[:-1]), x.shape[-1]]
    scale, zero = ao.choose_qparams_affine(
        x, "ASYMMETRIC", block, torch.int8, -128, 127, None, torch.float32, torch.int8
    )
    integers = ao.quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
    return ao.dequantize_affine(integers, block, scale, zero, torch.int8, -128, 127, output_dtype=x.dtype)


class Generated(nn.Module):
    """The model of a plan.

    Args:
        plan: the plan.
        activations: whether the activations of plain linears are quantized while the model runs.
    """

    def __init__(self, plan: Plan, activations: bool = False) -> None:
        # The plans are drawn in a process without the package: see `draw` in tests/replay.py.
        from et_cuda_passes.testing import Experts, Quantized

        super().__init__()
        self.plan, self.activations = plan, activations
        self.log = Log()
        torch.manual_seed(plan.seed)
        self.held = nn.ModuleList()
        for index, weight in enumerate(plan.weights):
            if weight.floats:
                self.held.append(Floats(weight, plan.dtype, 10 * plan.seed + index))
                continue
            scale_dtype = torch.float32 if weight.wide_scale else plan.dtype
            module = Quantized(
                weight.n,
                weight.k,
                weight.group,
                weight.low,
                weight.high,
                plan.dtype,
                scale_dtype,
                weight.zero_points,
                seed=10 * plan.seed + index,
            )
            tied = None if weight.tied_to is None else self.held[weight.tied_to]
            tied = None if isinstance(tied, Floats) else tied
            if (
                tied is not None
                and tied.data.shape == module.data.shape
                and (tied.low, tied.high)
                == (
                    weight.low,
                    weight.high,
                )
            ):
                module.data = tied.data
            self.held.append(module)
        self.subclass = nn.ModuleDict(
            {str(k): nn.Linear(k, 32, dtype=plan.dtype) for k in (32, 64, 96) if self._has("subclass")}
        )
        self.stacks = nn.ModuleDict(
            {str(k): Experts(lambda w: w, dtype=plan.dtype, shape=(STACK, 32, k)) for k in (32, 64, 96)}
            if any(self._has(kind) for kind in EXPERTS)
            else {}
        )
        # One scale an expert, or groups of 32 along either axis.
        self.square = Experts(lambda w: w, (1, 32, 32), dtype=plan.dtype, shape=(STACK, 32, 32))
        quantize_(self, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
        for n in self._widths() if self._has("store") else ():
            self.register_buffer(f"stored{n}", torch.zeros((), dtype=plan.dtype))
        for n in self._widths() if any(map(self._has, [*CACHED, "no_grad write"])) else ():
            self.register_buffer(f"cache{n}", torch.linspace(-1, 1, 4 * n).view(4, n).to(plan.dtype))

    def _has(self, what: str) -> bool:
        return any(what in (step.kind, step.after) for step in self.plan.steps)

    def _widths(self) -> list[int]:
        return sorted({32, *(size for weight in self.plan.weights for size in (weight.n, weight.k))})

    def forward(self, x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        # The input selects the branch: it is equal before and after a rewrite, to the last bit.
        choice, values, outputs = (x.sum() > 0, x.amax() > 1), [x], []
        for step in self.plan.steps:
            value = values[step.source % len(values)]
            made = self.read(step, value, *choice)
            if made is None:
                continue
            values.append(self.after(step.after, made))
            if not step.unused:
                outputs.append(values[-1])
            if step.after in ("input", "input sum"):
                self.write_input(step.after, made, out)
                values.append(out)
        # Inputs are not returned as outputs.
        return tuple(outputs) or (x + 1,)

    @staticmethod
    def write_input(what: After, y: Tensor, out: Tensor) -> None:
        """The largest magnitudes in ``y``'s columns, written to or added to as many columns of ``out``."""
        part = out[:, : y.shape[-1]]
        rows = y.detach().abs().reshape(-1, y.shape[-1]).amax(0)[: part.shape[-1]]
        if what == "input":
            part.copy_(rows)
        else:
            part += rows * 0.5

    def read(self, step: Step, x: Tensor, positive: Tensor, large: Tensor) -> Tensor | None:
        """One read of a weight that fits ``x``, two or three if both branches read one; None if no weight fits."""
        k = x.shape[-1]
        if step.kind == "subclass":
            if str(k) not in self.subclass:
                return None
            self.log.reads.append(Read("subclass", INT4))
            y: Tensor = self.subclass[str(k)](x)
            return y
        if step.kind in EXPERTS:
            # torch exports grouped mm only in these dtypes.
            if str(k) not in self.stacks or (step.kind == "grouped experts" and x.dtype is not torch.bfloat16):
                return None
            if step.kind == "both ways":
                if k != 32:
                    return None
                self.log.reads += [Read(step.kind, INT4)] * 2
                return self.experts(step.kind, self.square(), x)
            self.log.reads.append(Read(step.kind, INT4))
            return self.experts(step.kind, self.stacks[str(k)](), x)
        fitting = [i for i, weight in enumerate(self.plan.weights) if weight.k == k]
        if not fitting:
            return None
        index = fitting[step.weight % len(fitting)]
        module: Any = self.held[index]
        kind: Kind = "linear" if step.kind == "map" and x.dim() == 1 else step.kind
        times = {"cond both": 2, "nested": 3, "gate": 2}.get(kind, 1)
        self.log.reads += [Read(kind, self.plan.weights[index], vector=x.dim() == 1)] * times
        return self.use(kind, module, x, positive, large, step.write)

    @staticmethod
    def attention(y: Tensor, write: int) -> Tensor:
        """Attention of heads of 16 or 20 over the rows of ``y [..., n]``; ``write`` as in :class:`Step`."""
        size = 16 if y.shape[-1] % 16 == 0 else y.shape[-1]
        heads = y.reshape(1, -1, y.shape[-1] // size, size)
        q, k, v = (heads * factor for factor in (1.0, 0.5, 2.0))
        if write == 1:
            q.mul_(0.25)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        result = F.scaled_dot_product_attention(q, k, v)
        if write == 2:
            k.add_(1)
            v[:, :, :1].zero_()
        if write == 3:
            result += 1
        return result.transpose(1, 2).reshape(y.shape)

    def use(self, kind: Kind, module: Any, x: Tensor, positive: Tensor, large: Tensor, write: int = 0) -> Tensor:
        """``module``'s weight read in the way of ``kind``."""

        def inner(y: Tensor) -> Tensor:
            return torch.cond(large, lambda z: module(z), lambda z: module(z) * 2, (y,))

        if self.activations and kind in ("linear", "no bias"):
            x = quantized(x)
        match kind:
            case "lookup":
                return F.embedding(torch.tensor([0, 1]), module.weight())
            case "matmul":
                return x @ module.weight().t()
            case "no bias":
                return F.linear(x, module.weight())
            case "written bias":
                bias = module.bias * 1
                y = F.linear(x, module.weight(), bias)
                bias.add_(5)
                return y
            case "wide bias":
                rows = x.reshape(-1, x.shape[-1])
                wide = torch.addmm(module.bias * rows.amax(1, keepdim=True), rows, module.weight().t())
                return wide.reshape(*x.shape[:-1], -1)
            case "gate":
                return F.silu(module(x)) * F.linear(x, module.weight())
            case "no_grad":
                with torch.no_grad():
                    return module(x)
            case "no_grad write":
                cache = getattr(self, f"cache{module.data.shape[0]}")
                with torch.no_grad():
                    y = module(x)
                    cache[1:3] = y.reshape(-1, y.shape[-1])[0]
                    return y
            case "attention":
                return self.attention(module(x), write)
            case "cond":
                n = module.data.shape[0]
                return torch.cond(
                    positive, module, lambda y: y.sum(-1, keepdim=True).expand(*y.shape[:-1], n) * 1, (x,)
                )
            case "cond both":
                return torch.cond(positive, lambda y: module(y), lambda y: module(y + 1), (x,))
            case "nested":
                return torch.cond(positive, inner, lambda y: torch.tanh(module(y)), (x,))
            case "map":
                return over(lambda row: module(row), x)
        return module(x)

    def experts(self, kind: Kind, weight: Tensor, x: Tensor) -> Tensor:
        """``x`` times one expert, as it is; times all or some, as rows."""
        if kind == "expert":
            return F.linear(x, weight[1])
        rows, ids = x.reshape(-1, x.shape[-1]), torch.tensor([2, 0])
        if kind == "all experts":
            return rows @ weight.mT
        if kind == "both ways":
            return rows @ weight.mT + rows @ weight
        if kind == "chosen experts":
            return torch.bmm(rows.expand(2, *rows.shape), weight[ids].mT)
        # Rows beyond the last offset are undefined.
        return F.grouped_mm(rows.repeat(2, 1)[:2], weight.mT, offs=torch.tensor([1, 1, 2], dtype=torch.int32))

    def after(self, what: After, y: Tensor) -> Tensor:
        """The use of a result."""
        weight = self.log.reads[-1].weight
        # With weights of one sign, a relu would leave only values near 0, whose digits are uncertain.
        if what == "relu" and (weight.low < 0 or weight.zero_points == "random"):
            return torch.relu(y)
        if what == "tanh":
            # The argument is at most 1: for larger numbers only the error of values near 0 would remain.
            return torch.tanh(y / y.abs().amax().clamp_min(1))
        if what == "transpose" and y.dim() > 2:
            return y.transpose(0, 1) * 2
        if what == "in place":
            return y.add_(1)
        if what in ("sum", "product and sum"):
            other = torch.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype).expand_as(y) * 1
            return y + other if what == "sum" else y * other + other
        if what == "turned sum" and y.dim() > 2:
            other = torch.linspace(0.5, 1.5, y.shape[0], dtype=y.dtype).expand(y.shape[::-1]) * 1
            return (other.permute(*reversed(range(y.dim()))) + y).transpose(0, -1).flatten(1)
        if what == "dropout":
            # In eval mode it returns its input.
            same = F.dropout(y, 0.1, training=False)
            same += 1
            return y
        if what == "view" and y.dim() > 1:
            return y.view((*y.shape[:-1], y.shape[-1] // 4, 4)).flatten(-2)
        if what == "slice in place":
            y[..., 1:3].mul_(2)
        if what == "view in place":
            y.view(-1)[:2].add_(1)
        if what in CACHED:
            return self.cached(what, y)
        if what == "store" and hasattr(self, f"stored{y.shape[-1]}"):
            getattr(self, f"stored{y.shape[-1]}").copy_(y.detach().abs().amax())
        return y

    def cached(self, what: After, y: Tensor) -> Tensor:
        """``y`` with the rows of a cache, some of which ``y`` overwrites before or between."""
        cache, row = getattr(self, f"cache{y.shape[-1]}"), y.detach().reshape(-1, y.shape[-1])[:1]
        before = cache.sum(0) if what == "read, write, read" else 0
        if what == "cache":
            cache.index_copy_(0, torch.tensor([2]), row)
        elif what == "cache rows":
            cache[torch.tensor([0, 3])] = row.expand(2, -1)
        else:
            cache[1:3].copy_(row)
        return y + before + cache[2] * 0.5


def example(plan: Plan, seed: int = 0, rows: int | None = None, sign: int = 1) -> Tensor:
    """An input of ``plan``; ``rows`` is another length for a dynamic dimension."""
    random = torch.Generator().manual_seed(seed)
    shape = plan.shape if rows is None or not plan.dynamic else (rows, *plan.shape[1:])
    return (torch.randn(shape, generator=random) + sign * 0.5).to(plan.dtype)


def inputs(plan: Plan, seed: int = 0, rows: int | None = None, sign: int = 1) -> tuple[Tensor, Tensor]:
    """The example input, and the input that the program may mutate."""
    return example(plan, seed, rows, sign), torch.linspace(-1, 1, 3 * 64).view(OUT).to(plan.dtype)


def exported(plan: Plan, activations: bool = False) -> tuple[ExportedProgram, list[Read]]:
    """The program of ``plan``, and its reads of weights; rejects a plan that torch itself does not export."""
    model = Generated(plan, activations)
    rows = ({0: Dim("rows", min=2, max=16)}, None) if plan.dynamic else None
    try:
        program = torch.export.export(model, inputs(plan), dynamic_shapes=rows)
    except TorchDynamoException:
        # torch fails for the strides of results of some branches and maps with dynamic sizes.
        reject()
    except AttributeError as error:
        # no_grad beside nested branches: torch looks for the graph of a branch in the wrong module.
        if not re.search(r"'(true|false)_graph_\d+'$", str(error)):
            raise
        reject()
    return (program.run_decompositions({}) if plan.decomposed else program), model.log.reads


def has_kernel(read: Read, plan: Plan) -> bool | None:
    """Whether the documentation promises the rewrite of ``read``; None if it says nothing."""
    weight = read.weight
    if plan.target == "xnnpack":
        return True
    if plan.target == "metal" and read.kind in EXPERTS[1:]:
        return False
    if weight.floats:
        if plan.target != "cuda":
            # A fold needs no kernel. The table of an embedding in 4-bit floats is packed as one of int8.
            return True
        if read.kind == "lookup" or plan.dtype not in (torch.bfloat16, torch.float16):
            return None if read.kind == "lookup" else False
        return None if read.kind == "matmul" and read.vector else True
    int4 = weight.high - weight.low <= 15 and weight.group % 32 == 0
    in_dtype = plan.target != "cuda" or plan.dtype in (torch.bfloat16, torch.float16)
    if read.kind == "lookup":
        # Tables of 5 to 8 bits, and tables that are stored as such, have other conditions.
        return (int4 and in_dtype) or None
    # Up to 8 bits and groups of 16 cover all drawn weights.
    int8 = plan.target == "cuda"
    if not (int4 or int8) or not in_dtype or (plan.target == "cpu" and read.kind in BRANCHES):
        # The CPU also has an int8 linear, for some weights that its int4 linear does not support.
        return None if plan.target == "cpu" else False
    # A vector times a matrix may be exported as another operator than a linear.
    return None if read.kind == "matmul" and read.vector else True

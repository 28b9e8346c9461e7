"""The operators that a method may run outside its delegates, executed by torch's own kernels.

An operator of ExecuTorch's portable library has the name and the schema of one of torch's, and writes its results into
arguments. Its call in a .pte has a value for each argument of the schema, and then a value for the result: the written
argument again, or a list of the written arguments if there are several. The operators of ExecuTorch's own, which have
no counterpart in torch, are defined here.

Only the operators in this file run: a name in a .pte chooses one of them and is never looked up elsewhere.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from et_cuda_passes.delegate.files import DTYPES, DelegateError
from et_cuda_passes.delegate.plan import Kernel, Value

# Those of ExecuTorch 1.5's portable library that take real numbers and whose result is determined by their arguments,
# except for the backward operators.
_TORCH_NAMES = """
    _adaptive_avg_pool2d.out _cdist_forward.out _log_softmax.out _native_batch_norm_legit.no_stats_out
    _native_batch_norm_legit_no_training.out _pdist_forward.out _softmax.out _to_copy.out _upsample_bilinear2d_aa.out
    abs.out acos.out acosh.out add.Scalar_out add.out addmm.out alias_copy.out amax.out amin.out any.all_out
    any.dims_out any.out arange.out arange.start_out argmax.out argmin.out as_strided_copy.out asin.out asinh.out
    atan.out atan2.out atanh.out avg_pool2d.out bitwise_and.Scalar_out bitwise_and.Tensor_out
    bitwise_left_shift.Tensor_Scalar_out bitwise_left_shift.Tensor_out bitwise_not.out bitwise_or.Scalar_out
    bitwise_or.Tensor_out bitwise_right_shift.Tensor_Scalar_out bitwise_right_shift.Tensor_out bitwise_xor.Scalar_out
    bitwise_xor.Tensor_out bmm.out cat.out ceil.out clamp.Tensor_out clamp.out clone.out constant_pad_nd.out
    convolution.out copy.out copy_ cos.out cosh.out cumsum.out detach_copy.out diagonal_copy.out div.Scalar_mode_out
    div.Scalar_out div.out div.out_mode elu.out embedding.out empty.out eq.Scalar_out eq.Tensor_out erf.out exp.out
    expand_copy.out expm1.out fill.Scalar_out fill.Tensor_out flip.out floor.out floor_divide.out fmod.Scalar_out
    fmod.Tensor_out full.out full_like.out gather.out ge.Scalar_out ge.Tensor_out gelu.out glu.out grid_sampler_2d.out
    gt.Scalar_out gt.Tensor_out hardtanh.out index.Tensor_out index_put.out index_put_ index_select.out isinf.out
    isnan.out le.Scalar_out le.Tensor_out leaky_relu.out lift_fresh_copy.out linear.out log.out log10.out log1p.out
    log2.out logical_and.out logical_not.out logical_or.out logical_xor.out logit.out lt.Scalar_out lt.Tensor_out
    masked_fill.Scalar_out masked_scatter.out masked_select.out max.dim_max max.unary_out max_pool2d_with_indices.out
    maximum.out mean.dtype_out mean.out min.dim_min min.unary_out minimum.out mm.out mul.Scalar_out mul.out
    narrow_copy.out native_group_norm.out native_layer_norm.out ne.Scalar_out ne.Tensor_out neg.out nonzero.out ones.out
    permute_copy.out pixel_shuffle.out pixel_unshuffle.out pow.Scalar_out pow.Tensor_Scalar_out pow.Tensor_Tensor_out
    prod.int_out prod.out reciprocal.out reflection_pad1d.out reflection_pad2d.out reflection_pad3d.out relu.out
    remainder.Scalar_out remainder.Tensor_out repeat.out repeat_interleave.Tensor_out replication_pad1d.out
    replication_pad2d.out replication_pad3d.out roll.out round.out rsqrt.out rsub.Scalar_out scalar_tensor.out
    scatter.src_out scatter.value_out scatter_add.out select_copy.int_out select_scatter.out sigmoid.out sign.out
    sin.out sinh.out slice_copy.Tensor_out slice_scatter.out split_with_sizes_copy.out sqrt.out squeeze_copy.dim_out
    squeeze_copy.dims_out stack.out sub.Scalar_out sub.out sum.IntList_out t_copy.out tan.out tanh.out topk.values
    transpose_copy.int_out tril.out trunc.out unbind_copy.int_out unfold_copy.out unsqueeze_copy.out
    upsample_bilinear2d.vec_out upsample_nearest2d.vec_out var.correction_out var.out var_mean.correction_out
    view_copy.out where.self_out zeros.out
"""
_TORCH_OPERATORS = frozenset(f"aten::{name}" for name in _TORCH_NAMES.split())


def _copy(source: Tensor, non_blocking: bool, dim_order: list[int] | None, *, out: Tensor) -> None:
    out.resize_(source.shape).copy_(source)


def _empty(size: list[int], dim_order: list[int] | None, *, out: Tensor) -> None:
    out.resize_(size)


def _split(source: Tensor, size: int, dim: int, *, out: list[Tensor]) -> None:
    # torch's operator of this name does not resize the written arguments.
    for tensor, part in zip(out, source.split(size, dim), strict=True):
        tensor.resize_(part.shape).copy_(part)


_DIM_ORDER_COPY = "(Tensor self, *, bool non_blocking=False, int[]? dim_order=None, Tensor(a!) out) -> Tensor(a!)"

# By schema. A function without a written argument returns its result.
_OWN_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "aten::_local_scalar_dense(Tensor self) -> Scalar": Tensor.item,
    "aten::split_copy.Tensor_out(Tensor self, int split_size, int dim=0, *, Tensor(a!)[] out) -> ()": _split,
    "aten::sym_numel(Tensor self) -> int": Tensor.numel,
    "aten::sym_size.int(Tensor self, int dim) -> int": Tensor.size,
    f"dim_order_ops::_clone_dim_order.out{_DIM_ORDER_COPY}": _copy,
    "dim_order_ops::_empty_dim_order.out(int[] size, *, int[]? dim_order=None, Tensor(a!) out) -> Tensor(a!)": _empty,
    f"dim_order_ops::_to_dim_order_copy.out{_DIM_ORDER_COPY}": _copy,
    "executorch_prim::et_view(Tensor(a) self, int[] size) -> Tensor(a)": Tensor.view,
    "executorch_prim::add.Scalar(Scalar a, Scalar b) -> Scalar": operator.add,
    "executorch_prim::ceil.Scalar(Scalar a) -> Scalar": math.ceil,
    "executorch_prim::eq.Scalar(Scalar a, Scalar b) -> bool": operator.eq,
    "executorch_prim::floordiv.Scalar(Scalar a, Scalar b) -> Scalar": operator.floordiv,
    "executorch_prim::floordiv.int(int a, int b) -> int": operator.floordiv,
    "executorch_prim::ge.Scalar(Scalar a, Scalar b) -> bool": operator.ge,
    "executorch_prim::gt.Scalar(Scalar a, Scalar b) -> bool": operator.gt,
    "executorch_prim::le.Scalar(Scalar a, Scalar b) -> bool": operator.le,
    "executorch_prim::lt.Scalar(Scalar a, Scalar b) -> bool": operator.lt,
    "executorch_prim::mod.Scalar(Scalar a, Scalar b) -> Scalar": operator.mod,
    "executorch_prim::mod.int(int a, int b) -> int": operator.mod,
    "executorch_prim::mul.Scalar(Scalar a, Scalar b) -> Scalar": operator.mul,
    "executorch_prim::neg.Scalar(Scalar a) -> Scalar": operator.neg,
    "executorch_prim::round.Scalar(Scalar a) -> Scalar": round,
    "executorch_prim::sub.Scalar(Scalar a, Scalar b) -> Scalar": operator.sub,
    "executorch_prim::sym_float.Scalar(Scalar a) -> Scalar": float,
    "executorch_prim::sym_int.Scalar(Scalar a) -> Scalar": int,
    "executorch_prim::sym_ite.Scalar(Scalar b, Scalar t, Scalar f) -> Scalar": lambda b, t, f: t if b else f,
    "executorch_prim::sym_max.Scalar(Scalar a, Scalar b) -> Scalar": max,
    "executorch_prim::sym_min.Scalar(Scalar a, Scalar b) -> Scalar": min,
    "executorch_prim::sym_not.Scalar(Scalar a) -> bool": operator.not_,
    "executorch_prim::truediv.Scalar(Scalar a, Scalar b) -> Scalar": operator.truediv,
    "executorch_prim::trunc.Scalar(Scalar a) -> Scalar": math.trunc,
}
_OWN_SCHEMAS = {schema.partition("(")[0]: schema for schema in _OWN_OPERATORS}

OPERATORS = _TORCH_OPERATORS | _OWN_SCHEMAS.keys()
"""The names of the operators that run, with their overloads."""

_WITH_DATA = """
    _native_batch_norm_legit.no_stats_out index.Tensor_out masked_select.out nonzero.out repeat_interleave.Tensor_out
"""
_SIZED_WITH_DATA = frozenset(f"aten::{name}" for name in _WITH_DATA.split())

# The kinds of values that an argument of a type may have; None in addition if the argument is optional.
_KINDS = {
    "Tensor": ("tensor",),
    "int": ("int",),
    "float": ("float", "int"),
    "bool": ("bool",),
    "number": ("int", "float", "bool"),
    "str": ("str",),
    "List[int]": ("list of int",),
    "List[float]": ("list of float",),
    "List[bool]": ("list of bool",),
    "List[Tensor]": ("list of tensors",),
    "List[Optional[Tensor]]": ("list of optional tensors",),
}
_ITEM_KINDS = {"list of int": "int", "list of tensors": "tensor", "list of optional tensors": "tensor"}
_MAX_INT = 1 << 63

Values = Mapping[int, Any]


@dataclass(frozen=True)
class Argument:
    """An argument of an operator: the values that it has, by index.

    Attributes:
        name: its keyword; None if it is positional.
        indices: the index of a value, or those of the items of a list; -1 is None.
        literal: the value itself if it is a list of numbers that are not values of the method, or None.
        is_list: whether it is a list.
        is_dtype: whether it is an integer that stands for a dtype.
    """

    name: str | None
    indices: tuple[int, ...]
    literal: tuple[float, ...] | None
    is_list: bool
    is_dtype: bool

    def of(self, values: Values) -> Any:
        """The argument, with the current ``values`` of the method."""
        if self.literal is not None:
            return list(self.literal)
        if self.is_list:
            return [None if index < 0 else values[index] for index in self.indices]
        if not self.indices:
            return None
        value = values[self.indices[0]]
        if self.is_dtype and value is not None:
            if value not in DTYPES:
                raise ValueError(f"dtype {value} does not exist")
            return DTYPES[value]
        return value


@dataclass(frozen=True)
class Operation:
    """A call of an operator, checked against its schema.

    Attributes:
        name: the name of the operator.
        function: torch's operator, or a function of this file.
        arguments: what it reads.
        results: the value of each result.
        outs: for each result, the keyword of the argument that it is written to. Empty if the function returns it.
        out_is_list: whether the only such argument is a list of all results.
        mutated: the values that it writes to in place.
        alias_of: the value that the result is a view of.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Argument, ...]
    results: tuple[int, ...]
    outs: tuple[str, ...]
    out_is_list: bool
    mutated: tuple[int, ...]
    alias_of: int | None

    def reads(self) -> Iterator[int]:
        """The values that must exist before the call."""
        for argument in self.arguments:
            yield from (index for index in argument.indices if index >= 0)

    def sizes(self, values: Values, outs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Compute the sizes of the results without the results, for the arguments of :meth:`__call__`.

        Returns:
            Tensors with the sizes and dtypes of the results, of one element in memory. None for an operator whose
            results are in no argument, or have sizes that torch computes only together with the data.

        Raises:
            DelegateError: the operator fails.
        """
        if not self.outs or self.name in _SIZED_WITH_DATA:
            return ()
        planned = [out.to("meta") for out in outs]
        self({index: _without_data(values[index]) for index in self.reads()}, planned)
        return [torch.empty((), dtype=each.dtype).expand(each.shape) for each in planned]

    def __call__(self, values: Values, outs: Sequence[Tensor]) -> list[Any]:
        """Run the operator.

        Args:
            values: the values of the method.
            outs: an empty tensor of the dtype of each result, if the operator writes its results into arguments.

        Returns:
            The results.

        Raises:
            DelegateError: the operator fails.
        """
        positional = [argument.of(values) for argument in self.arguments if argument.name is None]
        keywords = {argument.name: argument.of(values) for argument in self.arguments if argument.name is not None}
        if self.outs:
            keywords |= {self.outs[0]: list(outs)} if self.out_is_list else dict(zip(self.outs, outs, strict=True))
        result = self.function(*positional, **keywords)
        if self.outs:
            return list(outs)
        if self.mutated:
            return []
        if isinstance(result, int) and not -_MAX_INT <= result < _MAX_INT:
            raise ValueError(f"{result} needs more than 64 bits")
        return [result]


def _without_data(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@cache
def find_operator(name: str) -> tuple[torch.FunctionSchema, Callable[..., Any]]:
    """The schema and the function of an operator in :data:`OPERATORS`."""
    if name in _OWN_SCHEMAS:
        text = _OWN_SCHEMAS[name]
        return torch._C.parse_schema(text), _OWN_OPERATORS[text]
    packet, _, overload = name.removeprefix("aten::").partition(".")
    function = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return function._schema, function


def bind(kernel: Kernel, values: Sequence[Value]) -> Operation:
    """Check the call of an operator in :data:`OPERATORS` against the operator's schema.

    Args:
        kernel: the call.
        values: the values of the method, whose types are checked.

    Raises:
        DelegateError: the call does not fit the schema.
    """
    name = kernel.name
    schema, function = find_operator(name)
    expected = len(schema.arguments) + 1
    if len(kernel.args) != expected:
        raise DelegateError(f"{name} has {len(kernel.args)} values, but its schema {schema} needs {expected}")
    arguments, outs, out_is_list, mutated = [], [], False, []
    results: tuple[int, ...] = ()
    alias_of = None
    for argument, index in zip(schema.arguments, kernel.args[:-1], strict=True):
        value = values[index]
        kinds = kinds_of(str(argument.type))
        if value.kind not in kinds:
            raise DelegateError(
                f"{name} has value {index}, {value}, as its argument {argument.name!r}, which must be "
                f"{' or '.join(kinds)}"
            )
        item_kind = _ITEM_KINDS.get(value.kind)
        for item in value.items if item_kind else ():
            if item >= 0 and values[int(item)].kind != item_kind:
                raise DelegateError(
                    f"{name} has value {index}, a {value.kind}, as its argument {argument.name!r}, but the item that "
                    f"is value {item} is {values[int(item)]}"
                )
        items = tuple(int(item) for item in value.items) if item_kind else ()
        indices = items if value.is_list else (index,)
        if argument.is_out:
            outs.append(argument.name)
            out_is_list |= value.is_list
            results += indices
            continue
        if argument.alias_info is not None:
            if argument.alias_info.is_write:
                mutated.append(index)
            else:
                alias_of = index
        literal = value.items if value.is_list and not item_kind else None
        if argument.name == "memory_format" or value.kind == "None":
            # The result has the dim order of its value in any case.
            indices = ()
        keyword = argument.name if argument.kwarg_only else None
        is_dtype = argument.name == "dtype"
        arguments.append(Argument(keyword, indices, literal, value.is_list, is_dtype))
    results = _check_result(kernel, values, results, mutated, out_is_list, schema)
    return Operation(name, function, tuple(arguments), results, tuple(outs), out_is_list, tuple(mutated), alias_of)


def kinds_of(text: str) -> tuple[str, ...]:
    """The kinds of values that an argument of a type may have."""
    if text.startswith("Optional["):
        return (*_KINDS[text.removeprefix("Optional[").removesuffix("]")], "None")
    return _KINDS[text]


def _check_result(
    kernel: Kernel,
    values: Sequence[Value],
    results: tuple[int, ...],
    mutated: Sequence[int],
    out_is_list: bool,
    schema: torch.FunctionSchema,
) -> tuple[int, ...]:
    """The values of the results, which the last value of the call must agree with."""
    name, last = kernel.name, kernel.args[-1]
    value = values[last]
    if results or out_is_list:
        named = tuple(int(item) for item in value.items) if value.kind == "list of tensors" else (last,)
        if named != results or len(set(results)) != len(results):
            raise DelegateError(f"{name} writes to values {list(results)}, but its result is value {last}, {value}")
        return results
    if mutated:
        if [last] != list(mutated):
            raise DelegateError(f"{name} writes to values {list(mutated)}, but its result is value {last}, {value}")
        return ()
    wanted = ("tensor",) if str(schema.returns[0].type) == "Tensor" else ("int", "float", "bool")
    if value.kind not in wanted:
        raise DelegateError(f"{name} writes its result to value {last}, {value}, which must be {' or '.join(wanted)}")
    return (last,)


# Errors of torch's operators and of arithmetic, all of which a damaged file can cause.
FAILURES = (RuntimeError, AssertionError, IndexError, TypeError, ValueError, ArithmeticError, MemoryError)

"""Checks expressions of sizes and guards, Python source that torch evaluates: only arithmetic is allowed."""

import ast
import re

from et_cuda_passes.executorch.archive_zip import Refused, short

_LONGEST = 20_000
# Largest number of bits in the numbers that sympy computes while it parses.
_MOST_BITS = 4096
# torch's names of backed and unbacked sizes and floats.
_SYMBOL = re.compile(r"(s|u|f|i|zf|zuf)\d{1,18}", re.ASCII)
_CONSTANTS = frozenset(("oo", "zoo", "nan", "int_oo", "true", "false"))
_ASSUMPTIONS = frozenset((
    "integer", "positive", "nonnegative", "negative", "nonpositive", "nonzero", "real", "extended_real",
    "finite", "infinite", "zero", "commutative", "precision", "evaluate",
))  # fmt: skip
# Functions that sympy's srepr and torch's printers write.
_FUNCTIONS = frozenset((
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod", "floor",
    "ceiling", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "Eq",
    "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "ITE", "Piecewise", "ExprCondPair", "FloorDiv",
    "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift",
    "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator",
    "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity",
))  # fmt: skip
_POWERS = frozenset(("Pow", "PowByNatural", "FloatPow", "LShift"))
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
_COMPARED = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_GUARD_CALLS = frozenset(("min", "max", "abs", "int", "float", "round", "bool"))
_MATH = frozenset(("floor", "ceil", "trunc", "sqrt", "isnan", "inf", "pow", "log2"))
_SHAPE = frozenset(("size", "stride", "storage_offset", "dim", "numel"))


def check_expression(text: str, place: str) -> None:
    """Reject an expression of sizes that is more than arithmetic over symbols and numbers."""
    _bits(_parsed(text, place), place)


def check_guard(text: str, place: str) -> None:
    """Reject a guard that is more than comparisons of sizes of the inputs ``L[...]``."""
    _guard(_parsed(text, place), place)


def _parsed(text: str, place: str) -> ast.expr:
    # Only the characters that such source needs: no quotes in quotes, no line breaks, only ASCII.
    if len(text) > _LONGEST or not re.fullmatch(r"[\w .,'=<>!+\-*/%()\[\]&|~]*", text, re.ASCII):
        raise Refused(f"{place} is no arithmetic: {short(text)}")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Refused(f"{place} is no arithmetic: {short(text)}") from None


def _bits(node: ast.expr, place: str, depth: int = 0) -> int:
    """A bound of the bits of the numbers in ``node``. Rejects everything but arithmetic."""
    if depth > 200:
        raise Refused(f"{place} is nested too deeply")

    def inner(child: ast.expr) -> int:
        return _bits(child, place, depth + 1)

    match node:
        case ast.Constant(value=bool()):
            return 1
        case ast.Constant(value=int() | float() as value):
            return _of_number(value, node, place)
        case ast.Name(id=name) if name in _CONSTANTS or _SYMBOL.fullmatch(name):
            return 1
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Invert(), operand=operand):
            return inner(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power([left, right], place, depth)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, (*_ARITHMETIC, ast.BitAnd, ast.BitOr)):
            return _limited(inner(left) + inner(right), node, place)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(isinstance(op, _COMPARED) for op in ops):
            return _limited(inner(left) + sum(map(inner, others)), node, place)
        case ast.Tuple(elts=items):
            return _limited(sum(map(inner, items)), node, place)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords) if name in _FUNCTIONS:
            if not all(_is_assumption(keyword) for keyword in keywords):
                raise Refused(f"{place} is no arithmetic: {short(ast.unparse(node))}")
            if name in ("Symbol", "Float", "Integer") and len(arguments) == 1:
                return _literal(name, arguments[0], place)
            if name in _POWERS:
                return _power(arguments, place, depth)
            return _limited(sum(map(inner, arguments)), node, place)
    raise Refused(f"{place} is no arithmetic: {short(ast.unparse(node))}")


def _is_assumption(keyword: ast.keyword) -> bool:
    """Whether ``keyword`` is like ``integer=True`` of a symbol, or ``precision=53`` of a float."""
    value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
    return keyword.arg in _ASSUMPTIONS and isinstance(value, (bool, int)) and 0 <= value <= 256


def _literal(name: str, argument: ast.expr, place: str) -> int:
    """A symbol from its name, or a number from its digits."""
    match argument:
        case ast.Constant(value=str(text)) if name == "Symbol" and _SYMBOL.fullmatch(text):
            return 1
        case ast.Constant(value=str(text)) if name == "Float" and re.fullmatch(
            r"[+-]?[\d.]{1,40}(e[+-]?\d{1,3})?", text
        ):
            return 1100
        case ast.Constant(value=int() | float()) | ast.UnaryOp(operand=ast.Constant(value=int() | float())) if (
            name != "Symbol"
        ):
            return _bits(argument, place)
    raise Refused(f"{place} is no arithmetic: {short(ast.unparse(argument))}")


def _power(arguments: list[ast.expr], place: str, depth: int) -> int:
    """The bits of a power or a shift. Its second operand must be a small number, or contain symbols."""
    total = sum(_bits(argument, place, depth + 1) for argument in arguments)
    if len(arguments) != 2:
        raise Refused(f"{place} has a power of {len(arguments)} operands")
    exponent = arguments[1]
    parts = list(ast.walk(exponent))
    if any(isinstance(part, ast.Name) and _SYMBOL.fullmatch(part.id) for part in parts) or any(
        isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts
    ):
        return total
    # A number, or a call such as Integer(2) or Rational(1, 2), but no call that computes a larger number.
    numbers = [part.value for part in parts if isinstance(part, ast.Constant)]
    calls = [part for part in parts if isinstance(part, ast.Call | ast.BinOp)]
    if len(calls) > 1 or len(numbers) > 2 or any(isinstance(part, ast.BinOp) for part in calls):
        raise Refused(f"{place} has a power of {short(ast.unparse(exponent))}")
    largest = max((abs(number) for number in numbers if isinstance(number, (int, float))), default=0)
    if largest > 64:
        raise Refused(f"{place} has a power of {short(ast.unparse(exponent))}")
    return _limited(total * max(1, int(largest)), exponent, place)


def _of_number(value: int | float, node: ast.expr, place: str) -> int:
    if isinstance(value, float):
        return 1100 if abs(value) > 2**64 else 64
    return _limited(value.bit_length(), node, place)


def _limited(bits: int, node: ast.expr, place: str) -> int:
    if bits > _MOST_BITS:
        raise Refused(f"{place} computes with numbers that are too large: {short(ast.unparse(node))}")
    return bits


def _guard(node: ast.expr, place: str, depth: int = 0) -> None:
    if depth > 200:
        raise Refused(f"{place} is nested too deeply")
    children: list[ast.expr]
    match node:
        case ast.Constant(value=bool() | int() | float()):
            children = []
        case ast.Name(id="inf"):
            children = []
        case ast.Attribute(value=ast.Name(id="math"), attr=name) if name in _MATH:
            children = []
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not(), operand=operand):
            children = [operand]
        case ast.BoolOp(values=values):
            children = values
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)) if abs(power) <= 64:
            children = [left]
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _ARITHMETIC) and not isinstance(op, ast.Pow):
            children = [left, right]
        case ast.Compare(left=left, ops=ops, comparators=others) if all(isinstance(op, _COMPARED) for op in ops):
            children = [left, *others]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _GUARD_CALLS:
            children = arguments
        case ast.Call(func=ast.Attribute(value=ast.Name(id="math"), attr=name), args=arguments, keywords=[]) if (
            name in _MATH
        ):
            children = arguments
        case _ if _is_source(node):
            children = []
        case _:
            raise Refused(f"{place} is no comparison of sizes: {short(ast.unparse(node))}")
    for child in children:
        _guard(child, place, depth + 1)


def _is_source(node: ast.expr) -> bool:
    """Whether ``node`` is like ``L['x'][0].field``, or a size of such, as ``L['x'].size()[1]``."""
    match node:
        case ast.Name(id="L"):
            return True
        case ast.Subscript(value=value, slice=ast.Constant(value=int() | str())):
            return _is_source(value)
        case ast.Attribute(value=value, attr=name) if not name.startswith("_"):
            return _is_source(value)
        case ast.Call(func=ast.Attribute(value=value, attr=name), args=[], keywords=[]) if name in _SHAPE:
            return _is_source(value)
    return False

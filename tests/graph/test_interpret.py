"""Runs with taps: values are seen in order, replaced, computed again, and freed after their last use."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.graph.interpret import Region, Runner, Tap
from tests.helpers import Sketch, aten


def chain() -> Any:
    """relu(x) * 2 + x, and its cosine."""
    sketch = Sketch()
    x = sketch.input("x", 3)
    y = sketch.call(aten.relu.default, x)
    z = sketch.call(aten.mul.Tensor, y, 2.0)
    out = sketch.call(aten.add.Tensor, z, x)
    return sketch.program(out, sketch.call(aten.cos.default, out))


def nodes(runner: Runner) -> dict[str, Any]:
    return {node.name.removesuffix("_default").removesuffix("_tensor"): node for node in runner.program.graph.nodes}


X = torch.tensor([-1.0, 2.0, 3.0])


def test_run_returns_the_outputs_of_the_program() -> None:
    program = chain()
    runner = Runner(program)
    out, cosine = runner.run(runner.bind((X,)))
    assert torch.equal(out, X.relu() * 2 + X)
    assert torch.equal(cosine, out.cos())


def test_taps_see_values_in_order_and_may_replace_them() -> None:
    runner = Runner(chain())
    node = nodes(runner)
    seen: list[tuple[str, Tensor]] = []

    def tap(name: str, change: float = 0.0) -> Tap:
        def see(value: Tensor, read: Any) -> Tensor:
            seen.append((name, value))
            return value + change

        return Tap(node[name], (), see)

    out, _ = runner.run([X], [tap("mul"), tap("relu", 1.0), tap("relu")])
    assert [name for name, _ in seen] == ["relu", "relu", "mul"]
    assert torch.equal(seen[1][1], X.relu() + 1)
    assert torch.equal(out, (X.relu() + 1) * 2 + X)


def test_replaced_node_computes_with_the_same_arguments() -> None:
    runner = Runner(chain())
    out, _ = runner.run([X], (), {nodes(runner)["mul"]: lambda a, b: a - b})
    assert torch.equal(out, X.relu() - 2 + X)


def test_value_lives_until_its_last_use_by_a_node_or_a_tap() -> None:
    runner = Runner(chain())
    node = nodes(runner)
    refs: dict[str, Any] = {}
    alive: dict[str, bool] = {}

    def keep(name: str) -> Tap:
        def see(value: Tensor, read: Any) -> Tensor:
            refs[name] = weakref.ref(value)
            return value

        return Tap(node[name], (), see)

    def look(value: Tensor, read: Any) -> Tensor:
        alive.update((name, ref() is not None) for name, ref in refs.items())
        return value

    runner.run([X], [keep("relu"), keep("mul"), Tap(node["cos"], (), look)])
    assert alive == {"relu": False, "mul": False}
    read_late = Tap(node["add"], (node["relu"],), lambda value, read: value + 0 * read(node["relu"]))
    runner.run([X], [keep("relu"), keep("mul"), read_late, Tap(node["add"], (), look)])
    assert alive == {"relu": True, "mul": True}


def test_region_computes_from_values_constants_and_replacements() -> None:
    runner = Runner(chain())
    node = nodes(runner)
    region = Region((node["relu"], node["mul"], node["add"]), {node["x"]: node["x"]})
    found: list[Tensor] = []

    def see(value: Tensor, read: Any) -> Tensor:
        found.append(region.compute(read))
        found.append(region.compute(read, {node["mul"]: torch.zeros(3)}))
        return value

    runner.run([X], [Tap(node["cos"], (node["x"],), see)])
    assert torch.equal(found[0], X.relu() * 2 + X)
    assert torch.equal(found[1], X)
    constant = Region((node["add"],), {node["x"]: node["x"]}, {node["mul"]: torch.ones(3)})
    assert torch.equal(constant.compute({node["x"]: X}.__getitem__), 1 + X)


def test_random_numbers_are_those_of_the_seed() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    runner = Runner(torch.export.export(Noise(), (X,)))
    state = torch.random.get_rng_state()
    first, same, other = (runner.run([X], seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_arguments_that_are_no_tensors_may_be_left_out() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float, shift: Tensor | None = None) -> Tensor:
            return x * scale

    runner = Runner(torch.export.export(Scaled(), (X, 3.0)))
    assert runner.bind((X,)) == runner.bind((X, 3.0))
    assert torch.equal(runner.run(runner.bind((X,)))[0], 3 * X)
    with pytest.raises(UsageError, match=r"input 1 \(scale\) is 4.0; the program was exported for 3.0 alone"):
        runner.bind((X, 4.0))


def test_keyword_arguments_follow_the_positional_ones() -> None:
    class Difference(nn.Module):
        def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
            return x - y

    runner = Runner(torch.export.export(Difference(), (X,), {"y": X + 1}))
    assert torch.equal(runner.run(runner.bind((X, 2 * X)))[0], -X)


def test_mutated_input_of_the_caller_is_unchanged() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    runner = Runner(torch.export.export(InPlace(), (X.clone(),)))
    x = X.clone()
    assert torch.equal(runner.run(runner.bind((x,)))[0], 2 * X)
    assert torch.equal(x, X)


def test_region_with_an_operator_without_a_kernel_names_it() -> None:
    with torch.library._scoped_library("et_test_region", "DEF") as library:
        library.define("f(Tensor x) -> Tensor")
        torch.library.register_fake("et_test_region::f", torch.empty_like, lib=library)
        sketch = Sketch()
        x = sketch.input("x", 3)
        y = sketch.call(torch.ops.et_test_region.f.default, x)
        region = Region((y,), {x: x})
        with pytest.raises(UsageError, match=r"the operator et_test_region\.f has no implementation for the device"):
            region.compute(lambda node: torch.ones(3))

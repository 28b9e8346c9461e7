"""Program: the original stays unchanged; names, constants, sharing, mutated buffers, save and load, shapes."""

import copy
import io
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.program import Program
from et_cuda_passes.testing import Quantized, Sketch, assert_rewrites
from tests.helpers import names

aten = torch.ops.aten
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


class Net(torch.nn.Module):
    """One quantized linear ``l`` (64 -> 16) with a bias, used as ``use(linear, input)``."""

    def __init__(self, use: Any = lambda linear, x: linear(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = torch.nn.Linear(64, 16, dtype=torch.bfloat16)
        self.use = use
        quantize_(self, INT4)

    def forward(self, input: Tensor) -> Any:
        return self.use(self.l, input)


X = torch.randn(3, 64, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def plain_use() -> ExportedProgram:
    return torch.export.export(Net(), (X,))


def read_whole(linear: Any, x: Tensor) -> Any:
    """The linear, and another operator that reads its dequantized weight and that no rule matches."""
    return linear(x), linear.weight.dequantize().sum(0)


@pytest.fixture(scope="module")
def also_read() -> ExportedProgram:
    return torch.export.export(Net(read_whole), (X,))


def reloaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def forms(program: ExportedProgram) -> list[ExportedProgram]:
    """With a tensor-subclass parameter, and with the plain parameters of a decomposition."""
    return [program, program.run_decompositions({})]


# Names and constants ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [0, 1], ids=["subclass", "plain"])
def test_packed_constants_are_named_after_the_fqn_of_the_weight(plain_use: ExportedProgram, form: int) -> None:
    program, _ = assert_rewrites(forms(plain_use)[form], expect={"linear_int4": 1})
    assert set(program.state_dict) == {"l.weight.packed", "l.weight.scale_and_zero", "l.bias"}
    signature = program.graph_signature
    assert set(signature.parameters) == set(program.state_dict)
    assert signature.user_inputs == ("input",)
    assert names(program) == ["et_cuda_passes.int4_linear_mma_tiled"]
    (call,) = (n for n in program.graph.nodes if n.op == "call_function")
    assert [a.name for a in call.args[:4]] == ["input", "p_l_weight_packed", "p_l_weight_scale_and_zero", "p_l_bias"]


def test_packed_constants_of_plain_buffers_are_named_after_their_fqn() -> None:
    sketch = Sketch()
    x = sketch.input("x", 2, 64, dtype=torch.bfloat16)
    before = sketch.program(sketch.call(aten.linear.default, x, sketch.weight("deep.w")))
    program, _ = assert_rewrites(before, expect={"linear_int4": 1})
    assert set(program.state_dict) == {"deep.w.data.packed", "deep.w.data.scale_and_zero"}


def test_new_nodes_have_value_source_line_and_provenance(plain_use: ExportedProgram) -> None:
    (old,) = plain_use.graph.find_nodes(op="call_function", target=aten.linear.default)
    program, report = ecp.rewrite(plain_use, "cuda")
    (node,) = (n for n in program.graph.nodes if n.op == "call_function")
    value, was = node.meta["val"], old.meta["val"]
    assert (value.shape, value.dtype, value.device) == (was.shape, was.dtype, was.device)
    assert isinstance(value, torch._subclasses.FakeTensor)
    for key in ("stack_trace", "nn_module_stack"):
        assert node.meta[key] == old.meta[key]
    (source,) = node.meta["from_node"]
    assert (source.name, source.pass_name) == (old.name, "linear_int4")
    assert report.outcomes[0].source.startswith(__file__)
    for placeholder in program.graph.find_nodes(op="placeholder"):
        assert isinstance(placeholder.meta["val"], torch._subclasses.FakeTensor)


def test_copy_without_rewrites_equals_the_original(also_read: ExportedProgram) -> None:
    before = str(also_read.graph), str(also_read.graph_signature)
    program, report = ecp.rewrite(also_read, "cuda", passes=[])
    assert (str(program.graph), str(program.graph_signature)) == before
    assert program is not also_read
    assert program.graph is not also_read.graph
    assert all(program.state_dict[name] is also_read.state_dict[name] for name in also_read.state_dict)
    assert report.bytes_before == report.bytes_after
    theirs = {id(node) for node in also_read.graph.nodes}
    assert not theirs & {id(node) for node in program.graph.nodes}


def test_changing_the_result_does_not_change_the_original(plain_use: ExportedProgram) -> None:
    before = str(plain_use.graph), str(plain_use.graph_signature), list(plain_use.state_dict)
    metas = [dict(node.meta) for node in plain_use.graph.nodes]
    program, _ = ecp.rewrite(plain_use, "cuda", passes=[])
    for node in program.graph.nodes:
        node.meta.clear()
    program.state_dict.clear()
    program.graph_signature.input_specs.clear()
    program.graph.output_node().args = ((),)
    assert (str(plain_use.graph), str(plain_use.graph_signature), list(plain_use.state_dict)) == before
    assert [dict(node.meta).keys() for node in plain_use.graph.nodes] == [meta.keys() for meta in metas]


def test_packed_constant_with_an_existing_name_is_an_error() -> None:
    sketch = Sketch()
    x = sketch.input("x", 2, 64, dtype=torch.bfloat16)
    taken = sketch.parameter("w.data.packed", torch.ones(16, dtype=torch.bfloat16))
    y = sketch.call(aten.linear.default, x, sketch.weight("w"), taken)
    with pytest.raises(Exception, match=r"already has a constant named 'w\.data\.packed'"):
        ecp.rewrite(sketch.program(y), "cuda")


def test_placeholder_with_an_existing_name_gets_another() -> None:
    sketch = Sketch()
    x = sketch.input("p_w_data_packed", 2, 64, dtype=torch.bfloat16)
    program, _ = assert_rewrites(sketch.program(sketch.call(aten.linear.default, x, sketch.weight("w"))))
    assert program.graph_signature.user_inputs == ("p_w_data_packed",)
    assert reloaded(program).graph_signature.user_inputs == ("p_w_data_packed",)


# Weights with other readers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [0, 1], ids=["subclass", "plain"])
def test_weight_with_another_reader_stays_for_it(also_read: ExportedProgram, form: int) -> None:
    before = forms(also_read)[form]
    program, report = assert_rewrites(before, expect={"linear_int4": 1, "missed": 1})
    assert {o.fqn for o in report.outcomes} == {"l.weight"}
    assert {"l.weight.packed", "l.weight.scale_and_zero"} < set(program.state_dict)
    again = reloaded(program)
    for got, wanted in zip(again.module()(X), program.module()(X), strict=True):
        assert torch.equal(got, wanted)
    assert again.state_dict.keys() == program.state_dict.keys()


def test_plain_weight_with_another_reader_stays_for_it() -> None:
    sketch = Sketch()
    weight = sketch.weight("w")
    x = sketch.input("x", 2, 64, dtype=torch.bfloat16)
    data = weight.args[0]
    y = sketch.call(aten.linear.default, x, weight)
    program, _ = assert_rewrites(sketch.program(y, sketch.call(aten.neg.default, data)), expect={"linear_int4": 1})
    assert "w.data.packed" in program.state_dict
    got, wanted = reloaded(program).module()(torch.ones(2, 64, dtype=torch.bfloat16)), program.module()
    assert torch.equal(got[1], wanted(torch.ones(2, 64, dtype=torch.bfloat16))[1])


def test_tied_weights_are_packed_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Net(), Net()
            self.b.l.weight = self.a.l.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    exported = torch.export.export(Tied(), (X,))
    for before in forms(exported):
        program, _ = assert_rewrites(before, expect={"linear_int4": 2, "missed": 0})
        # torch.export reads both through one of the names, and the other one is dropped.
        held = sorted(name for name in program.state_dict if "bias" not in name)
        assert [name.partition(".")[2] for name in held] == ["l.weight.packed", "l.weight.scale_and_zero"]


def test_buffers_that_share_storage_are_packed_once() -> None:
    sketch = Sketch()
    data = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    scale = torch.rand(16, 2, dtype=torch.bfloat16)
    x = sketch.input("x", 2, 64, dtype=torch.bfloat16)
    y = []
    for name in "ab":
        held = sketch.buffer(f"{name}.data", data), sketch.buffer(f"{name}.scale", scale)
        dequantize = torch.ops.torchao.dequantize_affine.default
        weight = sketch.call(dequantize, held[0], [1, 32], held[1], None, torch.int8, -8, 7, torch.bfloat16)
        y.append(sketch.call(aten.linear.default, x, weight))
    program, _ = assert_rewrites(sketch.program(*y), expect={"linear_int4": 2})
    assert sorted(program.state_dict) == ["a.data.packed", "a.data.scale_and_zero"]


# Shared by methods -------------------------------------------------------------------------------------------------


def test_methods_with_one_cache_share_packed_constants() -> None:
    model = Net()
    prefill = torch.export.export(model, (X,))
    model.use = lambda linear, x: linear(x) * 2
    decode = torch.export.export(model, (X[:1],))
    pool = ConstantCache()
    (one, _), (two, _) = (ecp.rewrite(method, "cuda", pool=pool) for method in (prefill, decode))
    for name in ("l.weight.packed", "l.weight.scale_and_zero"):
        assert one.state_dict[name].data_ptr() == two.state_dict[name].data_ptr()
    apart, _ = ecp.rewrite(decode, "cuda")
    assert apart.state_dict["l.weight.packed"].data_ptr() != one.state_dict["l.weight.packed"].data_ptr()
    assert torch.equal(two.module()(X[:1]), apart.module()(X[:1]))


def test_weights_with_the_same_name_are_packed_apart() -> None:
    """A delegate stores constants by FQN: of two different constants with one name, it would lose one silently."""

    def method(seed: int) -> ExportedProgram:
        sketch = Sketch()
        x = sketch.input("x", 2, 64, dtype=torch.bfloat16)
        return sketch.program(sketch.call(aten.linear.default, x, sketch.weight("w", seed=seed)))

    pool = ConstantCache()
    (one, _), (two, _) = (ecp.rewrite(method(seed), "cuda", pool=pool) for seed in (0, 1))
    assert set(one.state_dict) == {"w.data.packed", "w.data.scale_and_zero"}
    assert set(two.state_dict) == {"w.data.packed_2", "w.data.scale_and_zero_2"}
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert not torch.equal(one.module()(x), two.module()(x))


def test_weight_that_changed_between_two_rewrites_is_packed_again() -> None:
    sketch = Sketch()
    x = sketch.input("x", 2, 64, dtype=torch.bfloat16)
    program, pool = sketch.program(sketch.call(aten.linear.default, x, sketch.weight("w"))), ConstantCache()
    rows = torch.randn(2, 64, dtype=torch.bfloat16)
    first, _ = ecp.rewrite(program, "cuda", pool=pool)
    before = first.module()(rows)
    program.state_dict["w.scale"].mul_(2)
    again, _ = ecp.rewrite(program, "cuda", pool=pool)
    assert torch.equal(again.module()(rows), before * 2)
    assert torch.equal(first.module()(rows), before)
    assert set(again.state_dict) == {"w.data.packed", "w.data.scale_and_zero_2"}
    with torch.inference_mode():
        program.state_dict["w.scale"] = program.state_dict["w.scale"].clone()
        third, _ = ecp.rewrite(program, "cuda", pool=pool)
    assert torch.equal(third.module()(rows), before * 2)


# Outputs and buffers -----------------------------------------------------------------------------------------------


def test_rewritten_node_may_be_an_output_several_times_in_any_structure() -> None:
    def use(linear: Any, x: Tensor) -> Any:
        y = linear(x)
        return {"y": y, "list": [y, y.relu()], "x": x}

    exported = torch.export.export(Net(use), (X,))
    for before in forms(exported):
        program, _ = assert_rewrites(before, expect={"linear_int4": 1})
        result = reloaded(program).module()(X)
        assert result.keys() == {"y", "list", "x"}
        assert torch.equal(result["y"], result["list"][0])


class Cache(torch.nn.Module):
    """Copies the result of a quantized linear into a buffer, and returns the sum of the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.register_buffer("seen", torch.zeros(4, 16, dtype=torch.bfloat16))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        self.seen.index_copy_(0, at, self.net(x))
        return self.seen.sum(0)


@pytest.mark.parametrize("form", [0, 1], ids=["in place", "functional"])
def test_mutated_buffer_is_right_over_several_calls(form: int) -> None:
    example = (torch.randn(1, 64, dtype=torch.bfloat16), torch.tensor([0]))
    before = forms(torch.export.export(Cache(), example))[form]
    program, _ = assert_rewrites(before, expect={"linear_int4": 1})
    written = [list(p.graph_signature.buffers_to_mutate.values()) for p in (program, before)]
    assert written[0] == written[1] == ([] if form == 0 else ["seen"])
    ours, theirs = copy.deepcopy(program.module()), copy.deepcopy(before.module())
    for step in range(4):
        inputs = torch.randn(1, 64, dtype=torch.bfloat16), torch.tensor([step])
        got, wanted = ours(*inputs), theirs(*inputs)
        assert (got - wanted).norm() <= 2**-7 * wanted.norm()
    assert (ours.get_buffer("seen").norm(dim=1) > 0).all()
    assert "seen" in reloaded(program).state_dict


# Saved and loaded --------------------------------------------------------------------------------------------------


def test_rewritten_program_survives_save_load_and_decomposition(plain_use: ExportedProgram) -> None:
    program, _ = ecp.rewrite(plain_use, "cuda")
    wanted = program.module()(X)
    for again in (reloaded(program), reloaded(program.run_decompositions({}))):
        assert torch.equal(again.module()(X), wanted)
        _, report = ecp.rewrite(again, "cuda")
        assert report.outcomes == []


def test_dynamic_shapes_and_their_ranges_survive_the_rewrite() -> None:
    rows = torch.export.Dim("rows", min=2, max=99)
    before = torch.export.export(Net(), (X,), dynamic_shapes={"input": {0: rows}})
    program, _ = assert_rewrites(before, expect={"linear_int4": 1})
    assert str(program.range_constraints) == str(before.range_constraints)
    again = reloaded(program)
    for count in (2, 7, 99):
        x = torch.randn(count, 64, dtype=torch.bfloat16)
        assert again.module()(x).shape == (count, 16)


def test_preserved_module_can_be_unflattened() -> None:
    """The signatures of preserved modules contain node names, which a rewrite changes."""

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.net(x))

    before = torch.export.export(Outer(), (X,), preserve_module_call_signature=("net",))
    program, _ = ecp.rewrite(before, "cuda")
    got, wanted = torch.export.unflatten(program)(X), program.module()(X)
    assert torch.equal(got, wanted)


# Reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [0, 1], ids=["subclass", "plain"])
def test_inner_tensors_of_a_subclass_have_the_fqn_of_the_weight(plain_use: ExportedProgram, form: int) -> None:
    program = Program(forms(plain_use)[form])
    (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.torchao.dequantize_affine.default)
    data, scale = node.args[0], node.args[2]
    weight: Any = plain_use.state_dict["l.weight"]
    assert torch.equal(program.constant(data), weight.qdata)
    assert torch.equal(program.constant(scale), weight.scale)
    assert {program.fqn(n) for n in (data, scale, node.args[3])} == {"l.weight"}
    (user,) = (n for n in program.graph.nodes if n.name == "input")
    assert program.constant(user) is None
    assert program.fqn(user) is None


def test_memoized_value_is_computed_once_until_the_graph_changes() -> None:
    program, node = relu_of_x()
    computed: list[Any] = []

    def count(program: Program, node: Any) -> int:
        computed.append(node)
        return len(computed)

    assert [program.memoize(count, node) for _ in range(3)] == [1, 1, 1]
    program.refresh()
    assert program.memoize(count, node) == 2
    assert computed == [node, node]


def test_memoized_unmet_is_a_new_exception_each_time() -> None:
    program, node = relu_of_x()
    computed: list[Any] = []

    def fails(program: Program, node: Any) -> None:
        computed.append(node)
        raise Unmet("no scale")

    raised = []
    for _ in range(3):
        with pytest.raises(Unmet, match="no scale") as error:
            program.memoize(fails, node)
        raised.append(error.value)
    assert computed == [node]
    assert len({id(each) for each in raised}) == 3
    # A second raise of one object would append its frames to the traceback of the first.
    lengths = [len(list(traceback.walk_tb(each.__traceback__))) for each in raised]
    assert lengths[1] == lengths[2]


def test_memoize_does_not_remember_other_exceptions() -> None:
    program, node = relu_of_x()
    computed: list[Any] = []

    def fails(program: Program, node: Any) -> None:
        computed.append(node)
        raise ValueError("never")

    for _ in range(2):
        with pytest.raises(ValueError, match="never"):
            program.memoize(fails, node)
    assert computed == [node, node]


def relu_of_x() -> tuple[Program, Any]:
    """The program relu(x), and x."""
    sketch = Sketch()
    program = Program(sketch.program(sketch.call(aten.relu.default, sketch.input("x", 4))))
    return program, next(iter(program.graph.nodes))


# Shape environments --------------------------------------------------------------------------------------------------


class Relu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = Quantized(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.q(x))


def dynamic(model: nn.Module, *shape: int) -> ExportedProgram:
    return torch.export.export(
        model, (torch.randn(*shape).bfloat16(),), dynamic_shapes=({0: Dim("rows", min=3, max=64)},)
    )


def environments(program: ExportedProgram) -> Iterator[ShapeEnv]:
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            for value in pytree.tree_leaves(node.meta.get("val")):
                if isinstance(value, FakeTensor):
                    yield value.fake_mode.shape_env
                    sizes: list[Any] = [*value.shape, *value.stride(), value.storage_offset()]
                else:
                    sizes = [value]
                yield from (size.node.shape_env for size in sizes if isinstance(size, torch.SymInt))


class Compares(ecp.Rule):
    """relu(x) -> relu(x), chosen by a comparison of the dynamic size with 4"""

    def pattern(self, x: ecp.Capture) -> ecp.Pattern:
        return ecp.op(aten.relu.default)(x)

    def rewrite(self, b: ecp.Builder, m: ecp.Match) -> Node:
        if m.val(m.x).shape[0] > 4:
            return b.call(aten.clamp_min.default, m.x, 0)
        return b.call(aten.relu.default, m.x)


def test_rule_that_compares_a_dynamic_size_fails_every_time_and_leaves_no_guard() -> None:
    program = dynamic(Relu(), 4, 64)
    for _ in range(3):
        with pytest.raises(ecp.RuleError, match="holds only if .* <= 4, which depends on the program.s dynamic shapes"):
            ecp.rewrite(program, "cuda", [Compares()])
    assert not any(shapes.guards for shapes in environments(program))
    assert_rewrites(program, "cuda", expect={"linear_int4": 1}, inputs=(torch.randn(9, 64).bfloat16(),))


def test_guard_of_a_callable_pass_is_the_result_s_alone() -> None:
    def compares(module: GraphModule) -> None:
        (relu,) = module.graph.find_nodes(op="call_function", target=aten.relu.default)
        assert relu.meta["val"].shape[0] <= 4

    program = dynamic(Relu(), 4, 64)
    result, _ = ecp.rewrite(program, "cuda", [compares])
    assert not any(shapes.guards for shapes in environments(program))
    program.module()(torch.randn(9, 64).bfloat16())
    with pytest.raises(AssertionError, match="Guard failed"):
        result.module()(torch.randn(9, 64).bfloat16())


class Everything(nn.Module):
    """Values of every kind: subclass parameters, subgraphs, views with an offset, sizes, unbacked sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.q = Quantized(32, 64)
        self.linear = nn.Linear(64, 32, dtype=torch.bfloat16)
        quantize_(self, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        chosen = torch.cond(x.sum() > 0, lambda y: self.q(y), lambda y: self.q(y + 1), (x,))
        picked = self.linear(x)[chosen.sum(-1) > 0]
        with torch.no_grad():
            tail = self.linear(x[1:])
        return chosen, picked, tail[:, 1:], x.shape[0] * 2


def test_values_of_the_copy_are_in_one_new_environment() -> None:
    program = dynamic(Everything(), 6, 64)
    result, report = assert_rewrites(program, "cuda", expect={"missed": 0})
    assert report.counts()["rewritten"] == 4
    before, after = set(environments(program)), set(environments(result))
    assert len(after) == 1
    assert before.isdisjoint(after)


def test_program_without_dynamic_sizes_shares_its_environment() -> None:
    program = torch.export.export(Relu(), (torch.randn(4, 64).bfloat16(),))
    result, _ = ecp.rewrite(program, "cuda")
    assert set(environments(program)) == set(environments(result))

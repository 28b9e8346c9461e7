"""Packed forms, int4 tensors and GGUF blocks: they decode as the gguf package does, and every target rewrites them."""

import dataclasses

import executorch.kernels.quantized  # noqa: F401  (the runtime's kernels)
import gguf
import numpy as np
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner as Stock
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.llm.export.gguf import ExportableGGUFTensor
from executorch.extension.llm.export.int4 import ExportableInt4Tensor
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.graph.program import Program
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.quant.decoders import decode, is_dequantize
from et_cuda_passes.quant.unsupported import unwrapped
from et_cuda_passes.quant.weight import QuantizedWeight, weight_values
from et_cuda_passes.targets import get_target
from et_cuda_passes.testing import assert_misses, assert_rewrites, floats
from tests.helpers import Together

N, K = 32, 512
TYPES = {"q4_k": gguf.GGMLQuantizationType.Q4_K, "q5_k": gguf.GGMLQuantizationType.Q5_K}
TYPES["q6_k"] = gguf.GGMLQuantizationType.Q6_K
ROUNDOFF = 2.0**-8

GENERAL = dataclasses.replace(
    get_target("cpu"),
    name="general",
    kernels={
        **get_target("cpu").kernels,
        "int8_linear": (Kernel("general", "int8", (torch.bfloat16, torch.float32), (16, 32), per_row=True),),
    },
    passes=lambda: [ecp.LinearInt8()],
)


def blocks(kind: str, seed: int = 0) -> Tensor:
    """Random blocks: every bit pattern of integers and scales, with fp16 factors that are small numbers."""
    random = np.random.default_rng(seed)
    size = {"q4_k": 144, "q5_k": 176, "q6_k": 210}[kind]
    raw = random.integers(0, 256, (N * K // 256, size), dtype=np.uint8)
    halves = [208] if kind == "q6_k" else [0, 2]
    for at in halves:
        factor = (random.random(len(raw)) * 0.01 + 0.001).astype(np.float16)
        raw[:, at : at + 2] = factor.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(raw.reshape(N, -1))


def linear(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = nn.Sequential(nn.Linear(K, N, bias=False)).to(dtype).eval()
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


def from_gguf(kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[ExportedProgram, np.ndarray]:
    """A linear over the identity, whose output is the weight, and the weight as the gguf package decodes it."""
    raw = blocks(kind)
    model = linear(ExportableGGUFTensor.from_raw(raw, kind, dtype), dtype)
    program = torch.export.export(model, (torch.eye(K, dtype=dtype),))
    return program, gguf.dequantize(raw.numpy(), TYPES[kind]).astype(np.float64)


def decoded(exported: ExportedProgram) -> tuple[Program, QuantizedWeight]:
    program = Program(unwrapped(exported)[0])
    (node,) = (n for n in program.graph.nodes if is_dequantize(n))
    return program, decode(program, node)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_blocks_decode_as_the_gguf_package_does(kind: str, by_hand: bool) -> None:
    exported, wanted = from_gguf(kind)
    program, weight = decoded(exported.run_decompositions({}) if by_hand else exported)
    bits, group = {"q4_k": (4, 32), "q5_k": (5, 32), "q6_k": (6, 16)}[kind]
    assert (weight.scheme, weight.shape, weight.fqn) == (f"int{bits} group {group}", (N, K), "0.weight")
    found = weight_values(program, weight)
    spread = lambda t: t.double().numpy().repeat(group, axis=1)  # noqa: E731
    data = found.data
    assert (int(data.min()), int(data.max())) == (weight.quant_min, weight.quant_max)
    mine = data.double().numpy() * spread(found.scale) - (0 if found.minimum is None else spread(found.minimum))
    # gguf computes in fp32.
    np.testing.assert_allclose(mine, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
def test_q4_k_is_packed_to_the_precision_of_bf16(target: str) -> None:
    exported, wanted = from_gguf("q4_k")
    rewritten, report = ecp.rewrite(exported, target, expect={"linear_int4": 1, "missed": 0})
    assert report.outcomes[0].detail.startswith("int4 group 32 ->")
    program, weight = decoded(exported)
    found = weight_values(program, weight)
    spread = lambda t: t.double().numpy().repeat(32, axis=1)  # noqa: E731
    # Scale, zero and then the weight are rounded once each. The zero of metal is that of q * S + Z.
    zero = np.abs(8 * spread(found.scale) - spread(found.minimum)) + (
        16 * spread(found.scale) if target == "metal" else 0
    )
    bound = ROUNDOFF * (16 * spread(found.scale) + zero + np.abs(wanted)) * 1.02
    got = rewritten.module()(torch.eye(K).bfloat16()).T.double().numpy()
    assert bool((np.abs(got - wanted) <= bound).all())


@pytest.mark.parametrize("kind", ["q5_k", "q6_k"])
def test_wider_blocks_are_packed_for_the_int8_operator(kind: str) -> None:
    exported, wanted = from_gguf(kind, torch.float32)
    rewritten, _ = ecp.rewrite(exported, GENERAL, expect={"linear_int8": 1, "missed": 0})
    got = rewritten.module()(torch.eye(K)).T.double().numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "group"), [("q5_k", 32), ("q6_k", 16)])
def test_wider_blocks_on_cuda_are_exact_to_the_precision_of_bf16(kind: str, group: int) -> None:
    exported, wanted = from_gguf(kind)
    rewritten, report = ecp.rewrite(exported, "cuda", expect={"linear_int8": 1, "missed": 0})
    assert report.outcomes[0].detail == f"int{kind[1]} group {group} -> triton"
    program, weight = decoded(exported)
    scale = weight_values(program, weight).scale.abs().double().numpy().repeat(group, axis=1)
    # Each scale is rounded once, and then each weight.
    bound = ROUNDOFF * (32 * scale + np.abs(wanted)) * 1.02
    got = rewritten.module()(torch.eye(K).bfloat16()).T.double().numpy()
    assert bool((np.abs(got - wanted) <= bound).all())


@pytest.mark.parametrize("target", ["cpu", "metal"])
@pytest.mark.parametrize(("kind", "group"), [("q5_k", 32), ("q6_k", 16)])
def test_wider_blocks_on_other_targets_become_plain_operators(kind: str, group: int, target: str) -> None:
    exported, wanted = from_gguf(kind)
    rewritten, report = ecp.rewrite(exported, target, expect={"linear_int8": 1, "missed": 0})
    assert report.outcomes[0].detail == f"int{kind[1]} group {group} -> plain operators"
    assert not any(is_dequantize(node) for node in rewritten.graph.nodes)
    got = rewritten.module()(torch.eye(K).bfloat16()).T.double().numpy()
    # The scales are fp32: each weight is rounded once.
    assert bool((np.abs(got - wanted) <= ROUNDOFF * np.abs(wanted) + 1e-6).all())


def test_int8_weight_without_a_kernel_is_missed_rather_than_decomposed() -> None:
    model = nn.Sequential(nn.Linear(K, N, bias=False)).bfloat16().eval()
    quantize_(model, IntxWeightOnlyConfig(torch.int8, PerGroup(32)))
    exported = torch.export.export(model, (torch.randn(2, K).bfloat16(),))
    assert_misses(exported, "target metal, which has no int8 kernel", "metal", rule="linear_int8")


def int4_tensor(mapping: MappingType, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A linear quantized by torchao, and the same weight in ExecuTorch's packed form."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(K, N, bias=False)).to(dtype).eval()
    quantize_(plain, IntxWeightOnlyConfig(torch.int4, PerGroup(64), mapping_type=mapping))
    packed = linear(ExportableInt4Tensor.from_intx_unpacked_to_int8_tensor(plain[0].weight), dtype)
    return plain, packed


@pytest.mark.parametrize("mapping", [MappingType.SYMMETRIC, MappingType.ASYMMETRIC])
@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
def test_int4_tensor_becomes_the_same_packed_weight_as_torchaos(mapping: MappingType, target: str) -> None:
    x = torch.randn(3, K).bfloat16()
    plain, packed = (torch.export.export(model, (x,)) for model in int4_tensor(mapping, torch.bfloat16))
    rewritten, report = assert_rewrites(packed, target, expect={"linear_int4": 1, "missed": 0}, rtol=6e-3)
    assert report.outcomes[0].detail.startswith("int4 group 64 ->")
    wanted, _ = ecp.rewrite(plain, target)
    assert list(rewritten.state_dict) == list(wanted.state_dict)
    for name, tensor in wanted.state_dict.items():
        assert torch.equal(rewritten.state_dict[name], tensor), name


FORMS = [*TYPES, "int4_tensor"]


def in_form(form: str, dtype: torch.dtype) -> Tensor:
    """A weight [N, K]."""
    if form == "int4_tensor":
        return int4_tensor(MappingType.ASYMMETRIC, dtype)[1][0].weight
    return ExportableGGUFTensor.from_raw(blocks(form), form, dtype)


def run_by_xnnpack(program: ExportedProgram, ours: ecp.XnnpackPartitioner, inputs: list[Tensor]) -> list[Tensor]:
    buffer = to_edge_transform_and_lower(program, partitioner=[ours]).to_executorch().buffer
    return [each.clone() for each in Runtime.get().load_program(buffer).load_method("forward").execute(inputs)]


def test_xnnpack_folds_packed_forms_and_is_right() -> None:
    model = Together(linear(in_form(form, torch.float32), torch.float32) for form in FORMS)
    given = [(floats(4, K, dtype=torch.float32, seed=seed),) for seed in range(len(FORMS))]
    program = torch.export.export(model, (given,))
    ours = ecp.XnnpackPartitioner(expect={"fold_dequantize": len(FORMS), "missed": 0})
    found = run_by_xnnpack(program, ours, [x for (x,) in given])
    for form, got, wanted in zip(FORMS, found, program.module()(given), strict=True):
        assert (got - wanted).norm() / wanted.norm() < 1e-5, form


@pytest.mark.parametrize("form", ["q4_k", "int4_tensor"])
def test_stock_partitioner_of_xnnpack_takes_packed_bytes_for_the_weight(form: str) -> None:
    """The reason for the fold."""
    program = torch.export.export(linear(in_form(form, torch.float32), torch.float32), (torch.randn(4, K),))
    with pytest.raises(Exception, match="ConvertToLinearPass"):
        to_edge_transform_and_lower(program, partitioner=[Stock()]).to_executorch()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_of_packed_forms_on_xnnpack_is_exact(dtype: torch.dtype) -> None:
    tables = [nn.Embedding(N, K) for _ in FORMS]
    for form, table in zip(FORMS, tables, strict=True):
        table.weight = nn.Parameter(in_form(form, dtype), requires_grad=False)
    given = [(torch.arange(N),) for _ in FORMS]
    program = torch.export.export(Together(tables), (given,))
    ours = ecp.XnnpackPartitioner(expect={"fold_dequantize": 2, "quantized_embedding": 2, "missed": 0})
    found = run_by_xnnpack(program, ours, [ids for (ids,) in given])
    # q4_k and q5_k have minimums, which are no zero points.
    rules = {FORMS[int(outcome.fqn.split(".")[1])]: outcome.rule for outcome in ours.report.outcomes}
    assert {form for form, rule in rules.items() if rule == "fold_dequantize"} == {"q4_k", "q5_k"}
    for form, got, right in zip(FORMS, found, program.module()(given), strict=True):
        assert torch.equal(got, right), form
        if form in TYPES:
            wanted = torch.from_numpy(gguf.dequantize(blocks(form).numpy(), TYPES[form]))
            assert (got.double() - wanted.double()).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max(), form


def test_blocks_of_another_type_are_rejected() -> None:
    exported, _ = from_gguf("q4_k")
    program = Program(exported.run_decompositions({}))
    (node,) = (n for n in program.graph.nodes if is_dequantize(n))
    node.args = (node.args[0], "q8_0", *node.args[2:])
    with pytest.raises(Unmet, match="GGUF blocks of type q8_0"):
        decode(program, node)

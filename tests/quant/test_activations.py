"""Quantized activations in a program."""

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.quant.activations import quantizes_activations


def dynamic(linear: nn.Module) -> None:
    quantize_(linear, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)))


def test_program_quantizes_activations_only_with_a_dynamic_scheme() -> None:
    x = torch.randn(2, 64)
    for config, expected in ((dynamic, True), (lambda m: quantize_(m, IntxWeightOnlyConfig(torch.int4)), False)):
        model = nn.Sequential(nn.Linear(64, 32))
        config(model)
        program = torch.export.export(model, (x,))
        assert quantizes_activations(program) is expected
        assert quantizes_activations(program.run_decompositions({})) is expected


def test_activation_quantized_in_a_branch_counts() -> None:
    decomposed = torch.ops.quantized_decomposed

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            def quantized(x: Tensor) -> Tensor:
                integers = decomposed.quantize_per_tensor(x, 0.1, 0, -128, 127, torch.int8)
                return decomposed.dequantize_per_tensor(integers, 0.1, 0, -128, 127, torch.int8)

            return torch.cond(x.sum() > 0, quantized, torch.sin, (x,))

    assert quantizes_activations(torch.export.export(Branch(), (torch.randn(2, 64),)))


def test_kept_activation_counts_whatever_rule_keeps_it() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    dynamic(model)
    program = torch.export.export(model, (torch.randn(2, 64),))
    kept, _ = ecp.rewrite(program, "xnnpack", expect={"kept": 1})
    assert quantizes_activations(kept)
    weight_only, _ = ecp.rewrite(program, "cpu", [ecp.LinearInt4(drop_activation_quantization=True)])
    assert not quantizes_activations(weight_only)

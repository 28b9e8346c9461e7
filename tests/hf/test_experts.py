"""Stacks of experts of transformers: quantized as each expert's linear would be, and rewritten for the targets."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torchao.quantization import quantize_
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import et_cuda_passes as ecp
from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.hf import EtConfig, EtExporter
from et_cuda_passes.hf.components import structural_copy
from et_cuda_passes.hf.support import SCHEMES
from tests.hf.models import mixtral

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 96, "max_position_embeddings": 64}
STACKS = ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj")
TOKENS = torch.arange(8)[None]


def gpt_oss() -> Any:
    """With stacks [experts, in_features, out_features], and biases."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "intermediate_size": 96}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, **sizes)).eval()


MODELS = pytest.mark.parametrize("make", [mixtral, gpt_oss])


def of_linear(weight: Tensor, scheme: str, group: int, algorithm: str) -> Tensor:
    """The values of a matrix [N, K] that torchao quantizes as the weight of a linear."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    quantize_(linear, SCHEMES[scheme].config(group, algorithm))
    return linear.weight.dequantize()


@MODELS
@pytest.mark.parametrize(
    ("scheme", "group", "algorithm"), [("4w", 32, "hqq"), ("4w", 0, "affine"), ("8w", 0, "affine")]
)
def test_expert_is_quantized_as_the_weight_of_a_linear(make: Any, scheme: str, group: int, algorithm: str) -> None:
    torch.manual_seed(0)
    model = make().bfloat16()
    stacks = {name: model.get_parameter(name).detach().clone() for name in STACKS}
    entry = {"pattern": "*experts*", "scheme": scheme, "group_size": group, "algorithm": algorithm}
    report = ecp.quantize_model_(model, recipe={"layer": [entry]})
    assert {name: (report[name].scheme, report[name].kind, report[name].experts) for name in STACKS} == dict.fromkeys(
        STACKS, (scheme, "experts", 4)
    )
    for name, stack in stacks.items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        turn = (lambda x: x.t()) if module.is_transposed else (lambda x: x)
        wanted = torch.stack([turn(of_linear(turn(each), scheme, group, algorithm)) for each in stack])
        assert torch.equal(getattr(module, last), wanted)
        assert report[name].in_features == turn(stack[0]).shape[1]
    assert not any(name in dict(model.named_parameters()) for name in STACKS)


def exported(model: Any) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (TOKENS,), kwargs={"use_cache": False}, strict=False)


@MODELS
@pytest.mark.parametrize(("form", "rule"), [("grouped_mm", "grouped_mm_int4"), ("batched_mm", "indexed_bmm_int4")])
def test_experts_are_rewritten_and_keep_the_numbers(make: Any, form: str, rule: str) -> None:
    torch.manual_seed(0)
    model = make().bfloat16()
    for name, each in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "router.weight")):
            each.data *= 50  # the choice of experts is clear, so that rounding does not change it
    before = model(TOKENS).logits.float()
    assert ecp.quantize_model_(model, qlinear="4w").warnings == []
    model.set_experts_implementation(form)
    wanted = model(TOKENS, use_cache=False).logits.float()
    assert 0.02 < ((wanted - before).norm() / before.norm()).item() < 0.3  # 4 bits
    program = exported(model)
    for target in ("cuda", "cpu"):
        rewritten, report = ecp.rewrite(program, target, expect={rule: 2, "missed": 0})
        assert [outcome.fqn for outcome in report.outcomes if outcome.rule == rule] == [*STACKS]
    got = rewritten.module()(TOKENS, use_cache=False).logits.float()
    assert ((got - wanted).norm() / wanted.norm()).item() < 8e-3


def test_layers_of_experts_are_compared_with_float_ones() -> None:
    torch.manual_seed(0)
    model = mixtral()
    weights = {name: each.detach().clone() for name, each in model.state_dict().items()}
    ecp.quantize_model_(model, qlinear="4w")
    model.set_experts_implementation("batched_mm")
    found = ecp.accuracy(exported(model), float_program=weights)
    ratios = {layer.layer: layer.quantized_db for layer in found.layers}
    assert {*STACKS} <= {*ratios} and all(10 < ratios[name] < 30 for name in STACKS)


@pytest.mark.parametrize(
    ("targets", "given", "form"),
    [
        ("cuda,cpu", "eager", "_grouped_mm"),
        ("cuda,cpu", "batched_mm", "bmm"),
        *((target, "grouped_mm", "bmm") for target in ("xnnpack", "vulkan", "cuda,metal")),
    ],
)
def test_experts_are_exported_in_a_form_that_each_target_has(targets: str, given: str, form: str) -> None:
    model = mixtral() if targets in ("xnnpack", "vulkan") else mixtral().bfloat16()
    model.set_experts_implementation(given)
    component = {"model": (model, {"input_ids": TOKENS})}
    traced = EtExporter().trace(component, {"model": EtConfig(target=targets)}, model)
    names = [str(node.target) for node in traced.programs["model"].graph.nodes]
    assert names.count(f"aten.{form}.default") == 2
    assert model.get_experts_implementation() == {"": given}


REASONS = [
    ("8w", "cuda", "cuda has no kernel of 8w for experts"),
    ("4w", "metal", "metal has no kernel of 4w for experts"),
    ("4w", "metal,cuda", "metal has no kernel of 4w for experts"),
    ("fpa4w", "metal", "metal has no kernel of fpa4w for experts"),
    ("4w", "mlx", "mlx has no kernel of 4w for experts"),
    ("8da4w", "", "8da4w quantizes the activations of linears; a recipe may give experts another scheme, as 4w"),
]


@pytest.mark.parametrize(("scheme", "target", "reason"), REASONS)
def test_experts_without_a_kernel_stay_floating_point_with_the_reason(scheme: str, target: str, reason: str) -> None:
    model = mixtral().bfloat16()
    report = ecp.quantize_model_(model, qlinear=scheme, target=target or None)
    assert [(report[name].scheme, report[name].reason) for name in STACKS] == [(None, reason)] * 2
    assert report["lm_head"].scheme == scheme
    assert {*STACKS} <= {*dict(model.named_parameters())}


def test_target_that_folds_experts_does_not_keep_them_from_another_target() -> None:
    report = ecp.quantize_model_(mixtral().bfloat16(), qlinear="4w", target="cuda,mlx")
    assert [report[name].scheme for name in STACKS] == ["4w"] * 2
    assert report.warnings == [
        "mlx has no kernel for 4w of experts and computes with floating-point weights; mlx has no kernels for experts"
    ]


def of_sizes(hidden: int, intermediate: int) -> Any:
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "hidden_size": hidden, "intermediate_size": intermediate}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES | sizes)).eval().bfloat16()


@pytest.mark.parametrize(
    ("width", "target", "size", "reason"),
    [
        (48, "cpu", 16, "in_features 48 is no multiple of 32"),
        (48, "cuda", None, "in_features 48 is no multiple of 32, and no smaller group size has a kernel on cuda"),
        # torch has no grouped product in bf16 whose rows are no multiple of 16 bytes.
        (100, "cpu", None, "in_features 100 is no multiple of 32, and no smaller group size has a kernel on cpu"),
        (33, "cuda", None, "in_features 33 is no multiple of 32, and no smaller group size has a kernel on cuda"),
        (33, None, 0, "in_features 33 is no multiple of 32"),
    ],
)
def test_in_features_that_the_group_size_does_not_divide_are_reported(
    width: int, target: str | None, size: int | None, reason: str
) -> None:
    report = ecp.quantize_model_(of_sizes(64, width), qlinear="4w", target=target)
    assert [(report[name].group_size, report[name].reason) for name in STACKS] == [(32, ""), (size, reason)]


def test_promise_of_kernels_counts_for_experts() -> None:
    with pytest.raises(UsageError, match=r"experts.down_proj: in_features 48 is no multiple of 32.*skip the layer"):
        ecp.quantize_model_(of_sizes(64, 48), qlinear="cuda:4w")


@pytest.mark.parametrize("cast", [False, True])
def test_dtype_without_a_kernel_for_experts_is_warned_of(cast: bool) -> None:
    recipe = {"layer": [{"pattern": "*experts*", "scheme": "4w"}]}
    report = ecp.quantize_model_(mixtral(), recipe=recipe, target="cuda", cast_to_bf16=cast)
    wanted = "cuda has no kernel of 4w for a model in float32; convert it with model.to(torch.bfloat16)"
    assert [warning[: len(wanted)] for warning in report.warnings] == ([] if cast else [wanted])


def test_stack_that_is_quantized_already_is_reported_and_stays() -> None:
    config = transformers.GptOssConfig(
        **SIZES | {"hidden_size": 512}, num_local_experts=4, num_experts_per_tok=2, head_dim=32, intermediate_size=512
    )
    model = transformers.GptOssForCausalLM(config).eval().bfloat16()
    ecp.quantize_model_(model, qlinear="4w")
    wanted = model(TOKENS).logits
    report = ecp.quantize_model_(model, qlinear="8w")
    before = "quantized before: a parametrization dequantizes int8"
    assert [(layer.fqn, layer.scheme, layer.reason) for layer in report.layers if "experts" in layer.fqn] == [
        (name, None, before) for name in STACKS
    ]
    assert [(report[name].out_features, report[name].in_features) for name in STACKS] == [(1024, 512), (512, 512)]
    assert torch.equal(model(TOKENS).logits, wanted)


def test_recipe_decides_about_experts() -> None:
    first, second = STACKS
    entries = [{"pattern": first, "skip": True}, {"pattern": "*experts*", "scheme": "4w", "group_size": 64}]
    report = ecp.quantize_model_(mixtral(), qlinear="8da4w", recipe={"layer": entries})
    assert (report[first].scheme, report[first].reason) == (None, "the recipe skips it")
    assert (report[second].scheme, report[second].group_size) == ("4w", 64)


@pytest.mark.parametrize(
    ("scheme", "target", "error"),
    [
        ("8da4w", None, 'is a stack of experts, and 8da4w .*with scheme = "4w" or skip = true'),
        ("8w", "cuda", "cuda has no kernel of 8w for .*experts.gate_up_proj; cuda has kernels for 4w"),
        ("4w", "metal", "metal has no kernel of 4w for .*; metal has no kernels for experts"),
    ],
)
def test_recipe_with_a_scheme_that_experts_cannot_have_is_refused(scheme: str, target: Any, error: str) -> None:
    recipe = {"layer": [{"pattern": "*experts*", "scheme": scheme}]}
    with pytest.raises(UsageError, match=error):
        ecp.quantize_model_(mixtral().bfloat16(), recipe=recipe, target=target)


def test_model_that_shares_parameters_with_the_quantized_one_is_unchanged() -> None:
    model = mixtral()
    parameters = dict(model.named_parameters())
    copy = structural_copy(model)
    ecp.quantize_model_(copy, qlinear="4w")
    assert {name: id(each) for name, each in model.named_parameters()} == {n: id(e) for n, e in parameters.items()}
    assert all(each.requires_grad for each in parameters.values())
    assert not any(each.requires_grad for name, each in copy.named_parameters() if "experts" in name)


@pytest.mark.parametrize("sizes", [{"num_local_experts": 0}, {"intermediate_size": 0}], ids=str)
def test_stacks_without_values_stay(sizes: dict[str, int]) -> None:
    config = transformers.MixtralConfig(**{"hidden_size": 64, "intermediate_size": 64} | sizes)
    report = ecp.quantize_model_(nn.Sequential(MixtralExperts(config)), qlinear="4w", target="cpu")
    assert [(layer.scheme, layer.reason) for layer in report.layers] == [(None, "a stack without values")] * 2


def test_biases_of_experts_are_no_layers() -> None:
    sizes = {"num_local_experts": 16, "num_experts_per_tok": 2, "head_dim": 32, "intermediate_size": 96}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, **sizes))
    report = ecp.quantize_model_(model, qlinear="4w")
    assert [layer.fqn for layer in report.layers if "experts" in layer.fqn] == [*STACKS]


def test_unknown_stack_is_reported() -> None:
    config = transformers.Llama4TextConfig(
        **SIZES, intermediate_size=96, intermediate_size_mlp=96, num_local_experts=2, num_experts_per_tok=1, head_dim=32
    )
    report = ecp.quantize_model_(transformers.Llama4ForCausalLM(config).eval(), qlinear="4w")
    found = report["model.layers.0.feed_forward.experts.down_proj"]
    assert (found.kind, found.scheme) == ("other", None)
    assert found.reason == "a parameter of three dimensions of Llama4TextExperts, which is no known stack of experts"

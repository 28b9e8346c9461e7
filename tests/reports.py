"""Reports on models with many layers, for tests of pages and files."""

from dataclasses import replace

from et_cuda_passes.graph.drawing import Drawing, DrawnNode, DrawnSizes
from et_cuda_passes.graph.report import LayerAccuracy, Outcome, Reason, Report

LAYERS = (
    ("self_attn.q_proj", (576, 576)),
    ("self_attn.k_proj", (192, 576)),
    ("mlp.gate_proj", (1536, 576)),
    ("mlp.up_proj", (1536, 576)),
    ("mlp.down_proj", (576, 1536)),
)
"""The linears of a block with the shapes of their weights."""

MISS = [
    Reason("linear_int4", "metadata", "at most 4 bits", "8 bits", "quantize with weight_dtype=torch.int4"),
    Reason(
        "linear_int4", "metadata", "a group size", "group size 8", "triton has 32 and 64: quantize with PerGroup(32)"
    ),
    Reason("linear_int8", "metadata", "a group size", "group size 8", "triton has 16: quantize with PerGroup(16)"),
]


def report_on(blocks: int, missed_every: int = 0, measured: bool = False, target: str = "cuda") -> Report:
    """A report on ``blocks`` times :data:`LAYERS`; every layer whose number ``missed_every`` divides is missed."""
    outcomes: list[Outcome] = []
    for block in range(blocks):
        for name, shape in LAYERS:
            number = len(outcomes)
            size = shape[0] * shape[1] * 17 // 16
            outcome = Outcome(
                node=f"linear_{number}" if number else "linear",
                op="aten.linear",
                fqn=f"model.layers.{block}.{name}.weight",
                rule="linear_int4",
                status="rewritten",
                source=f"/src/model.py:{10 + len(name)}: {name.split('.')[1]}(x)",
                explanation=f"tilings on sm_90 for {shape[0]} x {shape[1]}",
                scheme="int4 group 32",
                shape=list(shape),
                kernel="triton",
                layout="mma_tiled",
                bytes_before=size,
                bytes_after=size // 2,
            )
            if missed_every and number % missed_every == 0:
                missed = replace(
                    outcome, rule=None, status="missed", reasons=MISS, explanation="", kernel="", layout=""
                )
                outcome = replace(missed, scheme="int8 group 8", bytes_after=size)
            outcomes.append(outcome)
    accuracy = [
        LayerAccuracy(each.fqn, each.node, 20 + number % 7, 45 + number % 5) for number, each in enumerate(outcomes)
    ]
    rewritten = sum(outcome.status == "rewritten" for outcome in outcomes)
    return Report(
        target=target,
        passes=["linear_int4", "linear_int8"],
        outcomes=outcomes,
        applied={"linear_int4": rewritten} if rewritten else {},
        rejected={"linear_int8": ["linear: linear_int8 wanted 8 bits, found 4 bits"]},
        bytes_before=sum(outcome.bytes_before for outcome in outcomes),
        bytes_after=sum(outcome.bytes_after for outcome in outcomes),
        drawings=[drawing()],
        accuracy=tuple(accuracy) if measured else (),
        tilings="tilings: no GPU is named",
    )


def drawing() -> Drawing:
    """A linear with a dequantized weight, of two sizes."""
    before = [
        DrawnNode("aten.linear", "operator", "bfloat16 [1, A]", [1, 2]),
        DrawnNode("input", "input", "bfloat16 [1, B]", []),
        DrawnNode("torchao.dequantize_affine", "operator", "bfloat16 [A, B]", [3, 4]),
        DrawnNode("input", "constant", "int8 [A, B]", []),
        DrawnNode("scale", "constant", "bfloat16 [A, 18]", []),
    ]
    after = [
        DrawnNode("int4_linear_mma_tiled", "operator", "bfloat16 [1, A]", [1, 2]),
        DrawnNode("x", "input", "bfloat16 [1, B]", []),
        DrawnNode("packed", "constant", "int32 [A, 72]", []),
    ]
    sizes = [DrawnSizes(2, {"A": "576", "B": "1536"}), DrawnSizes(1, {"A": "1536", "B": "576"})]
    return Drawing("linear_int4", 3, before, after, sizes)

"""The results as the markdown of docs/reference/performance.md."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.limit import Limit
from benchmarks.voxtral.dimensions import Dimensions
from benchmarks.voxtral.kernels import CLASSES, OTHER
from benchmarks.voxtral.variants import VARIANTS

CASES = {
    "audio_encoder": "audio_encoder",
    "prefill": "text_decoder, {prompt} tokens",
    "decode": "text_decoder, 1 token",
    "token_embedding": "token_embedding",
}
"""Measured cases and their titles; those with a lower bound come first."""
Result = Mapping[str, Any]


def table(lines: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; the first line is the heading."""
    heading, *rest = [f"| {' | '.join(map(str, line))} |" for line in lines]
    columns = heading.count(" | ") + 1
    return "\n".join([heading, f"|{' --- |' * columns}", *rest])


def report(results: Mapping[str, Result], dimensions: Dimensions) -> str:
    """All tables.

    Args:
        results: existing results by step.
        dimensions: sizes of the networks.
    """
    measured = {name: results[f"measure-{name}"] for name in VARIANTS if f"measure-{name}" in results}
    lowered = {name: results[f"lower-{name}"] for name in VARIANTS if f"lower-{name}" in results}
    parts = [
        machine(measured.values()),
        "Sizes, and milliseconds a call (median, warm, until the GPU is done):",
        table(latencies(measured, lowered, results, dimensions)),
        embedding_note(dimensions),
        "Against the same weights in eager, relative error and in how many rows the largest is the same:",
        table(errors(measured, dimensions)),
        "Loading, memory and lowering:",
        table(costs(measured, lowered)),
        together_note(lowered.values()),
        "Where a call's time goes, in milliseconds. A floor is the larger of the weights' bytes at the speed of a copy "
        "and the operations at that of cuBLAS; gaps are the time in which no kernel runs:",
        table(shares(measured, dimensions)),
    ]
    return "\n\n".join(part for part in parts if part)


def size(nbytes: float) -> str:
    """Bytes in a suitable unit."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def title(case: str, dimensions: Dimensions) -> str:
    """The title of a case."""
    return CASES[case].format(prompt=dimensions.prompt)


def machine(measured: Iterable[Result]) -> str:
    """The machine, which is the same for all steps."""
    found = next((result["machine"] for result in measured if "machine" in result), None)
    if found is None:
        return ""
    copy, flops = found["copy_bytes_per_s"] / 1e12, found["bf16_flops_per_s"] / 1e12
    name = f"{found['gpu']}, torch {found['torch']}"
    return f"{name}; a copy moves {copy:.2f} TB/s, cuBLAS in bf16 runs at {flops:.0f} TFLOP/s."


def latencies(
    measured: Mapping[str, Result], lowered: Mapping[str, Result], results: Mapping[str, Result], dimensions: Dimensions
) -> list[list[str]]:
    """Sizes and latencies by variant, and of eager."""
    lines = [["variant", ".ptd", ".pte", *(title(case, dimensions) for case in CASES)]]
    for name, result in lowered.items():
        times = measured.get(name, {}).get("latency", {})
        sizes = [size(result["ptd_bytes"]), size(result["pte_bytes"])]
        lines.append([VARIANTS[name].summary, *sizes, *(milliseconds(times.get(case)) for case in CASES)])
    if eager := results.get("reference-float", {}).get("latency"):
        lines.append(["bf16 in eager, no .pte", "", "", *(milliseconds(eager.get(case)) for case in CASES)])
    return lines


def milliseconds(times: Result | None) -> str:
    """The median."""
    return f"{times['median_ms']:.2f}" if times else ""


def embedding_note(dimensions: Dimensions) -> str:
    """The part of each .ptd that no variant quantizes."""
    embedding = size(2 * dimensions.vocabulary * dimensions.features)
    return (
        f"The embedding stays bf16 in each, {embedding} of the .ptd; where a model's export quantizes it too, "
        "its .ptd is smaller by up to three quarters of that."
    )


def errors(measured: Mapping[str, Result], dimensions: Dimensions) -> list[list[str]]:
    """Correctness by variant."""
    lines = [["variant", *(title(case, dimensions) for case in CASES)]]
    for name, result in measured.items():
        cells = []
        for case in CASES:
            found = result["correct"][case]
            short = f", short by {found['shortfall']:.1%} at most" if found["same"] < found["rows"] else ""
            cells.append(f"{found['relative_error']:.1e}; {found['same']} of {found['rows']}{short}")
        lines.append([VARIANTS[name].summary, *cells])
    return lines


def costs(measured: Mapping[str, Result], lowered: Mapping[str, Result]) -> list[list[str]]:
    """The times and the memory of lowering and loading."""
    lines = [["variant", "load", "GPU, running", "export", "lowering", "writing", "GPU, lowering", "host, lowering"]]
    for name, result in lowered.items():
        ran, seconds = measured.get(name), result["seconds"]
        loading = [f"{sum(ran['load_s'].values()):.1f} s", size(ran["gpu_peak_bytes"])] if ran else ["", ""]
        lines.append(
            [
                VARIANTS[name].summary,
                *loading,
                *(f"{seconds[part]:.0f} s" for part in ("export", "lower", "write")),
                size(result["gpu_peak_bytes"]),
                size(result["host_peak_bytes"]),
            ]
        )
    return lines


def together_note(lowered: Iterable[Result]) -> str:
    """A note if lowerings ran in parallel."""
    jobs = max((result.get("jobs", 1) for result in lowered), default=1)
    if jobs == 1:
        return ""
    return (
        f"Up to {jobs} variants were lowered at a time, on one GPU: seconds are longer than alone, and kernels were "
        "tuned beside others' work."
    )


def floor_ms(case: str, result: Result, dimensions: Dimensions) -> float | None:
    """The lower bound of a case's time."""
    if "machine" not in result:
        return None
    method = "text_decoder" if case in ("prefill", "decode") else case
    limit = Limit(result["machine"]["copy_bytes_per_s"], result["machine"]["bf16_flops_per_s"])
    return limit.microseconds(result["weight_bytes"][method], dimensions.flops[case]) / 1e3


def shares(measured: Mapping[str, Result], dimensions: Dimensions) -> list[list[str]]:
    """Milliseconds and shares of the latency by class, case and variant."""
    labels = [*CLASSES, OTHER]
    lines = [["call", "variant", "latency", "floor", "kernels", *labels, "gaps"]]
    for case in CASES:
        for name, result in measured.items():
            spent = result["profile"].get(case)
            if spent is None or not spent["kernels"]:
                continue
            whole = result["latency"][case]["median_ms"]
            floor = floor_ms(case, result, dimensions)
            lines.append(
                [
                    title(case, dimensions),
                    VARIANTS[name].summary,
                    f"{whole:.2f}",
                    "" if floor is None else f"{floor:.2f}",
                    f"{spent['kernels']:.0f}",
                    *(share(spent["classes_ms"].get(label, 0.0), whole) for label in labels),
                    share(max(0.0, whole - spent["busy_ms"]), whole),
                ]
            )
    return lines


def share(part: float, whole: float) -> str:
    """Milliseconds, and their fraction of the whole."""
    return f"{part:.2f} ({part / whole:.0%})" if part else ""

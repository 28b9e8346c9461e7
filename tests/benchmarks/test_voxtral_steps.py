"""The benchmark's steps: finished ones are skipped, failed ones are repeated; classes of kernels; tables."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.voxtral import __main__ as command
from benchmarks.voxtral.dimensions import SCALES
from benchmarks.voxtral.kernels import classify, summarize
from benchmarks.voxtral.steps import Results, Runner, Step
from benchmarks.voxtral.table import report

ROOT = Path(__file__).parents[2]
WORK = """
import json, sys, time
from pathlib import Path
from benchmarks.voxtral.steps import Results
folder, name, settings, body = sys.argv[1:]
with open(Path(folder) / "ran", "a") as file:
    print(name, file=file)
folder = Path(folder)
exec(body)
Results(folder).write(name, json.loads(settings), {"value": 1})
"""


class Bench:
    """A folder of steps, each a small program."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results, self.said = folder, Results(folder), list[str]()

    def step(
        self, name: str, body: str = "", needs: tuple[Step, ...] = (), parallel: bool = False, **settings: Any
    ) -> Step:
        arguments = [str(self.folder), name, json.dumps(settings), body]
        return Step(name, [sys.executable, "-c", WORK, *arguments], settings, needs, parallel)

    def run(self, *steps: Step, **options: Any) -> bool:
        def environment(step: Step, jobs: int) -> Mapping[str, str]:
            return {"PYTHONPATH": str(ROOT), "JOBS": str(jobs)}

        return Runner(self.results, environment, say=self.said.append, **options).run(steps)

    @property
    def ran(self) -> list[str]:
        path = self.folder / "ran"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_finished_step_is_not_repeated(bench: Bench) -> None:
    first = bench.step("first")
    steps = (first, bench.step("second", needs=(first,)))
    assert bench.run(*steps)
    assert bench.run(*steps)
    assert bench.ran == ["first", "second"]
    assert "first: done before" in bench.said
    result = bench.results.read("second")
    assert result is not None and result["value"] == 1


def test_failed_step_is_repeated_and_its_dependents_wait(bench: Bench) -> None:
    failing = bench.step("failing", "print('the reason'); sys.exit(3)")
    after, other = bench.step("after", needs=(failing,)), bench.step("other")
    assert not bench.run(failing, after, other)
    assert bench.ran == ["failing", "other"]
    assert any("failed (3)" in line and "the reason" in line for line in bench.said)
    assert "after: skipped, it needs failing" in bench.said
    mended = bench.step("failing")
    assert bench.run(mended, bench.step("after", needs=(mended,)), other)
    assert bench.ran == ["failing", "other", "failing", "after"]


def test_step_without_a_result_has_failed(bench: Bench) -> None:
    assert not bench.run(bench.step("silent", "sys.exit(0)"))
    assert any(line.startswith("silent: failed (0)") for line in bench.said)


def test_damaged_result_counts_as_missing(bench: Bench) -> None:
    step = bench.step("one")
    (bench.folder / "one.json").write_text('{"settings": {}, "fini')
    assert bench.run(step)
    assert bench.ran == ["one"]


def test_other_settings_and_newer_inputs_invalidate_a_step(bench: Bench) -> None:
    def steps(scale: str) -> tuple[Step, Step]:
        lowered = bench.step("lower", scale=scale)
        return lowered, bench.step("measure", needs=(lowered,), scale="any")

    assert bench.run(*steps("tiny"))
    assert bench.run(*steps("full"))
    assert bench.ran == ["lower", "measure"] * 2


def test_steps_do_not_start_after_the_deadline(bench: Bench) -> None:
    slow, second = bench.step("slow", "time.sleep(1)"), bench.step("second")
    assert not bench.run(slow, second, deadline_s=0.5)
    assert bench.ran == ["slow"], "what runs is waited for"
    assert bench.results.is_done(slow)
    assert "past the deadline, not started: second" in bench.said
    assert bench.run(slow, second)


def test_parallel_steps_run_beside_each_other_and_others_alone(bench: Bench) -> None:
    # Each waits for the output of the other.
    meet = "(folder / {0!r}).touch()\nwhile not (folder / {1!r}).exists(): time.sleep(0.02)"
    alone = bench.step("alone", "assert (folder / 'a.json').exists() and (folder / 'b.json').exists()")
    steps = [
        bench.step("a", meet.format("x", "y"), parallel=True),
        bench.step("b", meet.format("y", "x"), parallel=True),
    ]
    assert bench.run(*steps, alone, jobs=2, limit_s=30)
    assert bench.ran[2:] == ["alone"]


def test_steps_run_in_at_most_the_given_jobs(bench: Bench) -> None:
    lonely = (
        "import os\nassert os.environ['JOBS'] == '1'\n(folder / 'in').mkdir()\ntime.sleep(0.3)\n(folder / 'in').rmdir()"
    )
    assert bench.run(*(bench.step(name, lonely, parallel=True) for name in "abc"), jobs=1)


def test_step_beyond_its_time_limit_is_ended_with_its_children(bench: Bench) -> None:
    body = "import subprocess\nsubprocess.Popen(['sleep', '3']) and time.sleep(60)"
    start = time.monotonic()
    assert not bench.run(bench.step("long", body), limit_s=1)
    assert time.monotonic() - start < 3
    assert any("long: ended after" in line for line in bench.said)


def test_command_lists_its_steps(tmp_path: Path) -> None:
    options = command.parse(["--folder", str(tmp_path), "--scale", "tiny", "--variants", "bf16,ours", "--jobs", "4"])
    steps = {step.name: step for step in command.plan(options)}
    assert list(steps) == ["lower-bf16", "lower-ours", "reference-float", "reference-dequantized", *measured()]
    assert [step.name for step in steps.values() if step.parallel] == ["lower-bf16", "lower-ours"]
    assert [need.name for need in steps["measure-ours"].needs] == ["lower-ours", "reference-dequantized"]
    again = command.parse(list(steps["measure-ours"].command[3:]))
    assert (again.step, again.folder, again.scale, again.jobs) == ("measure-ours", tmp_path, "tiny", 2)
    assert again.cache == options.cache == tmp_path / "cache"
    options = command.parse(["--layers", "3", "--lower-only"])
    assert command.sizes(options).layers == command.sizes(options).audio_layers == 3
    assert {step.name.partition("-")[0] for step in command.plan(options)} == {"lower"}
    assert options.folder.name == "voxtral-full-3"
    with pytest.raises(SystemExit):
        command.parse(["--variants", "fp8"])


def measured() -> list[str]:
    return ["measure-bf16", "measure-ours"]


def test_steps_have_separate_compiler_caches(tmp_path: Path) -> None:
    make = command.Environment(tmp_path)
    found = [make(Step(f"lower-{name}", []), 2)["TORCHINDUCTOR_CACHE_DIR"] for name in ("bf16", "ours")]
    assert len(set(found)) == 2 and all(Path(path).is_relative_to(tmp_path) for path in found)


@pytest.mark.parametrize(
    ("kernel", "label"),
    [
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("Memset (Device)", "copies"),
        ("_sdpa_fwd_kernel", "attention"),
        ("_sdpa_decode_splitk_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention"),
        ("triton_poi_fused__to_copy_mul_sub_view_0", "dequantize"),
        ("triton_poi_fused_dequantize_affine_3", "dequantize"),
        ("void at::native::tinygemm_m16n8k16_chunk_kernel<at::native::ALayout_RM<1>>", "matmul"),
        ("int4_matmul", "matmul"),
        ("triton_tem_fused_addmm_gelu_12", "matmul"),
        ("triton_tem_fused__to_copy_mm_mul_sub_t_view_4", "matmul"),
        ("triton_tem_fused_convolution_unsqueeze_1", "matmul"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "matmul"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "matmul"),
        ("triton_poi_fused_index_copy_7", "KV cache"),
        ("triton_poi_fused_index_put_7", "KV cache"),
        ("triton_poi_fused_copy__9", "KV cache"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_2", "pointwise"),
        ("triton_poi_fused__to_copy__unsafe_view_silu_5", "pointwise"),
        ("triton_per_fused_native_layer_norm_0", "pointwise"),
        ("triton_poi_fused_add_cat_mul_neg_slice_3", "pointwise"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "pointwise"),
        ("some_kernel_of_ours", "other"),
    ],
)
def test_kernel_name_determines_its_class(kernel: str, label: str) -> None:
    assert classify(kernel) == label


def test_kernels_of_several_calls_are_summed_for_one() -> None:
    kernels = [("_sdpa_fwd_kernel", 200.0), ("triton_tem_fused_mm_1", 700.0), ("triton_tem_fused_mm_2", 100.0)] * 4
    found = summarize(kernels, 2)
    assert found["kernels"] == 6
    assert found["busy_ms"] == pytest.approx(2.0)
    assert found["classes_ms"] == pytest.approx({"attention": 0.4, "matmul": 1.6})
    assert found["classes_launches"] == {"attention": 2, "matmul": 4}
    assert found["top"][0] == {"name": "triton_tem_fused_mm_1", "ms": pytest.approx(1.4), "launches": 2}


def some_results() -> dict[str, dict[str, Any]]:
    def times(**milliseconds: float) -> dict[str, Any]:
        return {case: {"median_ms": value, "min_ms": value, "max_ms": value} for case, value in milliseconds.items()}

    right = {"relative_error": 0.0123, "rows": 388, "same": 388, "shortfall": 0.0}
    cases = ("audio_encoder", "token_embedding", "prefill", "decode")
    lowered = {
        "seconds": {"weights": 3.0, "export": 21.4, "lower": 240.2, "write": 9.6},
        "ptd_bytes": 3_660_000_000,
        "pte_bytes": 12_340_000,
        "gpu_peak_bytes": 5_500_000_000,
        "host_peak_bytes": 12_000_000_000,
        "jobs": 4,
    }
    ours = {
        "load_s": {"audio_encoder": 0.5, "token_embedding": 0.25, "text_decoder": 1.5},
        "gpu_peak_bytes": 4_000_000_000,
        "correct": {**dict.fromkeys(cases, right), "prefill": {**right, "same": 380, "shortfall": 0.004}},
        "latency": times(audio_encoder=10.0, token_embedding=0.05, prefill=20.0, decode=4.0),
        "profile": {
            "decode": {"kernels": 600.0, "busy_ms": 3.0, "classes_ms": {"matmul": 2.0, "attention": 1.0}, "top": []},
            "prefill": {"kernels": 0, "busy_ms": 0, "classes_ms": {}, "top": []},
        },
        "weight_bytes": {"audio_encoder": 10**9, "token_embedding": 10**9, "text_decoder": 3 * 10**9},
        "machine": {"gpu": "A GPU", "torch": "2.11.0", "copy_bytes_per_s": 3e12, "bf16_flops_per_s": 7e14},
    }
    eager = {"latency": times(audio_encoder=9.0, token_embedding=0.04, prefill=8.0, decode=30.0)}
    return {
        "lower-ours": lowered,
        "measure-ours": ours,
        "lower-bf16": {**lowered, "ptd_bytes": 9_350_000_000},
        "reference-float": eager,
    }


def test_tables_contain_all_results() -> None:
    lines = report(some_results(), SCALES["full"]).splitlines()
    assert lines[0] == "A GPU, torch 2.11.0; a copy moves 3.00 TB/s, cuBLAS in bf16 runs at 700 TFLOP/s."
    for wanted in (
        "| bf16, stock partitioner | 9.35 GB | 12.3 MB |  |  |  |  |",
        "| int4 packed, default passes | 3.66 GB | 12.3 MB | 10.00 | 20.00 | 4.00 | 0.05 |",
        "| bf16 in eager, no .pte |  |  | 9.00 | 8.00 | 30.00 | 0.04 |",
        "| int4 packed, default passes | 1.2e-02; 388 of 388 | 1.2e-02; 380 of 388, short by 0.4% at most "
        "| 1.2e-02; 388 of 388 | 1.2e-02; 388 of 388 |",
        "| int4 packed, default passes | 2.2 s | 4.00 GB | 21 s | 240 s | 10 s | 5.50 GB | 12.00 GB |",
        "| text_decoder, 1 token | int4 packed, default passes | 4.00 | 1.00 | 600 "
        "|  | 1.00 (25%) |  | 2.00 (50%) |  |  |  | 1.00 (25%) |",
    ):
        assert wanted in lines
    assert not any(line.startswith("| text_decoder, 388 tokens | int4") for line in lines), "no kernels were seen"
    text = "\n".join(lines)
    assert "0.81 GB of the .ptd" in text
    assert "Up to 4 variants were lowered at a time" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
        assert set(table[1]) == set("| -")


def test_tables_of_partial_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--table", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""
    results = some_results()
    Results(tmp_path).write("lower-bf16", {}, results["lower-bf16"])
    assert command.main(["--table", "--folder", str(tmp_path)]) == 0
    assert "| bf16, stock partitioner | 9.35 GB |" in capsys.readouterr().out


def test_command_without_a_gpu_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    arguments = ["--folder", str(tmp_path), "--scale", "tiny", "--variants", "bf16", "--lower-only"]
    assert command.main(arguments) == 1
    assert "lower-bf16 needs a CUDA device" in capsys.readouterr().out

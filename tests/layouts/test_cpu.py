"""The cpu layout against torch's operator, for every shape and instruction set, and against the CPU kernel."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from et_cuda_passes.layouts import cpu, scale_and_zero


def converted(q: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 8)
    return packed


@given(
    sixteenth=st.integers(1, 20),
    half_k=st.integers(1, 500),
    chunk_bytes=st.integers(1, 400_000),
    signed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_cpu_pack_equals_operator_and_unpack_inverts_it(
    sixteenth: int, half_k: int, chunk_bytes: int, signed: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    wanted = torch.randint(0, 16, (16 * sixteenth, 2 * half_k), dtype=torch.uint8, generator=random)
    q, offset = (wanted.to(torch.int8) - 8, 8) if signed else (wanted, 0)
    packed = cpu.pack(q, offset, chunk_bytes=chunk_bytes)
    assert packed.dtype == torch.uint8 and packed.shape == (16 * sixteenth, half_k)
    assert torch.equal(packed, converted(wanted))
    assert torch.equal(cpu.unpack(packed, chunk_bytes=chunk_bytes), wanted)


@given(
    sixteenth=st.integers(1, 12),
    group=st.sampled_from([32, 64, 128, 256]),
    groups=st.integers(1, 3),
    rows=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32),
)
def test_cpu_kernel_computes_q_minus_8_times_scale_plus_zero(
    sixteenth: int, group: int, groups: int, rows: int, dtype: torch.dtype, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    n, k = 16 * sixteenth, group * groups
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=random)
    # With small integers, powers of two and a sparse x, every product and sum is exact in each dtype.
    scale = 2.0 ** torch.randint(-2, 2, (n, groups), generator=random)
    zero = torch.randint(-3, 4, (n, groups), generator=random).float()
    x = torch.zeros(rows, k)
    x[torch.arange(rows), torch.randint(0, k, (rows,), generator=random)] = 1.0
    x[torch.arange(rows), torch.randint(0, k, (rows,), generator=random)] = -2.0
    got = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.to(dtype), cpu.pack(q), group, scale_and_zero.pack(scale, zero, dtype)
    )
    weight = (q.double() - 8) * scale.double().repeat_interleave(group, 1) + zero.double().repeat_interleave(group, 1)
    assert torch.equal(got.double(), x.double() @ weight.t())


@pytest.mark.parametrize("capability", ["default", pytest.param("avx2", marks=pytest.mark.slow)])
def test_cpu_pack_and_unpack_agree_on_other_instruction_sets(capability: str) -> None:
    code = """
import torch
from et_cuda_passes.layouts import cpu
q = torch.randint(0, 16, (208, 930), dtype=torch.uint8)
packed = cpu.pack(q, chunk_bytes=1)
assert torch.equal(packed, torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 2))
assert torch.equal(cpu.unpack(packed, chunk_bytes=1), q)
assert cpu.block_rows() is not None
print(torch.backends.cpu.get_cpu_capability())
"""
    env = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_cpu_pack_without_blocks_packs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "block_rows", lambda: None)
    q = torch.randint(-8, 8, (208, 930), dtype=torch.int8)
    packed = cpu.pack(q, 8)
    assert torch.equal(packed, converted(q + 8))
    assert torch.equal(cpu.unpack(packed), (q + 8).to(torch.uint8))


@pytest.mark.parametrize("layout", ["scrambled", "single column"])
def test_block_rows_rejects_order_that_only_resembles_blocks(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    def strange(weights: torch.Tensor) -> torch.Tensor:
        packed = converted(weights)
        if layout == "scrambled" and weights.shape[1] > 2:
            return packed.flip(0)
        return packed if layout == "scrambled" else torch.full_like(packed, 255)

    monkeypatch.setattr(cpu, "_convert", strange)
    assert cpu.block_rows.__wrapped__() is None


def test_cpu_pack_rejects_weight_on_other_device() -> None:
    class Elsewhere(torch.Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda:0")

    q = torch.zeros(16, 32, dtype=torch.uint8).as_subclass(Elsewhere)
    with pytest.raises(ValueError, match=r"q is on cuda:0; .* move it with \.cpu\(\)"):
        cpu.pack(q)
    with pytest.raises(ValueError, match=r"packed is on cuda:0"):
        cpu.unpack(q)

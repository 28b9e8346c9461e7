"""Payloads of CUDA delegates: read as ExecuTorch writes them, and refused if they are not valid."""

import dataclasses
from pathlib import Path

import pytest
from executorch.backends.cuda.cuda_weight_collector import CudaWeightEntry, encode_cuda_weight_metadata

from et_cuda_passes.delegate import DelegateError, Program
from tests.delegate.delegated import CUDA, PART, WEIGHTS, read_program, small, write


def test_weights_match_what_the_stock_backend_wrote(tmp_path: Path) -> None:
    (payload,) = read_program(write(tmp_path, {"forward": small()}))._payloads["forward"].values()
    assert payload.library == PART.key
    for weight, (fqn, tensor) in zip(payload.weights, WEIGHTS.items(), strict=True):
        assert (weight.fqn, weight.dtype, weight.device) == (fqn, tensor.dtype, "cuda")
        assert (weight.sizes, weight.strides, weight.offset) == (tuple(tensor.shape), tensor.stride(), 0)
        assert weight.end == weight.nbytes == tensor.nbytes


def test_payload_without_its_data_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"forward": small()})
    path.with_suffix(".ptd").unlink()
    with pytest.raises(DelegateError, match="the files have no data 'cuda_fqn_weight:cuda:up.weight.packed': is"):
        Program(path)


def described(*entries: CudaWeightEntry) -> bytes:
    return encode_cuda_weight_metadata(PART.key, list(entries))


BIAS = CudaWeightEntry("up.bias", "cuda_fqn_weight:cuda:up.bias", 10, 15, CUDA, 0, (5,), (1,))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "it begins with b''"),
        (b"key\nother key", "as executorch 1.5 writes it: lower the model again"),
        (encode_cuda_weight_metadata("elsewhere", []), "the files have no data 'elsewhere'"),
        (described(BIAS)[:-1], "bytes are needed, but the data ends"),
        (described(BIAS) + b"\0", "1 bytes follow the last weight"),
        (described(BIAS, BIAS), "'up.bias' at byte .*: it occurs twice"),
        (described(dataclasses.replace(BIAS, storage_key="none")), "the files have no data 'none'"),
        (described(dataclasses.replace(BIAS, storage_nbytes=8)), "it needs 8 bytes, but .* has 10"),
        (described(dataclasses.replace(BIAS, dtype=8)), "dtype 8 does not exist"),
        (described(dataclasses.replace(BIAS, device_type=2)), "device type 2 does not exist"),
        (described(dataclasses.replace(BIAS, sizes=(6,))), "its view ends at byte 12 of a storage of 10 bytes"),
        (described(dataclasses.replace(BIAS, strides=(2,))), "its view ends at byte 18 of"),
        (described(dataclasses.replace(BIAS, storage_offset=1)), "its view ends at byte 12 of"),
        (described(dataclasses.replace(BIAS, sizes=(0,), storage_offset=1 << 40)), "its view ends"),
        (described(dataclasses.replace(BIAS, sizes=(1 << 62,) * 2, strides=(1 << 62,) * 2)), "its view ends"),
        (described(dataclasses.replace(BIAS, sizes=(-5,))), "is negative"),
        (described(dataclasses.replace(BIAS, strides=(-1,))), "is negative"),
        (described(dataclasses.replace(BIAS, storage_offset=-1)), "is negative"),
        (described(dataclasses.replace(BIAS, sizes=(1,) * 65, strides=(1,) * 65)), "65 dimensions"),
    ],
)
def test_invalid_payload_is_refused(payload: bytes, message: str, tmp_path: Path) -> None:
    # An empty payload stays inside the flatbuffer; any other goes into a segment.
    path = write(tmp_path, {"forward": small(parts=[dataclasses.replace(PART, payload=payload)])})
    with pytest.raises(DelegateError, match=message) as error:
        Program(path)
    assert "method 'forward': delegate 0" in str(error.value)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (encode_cuda_weight_metadata(PART.key, [])[:-4] + b"\xff" * 4, "4294967295 is more than the 131072 that may"),
        (encode_cuda_weight_metadata("k" * (17 << 20), []), r"have \d+ bytes, more than 33554432"),
    ],
)
def test_payloads_with_too_many_weights_or_bytes_are_refused(payload: bytes, message: str, tmp_path: Path) -> None:
    part = dataclasses.replace(PART, payload=payload)
    path = write(tmp_path, {"forward": small(parts=[part, part])})
    with pytest.raises(DelegateError, match=message):
        Program(path)

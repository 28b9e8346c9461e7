"""Attacks through archives of exported programs: a valid file with some members replaced."""

import io
import json
import os
import pickle
import resource
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from et_cuda_passes.executorch.packed import ModelError, load_model

Members = dict[str, bytes]
PROGRAM, INPUTS = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"


def read_within_200_mb(paths: list[str]) -> None:
    """Load each file and print the seconds, the cause of the error and the error."""
    # The limit applies to the address space after the imports. Beyond it, Python raises MemoryError.
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (200 << 20),) * 2)
    for path in paths:
        before = time.perf_counter()
        try:
            load_model(Path(path), "cpu")
            print("read")
        except ModelError as error:
            seconds = time.perf_counter() - before
            print(seconds, type(error.__cause__).__name__, str(error).replace("\n", " "))


class Small(nn.Module):
    """A weight, a constant, a dynamic length and a keyword argument: a place for each attack."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))
        self.constant = torch.ones(4)

    def forward(self, x: Tensor, *, y: dict[str, Tensor]) -> Tensor:
        return x * self.weight + self.constant + y["a"]


def honest(folder: Path) -> Path:
    path = folder / "honest.pt2"
    inputs = (torch.zeros(3, 4),), {"y": {"a": torch.ones(4)}}
    rows = Dim("rows", min=2, max=64)
    torch.export.save(torch.export.export(Small(), *inputs, dynamic_shapes={"x": {0: rows}, "y": {"a": None}}), path)
    return path


def members(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def written(path: Path, content: Members) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"model/{name}", data)
    return path


def edited(content: Members, name: str, edit: Callable[[Any], object]) -> Members:
    """``content`` with the JSON of one member changed in place by ``edit``."""
    value = json.loads(content[name])
    edit(value)
    return {**content, name: json.dumps(value).encode()}


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(item)


def text_replaced(content: Members, old: str, new: str) -> Members:
    """The program with ``new`` for ``old``, wherever ``old`` is a whole text or key of the JSON."""

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {replace(key): replace(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replace(item) for item in value]
        return new if value == old else value

    return {**content, PROGRAM: json.dumps(replace(json.loads(content[PROGRAM]))).encode()}


class MakesFolder:
    """Unpickling it creates a folder, the sign that an attack succeeded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def saved(value: object) -> bytes:
    """The bytes that torch.save writes for ``value``."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def repickled(data: bytes, pickled: bytes) -> bytes:
    """A file of torch.save with another pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))
    return file.getvalue()


def python(marker: Path) -> str:
    """A Python expression that creates ``marker``."""
    return f"__import__('os').mkdir('{marker}')"


def in_sample_inputs(content: Members, marker: Path) -> Members:
    return {**content, INPUTS: saved(((torch.zeros(3, 4),), {"y": {"a": MakesFolder(marker)}}))}


def in_a_weight(content: Members, marker: Path) -> Members:
    def edit(table: Any) -> None:
        table["config"]["weight"]["use_pickle"] = True

    return {**edited(content, WEIGHTS, edit), "data/weights/weight_0": saved(MakesFolder(marker))}


def in_an_opaque_constant(content: Members, marker: Path) -> Members:
    def edit(table: Any) -> None:
        table["config"]["extra"] = {
            "path_name": "opaque_obj_0",
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }

    return {**edited(content, CONSTANTS, edit), "data/constants/opaque_obj_0": pickle.dumps(MakesFolder(marker))}


def in_an_expression(content: Members, marker: Path) -> Members:
    def edit(program: Any) -> None:
        for value in objects(program):
            if "expr_str" in value:
                value["expr_str"] = python(marker)

    return edited(content, PROGRAM, edit)


def in_weights_of_the_older_form(content: Members, marker: Path) -> Members:
    return {**content, "data/weights/model.pt": saved({"weight": MakesFolder(marker)})}


def in_constants_of_the_older_form(content: Members, marker: Path) -> Members:
    return {**content, "data/constants/model.pt": saved({"constant": MakesFolder(marker)})}


def in_a_guard(content: Members, marker: Path) -> Members:
    return edited(content, PROGRAM, lambda program: program["guards_code"].append(f"{python(marker)} or True"))


def in_a_name_of_an_input(content: Members, marker: Path) -> Members:
    return text_replaced(content, "y_a", f"y_a={python(marker)}")


def _specs(content: Members, old: str, new: str) -> Members:
    def edit(program: Any) -> None:
        for entry in program["graph_module"]["module_call_graph"]:
            if entry["signature"]:
                assert old in entry["signature"]["in_spec"]
                entry["signature"]["in_spec"] = entry["signature"]["in_spec"].replace(old, new)

    return edited(content, PROGRAM, edit)


_DICT = '"builtins.dict", "context": "[\\"a\\"]"'


def in_a_default_factory(content: Members, marker: Path) -> Members:
    factory = {"default_factory_module": "evil_module", "default_factory_name": "factory", "dict_context": ["a"]}
    return _specs(content, _DICT, f'"collections.defaultdict", "context": {json.dumps(factory)}')


def in_an_enum_of_a_structure(content: Members, marker: Path) -> Members:
    key = {"__enum__": True, "fqn": "evil_module:Kind", "name": "one"}
    return _specs(content, _DICT, f'"builtins.dict", "context": {json.dumps(json.dumps([key]))}')


def in_a_fake_sample_input(content: Members, marker: Path) -> Members:
    """The description of a fake tensor is JSON in the bytes of a pickle, and contains expressions."""
    from torch._export.serde.serialize import _reconstruct_fake_tensor

    size = {"as_expr": {"expr_str": python(marker), "hint": None}}
    meta = {"dtype": 7, "sizes": [size], "requires_grad": False, "device": {"type": "cpu", "index": None}}
    meta |= {"strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}, "layout": 7}

    class Fake:
        def __reduce__(self) -> Any:
            return _reconstruct_fake_tensor, (json.dumps(meta).encode(), False)

    return {**content, INPUTS: saved(((Fake(),), {"y": {"a": torch.ones(4)}}))}


def in_torchscript(content: Members, marker: Path) -> Members:
    """torch.load passes an archive with this member to TorchScript."""
    file = io.BytesIO()
    data = saved(((torch.zeros(3, 4),), {"y": {"a": torch.ones(4)}}))
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("archive/constants.pkl", pickle.dumps(MakesFolder(marker)))
    return {**content, INPUTS: file.getvalue()}


def _called(content: Members, target: str) -> Members:
    def edit(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = target

    return edited(content, PROGRAM, edit)


def calls_a_function_of_python(content: Members, marker: Path) -> Members:
    return _called(content, "torch.hub.os.mkdir")


def calls_an_operator_that_writes_files(content: Members, marker: Path) -> Members:
    return _called(content, "torch.ops.aten.from_file.default")


def calls_a_compiled_library(content: Members, marker: Path) -> Members:
    return _called(content, "torch.ops.higher_order.aoti_call_delegate")


def in_a_compiled_library(content: Members, marker: Path) -> Members:
    """torch.export.load loads a library of AOTInductor beside a program."""
    return {**content, "data/aotinductor/model/model.so": b"\x7fELF"}


def in_an_object_of_torchscript(content: Members, marker: Path) -> Members:
    return {**content, "data/constants/custom_obj_0": saved(MakesFolder(marker))}


# The attack, and the member that the refusal names.
LIVE: dict[Callable[[Members, Path], Members], str] = {
    in_sample_inputs: INPUTS,
    in_a_weight: "data/weights/weight_0",
    in_an_opaque_constant: "data/constants/opaque_obj_0",
    in_an_expression: PROGRAM,
    in_weights_of_the_older_form: "data/weights/model.pt",
    in_constants_of_the_older_form: "data/constants/model.pt",
    in_a_guard: PROGRAM,
    in_a_name_of_an_input: PROGRAM,
    in_a_default_factory: PROGRAM,
    in_an_enum_of_a_structure: PROGRAM,
    in_a_fake_sample_input: INPUTS,
}
# torch itself stops these attacks, today or before a call.
REFUSED_ONLY: dict[Callable[[Members, Path], Members], str] = {
    in_torchscript: INPUTS,
    calls_a_function_of_python: PROGRAM,
    calls_an_operator_that_writes_files: PROGRAM,
    calls_a_compiled_library: PROGRAM,
    in_a_compiled_library: "data/aotinductor/model/model.so",
    in_an_object_of_torchscript: "data/constants/custom_obj_0",
}

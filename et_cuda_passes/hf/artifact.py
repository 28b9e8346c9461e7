"""An exported component: its files for each target, and what a call must look like. In memory and in a folder.

The components of one model share files: they are the methods of one .pte. So a component is saved as a small JSON file
that names the files beside it.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._sympy.numbers import int_oo

from et_cuda_passes.unfinished import TemporaryFolder

if TYPE_CHECKING:
    from transformers.exporters.metadata import ExportMetadata

SUFFIX = ".etcp.json"
_SCHEMA = 2
"""1 had the sizes of the files, and 2 has their checksums too."""
MANIFEST = "export.json"
"""The manifest of an export: ``EXPORT_MANIFEST_FILE`` of transformers.exporters.base."""


class ExportError(ValueError):
    """A model cannot be exported, or an export cannot be read, saved or called; the message has the fix."""


@dataclass(frozen=True)
class Input:
    """One leaf of the inputs of a component.

    Attributes:
        name: its name in the exported program.
        dtype: of a tensor, "int64"; None for a constant.
        shape: sizes; a text names a dynamic size, and equal texts are equal sizes.
        constant: the value that a leaf which is no tensor was traced with.
    """

    name: str
    dtype: str | None = None
    shape: tuple[int | str, ...] = ()
    constant: int | float | bool | str | None = None


@dataclass(frozen=True)
class Signature:
    """The inputs of a component as the export fixed them.

    Attributes:
        inputs: the leaves in the order of the program.
        ranges: the least and the greatest value of each dynamic size; None for no greatest.
    """

    inputs: tuple[Input, ...]
    ranges: dict[str, tuple[int, int | None]]

    @staticmethod
    def of(program: ExportedProgram) -> "Signature":
        """The signature of an exported program."""
        values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
        inputs: list[Input] = []
        symbols: set[str] = set()
        for spec in program.graph_signature.input_specs:
            if spec.kind != InputKind.USER_INPUT:
                continue
            value = values.get(spec.arg.name)
            if not isinstance(value, Tensor):
                constant = getattr(spec.arg, "value", None)
                inputs.append(Input(spec.arg.name, constant=constant))
                continue
            if not _is_dense(value):
                raise ExportError(f"the input {spec.arg.name} is not contiguous: export with inputs that are")
            shape = tuple(map(_size, value.shape))
            dynamic: list[Any] = [size for size in value.shape if not isinstance(size, int)]
            symbols.update(str(symbol) for size in dynamic for symbol in size.node.expr.free_symbols)
            inputs.append(Input(spec.arg.name, str(value.dtype).removeprefix("torch."), shape))
        ranges: dict[str, tuple[int, int | None]] = {
            str(symbol): (int(bounds.lower), None if bounds.upper is int_oo else int(bounds.upper))
            for symbol, bounds in program.range_constraints.items()
            if str(symbol) in symbols
        }
        return Signature(tuple(inputs), ranges)

    def check(self, leaves: Iterable[Any], component: str) -> None:
        """Check that the component can be called with ``leaves``. The runtimes themselves do not check everything.

        Raises:
            ExportError: a leaf is not as the export fixed it.
        """
        given = list(leaves)
        if len(given) != len(self.inputs):
            raise ExportError(
                f"{component} was traced with {len(self.inputs)} inputs "
                f"({', '.join(each.name for each in self.inputs)}), and this call has {len(given)}: pass the same "
                "arguments, and a cache in the same state (empty for a prefill that was traced with an empty cache)"
            )
        sizes: dict[str, tuple[int, str]] = {}
        for leaf, spec in zip(given, self.inputs, strict=True):
            if spec.dtype is None:
                if isinstance(leaf, Tensor) or leaf != spec.constant:
                    shown = "a tensor" if isinstance(leaf, Tensor) else repr(leaf)
                    raise ExportError(
                        f"{component} was traced with {spec.name}={spec.constant!r}; it cannot be {shown}"
                    )
                continue
            if not isinstance(leaf, Tensor):
                raise ExportError(f"{component} was traced with a tensor for {spec.name}; got {leaf!r}")
            dtype = str(leaf.dtype).removeprefix("torch.")
            if dtype != spec.dtype:
                raise ExportError(f"{component} takes {spec.name} as {spec.dtype}; got {dtype}")
            self._check_shape(tuple(leaf.shape), spec, component, sizes)

    def _check_shape(
        self, shape: tuple[int, ...], spec: Input, component: str, sizes: dict[str, tuple[int, str]]
    ) -> None:
        where = f"{component} takes {spec.name} with the shape {_shown(spec.shape)}; got {list(shape)}"
        if len(shape) != len(spec.shape):
            raise ExportError(where)
        for size, wanted in zip(shape, spec.shape, strict=True):
            if isinstance(wanted, int):
                if size != wanted:
                    raise ExportError(where)
                continue
            known, owner = sizes.setdefault(wanted, (size, spec.name))
            if known != size:
                raise ExportError(f"{where}: {wanted} is {known} in {owner}")
            if wanted in self.ranges:
                least, most = self.ranges[wanted]
                # torch.export writes 2 for every dynamic size and accepts 1, as do the programs that are built from it.
                if size < (1 if least <= 2 else least) or (most is not None and size > most):
                    bounds = f"from {least} to {most}" if most is not None else f"at least {least}"
                    raise ExportError(
                        f"{where}: the export has sizes of {wanted} {bounds}; export again with other inputs"
                    )


def _size(size: Any) -> int | str:
    """A size, or the text of its expression; torch.export may find out that a dynamic size is a number."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else str(expression)


def _is_dense(value: Tensor) -> bool:
    """Whether a traced tensor is contiguous. The question to the tensor itself could restrict dynamic sizes."""
    sizes, strides = (
        [each if isinstance(each, int) else each.node.expr for each in parts] for parts in (value.shape, value.stride())
    )
    expected: Any = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _shown(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


@dataclass(frozen=True)
class Build:
    """The files with which a target runs a component.

    Attributes:
        files: the files; several components may share them.
        missing: None, or what the exporting machine lacked; then the only file is the component's packed program.
        recorded: the SHA-256 of each file by its name, as the export recorded it; None for files that no export has
            recorded yet, and for an export that has no checksums.
    """

    files: tuple[Path, ...]
    missing: str | None = None
    recorded: Mapping[str, str] | None = None

    @cached_property
    def checksums(self) -> Mapping[str, str]:
        """The SHA-256 of each file by its name: the recorded ones, so that a copy of a damaged file is damaged too."""
        return self.recorded or {file.name: sha256(file) for file in self.files}

    def check(self) -> None:
        """Check that the files are those that the export wrote. This reads them: a second takes 0.4 to 1.4 GB.

        Raises:
            ExportError: a file has other content.
        """
        for name, checksum in (self.recorded or {}).items():
            check_content(next(file for file in self.files if file.name == name), checksum)


@dataclass
class Component:
    """One exported graph, for all of its targets.

    Attributes:
        name: the name of the component, and of its method in a .pte with several.
        method: the name of its method in a .pte.
        signature: what a call must look like.
        builds: by target, in the order of the config's targets.
        report: of the rewrite, by target, as data.
        interface: the checksum of what the manifest says about calls of the component; None for an export that has no
            checksums.
        folder: keeps the folder of files that were not saved yet.
    """

    name: str
    method: str
    signature: Signature
    builds: dict[str, Build]
    report: dict[str, Any] = field(default_factory=dict)
    interface: str | None = None
    folder: TemporaryFolder | None = None

    def save(self, path: Path) -> None:
        """Write the JSON file ``path``, and the files that it names beside it."""
        for build in self.builds.values():
            for file in build.files:
                destination = path.parent / file.name
                # Components share files: whichever is saved first brings them.
                if not destination.exists():
                    shutil.copyfile(file, destination)
        self.write(path)

    def write(self, path: Path) -> None:
        """Write the JSON file ``path`` alone."""

        def described(build: Build, file: Path) -> dict[str, Any]:
            return {"size": file.stat().st_size, "sha256": build.checksums[file.name]}

        data = {
            "schema": _SCHEMA,
            "name": self.name,
            "method": self.method,
            "interface": self.interface,
            "targets": {
                target: {
                    "files": {file.name: described(build, file) for file in build.files},
                    "missing": build.missing,
                }
                for target, build in self.builds.items()
            },
            "inputs": [
                {"name": each.name, "dtype": each.dtype, "shape": list(each.shape)}
                if each.dtype
                else {"name": each.name, "constant": each.constant}
                for each in self.signature.inputs
            ],
            "ranges": self.signature.ranges,
        }
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "Component":
        """Read what :meth:`save` wrote. No code from the files is executed.

        Raises:
            ExportError: the file or one that it names is missing or damaged.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] > _SCHEMA:
                raise ExportError(
                    f"{path} was written by a newer version of et_cuda_passes: install that one, or export again"
                )
            inputs = tuple(_input(each) for each in data["inputs"])
            ranges = {
                str(name): (int(low), None if high is None else int(high))
                for name, (low, high) in data["ranges"].items()
            }
            files = {
                target: {str(name): _recorded(each) for name, each in build["files"].items()}
                for target, build in data["targets"].items()
            }
            missing = {target: build["missing"] for target, build in data["targets"].items()}
            name, method, interface = str(data["name"]), str(data["method"]), data.get("interface")
        except OSError as error:
            raise ExportError(f"{path} cannot be read: {error.strerror}") from error
        except ExportError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ExportError(f"{path} is damaged, or not a component of an export: export the model again") from error
        builds = {
            target: Build(
                tuple(_file(path, name, size) for name, (size, _) in listed.items()),
                missing[target],
                {name: checksum for name, (_, checksum) in listed.items() if checksum} or None,
            )
            for target, listed in files.items()
        }
        return Component(name, method, Signature(inputs, ranges), builds, interface=interface)

    def check_interface(self, metadata: "ExportMetadata") -> None:
        """Check that the entry of the manifest and this component are of one export.

        Raises:
            ExportError: not so.
        """
        if self.interface not in (None, interface_of(metadata)):
            raise ExportError(
                f"{MANIFEST} and {self.name}{SUFFIX} are of different exports, or one is damaged: copy the whole "
                "folder again, or export the model again"
            )


def interface_of(metadata: "ExportMetadata") -> str:
    """The checksum of how a component is called, and of what it returns."""
    parts = (metadata.in_spec, metadata.out_spec, metadata.in_constants, metadata.out_constants)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _recorded(data: Any) -> tuple[int, str | None]:
    """The size and the checksum of a file; schema 1 has the size alone."""
    return (int(data["size"]), str(data["sha256"])) if isinstance(data, dict) else (int(data), None)


def _input(data: Mapping[str, Any]) -> Input:
    if "constant" in data:
        return Input(str(data["name"]), constant=data["constant"])
    if not isinstance(getattr(torch, data["dtype"]), torch.dtype):
        raise TypeError("the dtype is none")
    return Input(
        str(data["name"]),
        str(data["dtype"]),
        tuple(size if isinstance(size, str) else int(size) for size in data["shape"]),
    )


def _file(path: Path, name: str, size: int) -> Path:
    """The file ``name`` beside ``path``, which has ``size`` bytes."""
    if Path(name).name != name:
        raise ExportError(f"{path} names the file {name!r}, which is not beside it: export the model again")
    file = path.parent / name
    if not file.is_file():
        raise ExportError(
            f"{file} is missing; {path.name} needs it: copy the whole folder, or export the model again; from the Hub, "
            "et_cuda_passes.hf.ExportedModel.from_pretrained downloads all files"
        )
    found = file.stat().st_size
    if found != size:
        raise ExportError(
            f"{file} has {found} bytes, and {path.name} says {size}: copy the whole folder again, or export again"
        )
    return file


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_content(file: Path, checksum: str) -> None:
    """Check the SHA-256 of a file of an export.

    Raises:
        ExportError: the file is another one, or is damaged.
    """
    if sha256(file) != checksum:
        raise ExportError(
            f"{file} is not the file that the export wrote: it is damaged, or of another export; copy the whole folder "
            "again, or export the model again"
        )


def refuse_existing(folder: Path, names: list[str]) -> None:
    """Refuse to write files over others.

    Raises:
        FileExistsError: the folder has a file of one of the names.
    """
    for name in names:
        if (folder / name).exists():
            what = "an export already" if name == MANIFEST else f"{name} already"
            raise FileExistsError(f"{folder} has {what}: choose another folder, or overwrite it (overwrite=True)")


def files_of_export(folder: Path) -> Iterator[Path]:
    """The files of the export that a folder holds, as far as it can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for file in [entry["file"] for entry in manifest["components"].values()]:
            listed = json.loads((folder / file).read_text(encoding="utf-8"))["targets"].values()
            names = [file, *(name for build in listed for name in build["files"])]
            yield from (folder / name for name in names if Path(name).name == name and (folder / name).is_file())
        for file in [folder / name for name in manifest.get("files", []) if ".." not in Path(name).parts]:
            if file.is_relative_to(folder) and file.is_file():
                yield file
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        pass
    if (folder / MANIFEST).is_file():
        yield folder / MANIFEST

"""Where a model is: a folder, a .safetensors file, a GGUF file or a Hub name, checked before anything slow begins."""

import importlib.util
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from et_cuda_passes.executorch.packed import file_state
from et_cuda_passes.hf.artifact import ExportError

CONFIG = "config.json"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_EXTRA = "pip install 'et-cuda-passes[hf]'"


class CheckpointError(ExportError):
    """A checkpoint cannot be read; the message has the cause and the fix."""


def check_extra(command: str) -> None:
    """Check that the packages of the extra ``hf`` are installed.

    Raises:
        ExportError: one is not.
    """
    lacking = [
        name for name in ("transformers", "gguf", "accelerate", "safetensors") if not importlib.util.find_spec(name)
    ]
    if lacking:
        raise ExportError(f"{command} needs {' and '.join(lacking)}: {_EXTRA}")


@dataclass(frozen=True)
class Checkpoint:
    """Where a model is.

    Attributes:
        name: a folder or a Hub name, with the config and the tokenizer.
        weights: the .safetensors file, if it is not a folder's own.
        gguf: the GGUF file.
        own_config: whether the config is in the folder, and not in the GGUF file.
    """

    name: str
    weights: Path | None = None
    gguf: "GgufFile | None" = None
    own_config: bool = True

    def __str__(self) -> str:
        """Where the weights are."""
        return str((self.gguf.path if self.gguf else self.weights) or self.name)

    @property
    def is_local(self) -> bool:
        """Whether nothing has to be downloaded."""
        return Path(self.name).is_dir()

    def state(self) -> dict[Path, tuple[int, ...]]:
        """Inode, size and time of each local file, which change when it is replaced or written."""
        paths = [] if self.weights is None else [self.weights]
        paths += [] if self.gguf is None else [self.gguf.path]
        if self.is_local:
            kinds = (".json", ".txt", ".model") if paths else (".json", ".txt", ".model", ".safetensors", ".bin")
            paths += [each for each in Path(self.name).iterdir() if each.suffix in kinds]
        return {path: state for path in paths if (state := file_state(path)) is not None}

    def check_unchanged(self, before: dict[Path, tuple[int, ...]]) -> None:
        """Check that the files of :meth:`state` are as they were: weights are read until the last program is written.

        Raises:
            CheckpointError: one was replaced, written or removed.
        """
        for path, state in before.items():
            if file_state(path) != state:
                raise CheckpointError(
                    f"{path} changed while it was read: run the command again when nothing writes to it"
                )

    @staticmethod
    def find(model: str, gguf: Path | None = None) -> "Checkpoint":
        """The checkpoint that ``--model`` and ``--gguf`` name.

        Raises:
            CheckpointError: it does not exist, or is damaged.
        """
        path = Path(model)
        if path.is_file():
            if path.suffix == ".gguf":
                if gguf is not None:
                    raise CheckpointError(f"{model} is a GGUF file, and --gguf names another: give one of them")
                return Checkpoint(str(path.parent), gguf=GgufFile.read(path), own_config=False)
            if path.suffix != ".safetensors":
                raise CheckpointError(f"{model} is neither a folder nor a .safetensors or .gguf file")
            if _SHARD.search(path.name):
                raise CheckpointError(f"{model} is one part of a checkpoint: give the folder {path.parent}")
            if gguf is not None:
                raise CheckpointError(f"--gguf gives the weights that {model} gives too: leave one of them out")
            _check_config(path.parent)
            return Checkpoint(str(path.parent), None if path.name == "model.safetensors" else path)
        if path.is_dir():
            if gguf is None:
                _check_config(path)
                return Checkpoint(model)
            return Checkpoint(model, gguf=GgufFile.read(gguf), own_config=(path / CONFIG).is_file())
        if path.suffix in (".gguf", ".safetensors") or not _HUB_NAME.fullmatch(model):
            raise CheckpointError(f"there is no file or folder {model}")
        # transformers reports an unknown name, and where it looked.
        return Checkpoint(model, gguf=None if gguf is None else GgufFile.read(gguf))


def _check_config(folder: Path) -> None:
    if (folder / CONFIG).is_file():
        return
    found = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f"; for the GGUF file, give --model {folder / found[0]}" if found else ""
    raise CheckpointError(f"{folder} has no {CONFIG}: copy it from where the weights come from{hint}")


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose every tensor can be expanded.

    Attributes:
        path: the file.
        types: the type of each tensor by its name, such as "Q4_K".
        has_tokenizer: whether it contains a vocabulary.
    """

    path: Path
    types: dict[str, str]
    has_tokenizer: bool

    @staticmethod
    def read(path: Path) -> "GgufFile":
        """Read the names of the tensors, and the first row of each type.

        Raises:
            CheckpointError: the file is missing, cut short, damaged, or has a type that gguf cannot expand.
        """
        import gguf

        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path} is not a GGUF file: it does not begin with GGUF")
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:
            if "GGMLQuantizationType" in str(error):
                raise CheckpointError(
                    f"{path} has tensors of a type that gguf does not know ({error}): convert the file to another type"
                ) from error
            raise CheckpointError(
                f"{path} is cut short or damaged ({type(error).__name__}: {error}): copy or download it again"
            ) from error
        first: dict[str, Any] = {}
        for tensor in reader.tensors:
            first.setdefault(tensor.tensor_type.name, tensor)
        for name, tensor in first.items():
            try:
                gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{path}: {tensor.name} is of type {name}, which gguf cannot expand: convert the file"
                ) from error
        return GgufFile(
            path,
            {tensor.name: tensor.tensor_type.name for tensor in reader.tensors},
            "tokenizer.ggml.tokens" in reader.fields,
        )

    @cached_property
    def is_quantized(self) -> bool:
        """Whether any tensor is in blocks."""
        return not {"F32", "F16", "BF16"} >= set(self.types.values())

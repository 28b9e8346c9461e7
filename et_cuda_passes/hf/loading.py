"""From a checkpoint to a model of transformers, its tokenizer or processor, and inputs to export it with."""

import contextlib
import copy
import importlib.util
import inspect
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.pipelines import SUPPORTED_TASKS
from transformers.utils import logging

from et_cuda_passes.hf.checkpoint import Checkpoint, CheckpointError
from et_cuda_passes.hf.gguf_blocks import keep_blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LONGEST = 2048
"""The default length of a text, where the model allows more."""
_MOST = 2**20
"""The largest length of a text, where the model has no limit: a cache has memory for all of it."""
TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps."
"""The text that models are traced with."""
_RATE = 16000
# Tasks that transformers no longer has a pipeline for, though it has the models.
_SEQUENCE_TO_SEQUENCE = ("text2text-generation", "translation", "summarization")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "image_processor_config.json")
_TOKENIZER_FILES = frozenset(
    ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
)
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "seq_length")


@dataclass
class Loaded:
    """A model, ready to be exported.

    Attributes:
        model: in eval mode.
        processor: the tokenizer, or the processor that contains it; None if the checkpoint has none.
        inputs: the kwargs of its forward, or of ``generate`` if ``generates``.
        generates: whether it is exported for generation.
        max_length: the largest length of a text.
        kept: for a GGUF file whose blocks are kept, why each weight that it holds in blocks is expanded nevertheless;
            empty if it is kept.
    """

    model: Any
    processor: Any
    inputs: dict[str, Any]
    generates: bool
    max_length: int
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def text_length(self) -> int:
        """The largest length of an input text."""
        crossed = self.generates and getattr(self.model.config, "is_encoder_decoder", False)
        return int(self.inputs["input_ids"].shape[1]) if crossed else self.max_length


def load(
    checkpoint: Checkpoint,
    task: str | None = None,
    dtype: str | None = None,
    keep_gguf: bool = False,
    max_length: int | None = None,
) -> Loaded:
    """Load a model and what it is exported with.

    Args:
        checkpoint: where the model is.
        task: as transformers names it; None for the model's own.
        dtype: one of :data:`DTYPES`; None for the checkpoint's.
        keep_gguf: keep the blocks Q4_K, Q5_K and Q6_K of a GGUF file as they are.
        max_length: the largest length of a text; None for the model's, but at most 2048.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete, or the model does not have the task.
    """
    # One of the loaders' progress bars has no switch.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        config = _config(checkpoint)
        cls = model_class(config, task)
        length = _max_length(config, max_length)
        model = _model(checkpoint, config, cls, dtype)
        processor = _processor(checkpoint)
        kept = keep_blocks(model, checkpoint.gguf) if keep_gguf and checkpoint.gguf is not None else {}
    generates = bool(model.can_generate())
    # A decoder keeps the states of the encoder in a cache that is as long as the text that it is traced with.
    if generates and getattr(config, "is_encoder_decoder", False):
        inputs = sample_inputs(model, processor, length - 1, repeat=True)
    else:
        inputs = sample_inputs(model, processor, min(length // 2, 16))
    return Loaded(model, processor, inputs, generates, length, kept)


def generation_config(model: Any, max_length: int) -> Any:
    """The model's own, with a static cache for ``max_length`` tokens."""
    config = copy.deepcopy(model.generation_config)
    config.cache_implementation = "static"
    config.max_cache_len = max_length
    return config


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings and progress bars of transformers from stderr."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# Config and task ------------------------------------------------------------------------------------------------------


def _config(checkpoint: Checkpoint) -> Any:
    # Without the second option, transformers asks on the terminal whether to run code of the checkpoint.
    options: dict[str, Any] = {"local_files_only": checkpoint.is_local, "trust_remote_code": False}
    if checkpoint.gguf is not None and not checkpoint.own_config:
        options["gguf_file"] = checkpoint.gguf.path.name
        name = str(checkpoint.gguf.path.parent)
    else:
        name = checkpoint.name
    try:
        return transformers.AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        where = checkpoint.gguf.path if "gguf_file" in options and checkpoint.gguf else name
        raise CheckpointError(f"the config of {where} cannot be read: {_first_line(error)}") from error


def tasks_of(config: Any) -> dict[str, Any]:
    """The tasks that transformers has a class of this model for, and the classes."""
    found: dict[str, Any] = {}
    for task, described in SUPPORTED_TASKS.items():
        for auto in described["pt"]:
            if type(config) in auto._model_mapping:
                found.setdefault(task, auto._model_mapping[type(config)])
    if type(config) in transformers.AutoModelForSeq2SeqLM._model_mapping:
        found |= dict.fromkeys(_SEQUENCE_TO_SEQUENCE, transformers.AutoModelForSeq2SeqLM._model_mapping[type(config)])
    return {task: cls[0] if isinstance(cls, (list, tuple)) else cls for task, cls in found.items()}


def model_class(config: Any, task: str | None) -> Any:
    """The class of the model for a task; None for the task that its config names.

    Raises:
        CheckpointError: the model does not have the task.
    """
    tasks = tasks_of(config)
    choices = f"--task takes {', '.join(tasks)}" if tasks else "transformers has no task for it"
    if task is not None:
        if task not in tasks:
            known = task in SUPPORTED_TASKS or task in _SEQUENCE_TO_SEQUENCE
            problem = f"does not have the task {task}" if known else f"has no task {task}, which is unknown"
            raise CheckpointError(f"a model of type {config.model_type} {problem}; {choices}")
        return tasks[task]
    architectures = getattr(config, "architectures", None)
    if architectures:
        cls = getattr(transformers, architectures[0], None)
        if cls is None:
            raise CheckpointError(f"transformers {transformers.__version__} has no {architectures[0]}; {choices}")
        return cls
    for usual in ("text-generation", "text2text-generation"):
        # A GGUF file names no architecture, and contains a language model.
        if usual in tasks and bool(getattr(config, "is_encoder_decoder", False)) == (usual != "text-generation"):
            return tasks[usual]
    raise CheckpointError(f"the config does not say what the model is for (architectures); {choices}")


def _max_length(config: Any, wanted: int | None) -> int:
    text = config.get_text_config()
    positions = next((int(getattr(text, name)) for name in _POSITIONS if getattr(text, name, None)), None)
    if wanted is not None and positions is not None and wanted > positions:
        raise CheckpointError(
            f"--max-length {wanted}: the model has positions for {positions} tokens; give at most that"
        )
    if wanted is not None and wanted > _MOST:
        raise CheckpointError(f"--max-length {wanted}: an export has at most {_MOST} tokens; give at most that")
    switch = _switch_of_positions(text)
    if wanted is not None and switch is not None and wanted > switch:
        raise CheckpointError(
            f"--max-length {wanted}: beyond {switch} tokens the model computes its whole cache anew with other "
            f"positions (longrope), which an export cannot do; give at most {switch}"
        )
    return wanted or min(positions or _LONGEST, switch or _LONGEST, _LONGEST)


def _switch_of_positions(text: Any) -> int | None:
    """The length beyond which ``generate`` of Phi-3 and Phi-MoE drops the cache; None for other models."""
    rope = getattr(text, "rope_parameters", None)
    switch = getattr(text, "original_max_position_embeddings", None)
    return int(switch) if switch and isinstance(rope, dict) and rope.get("rope_type") == "longrope" else None


# Weights and tokenizer ------------------------------------------------------------------------------------------------


def _model(checkpoint: Checkpoint, config: Any, cls: Any, dtype: str | None) -> Any:
    options: dict[str, Any] = {
        "config": config,
        "output_loading_info": True,
        # Refused below: the error of transformers does not name the weights.
        "ignore_mismatched_sizes": True,
        "dtype": DTYPES[dtype] if dtype else "auto",
    }
    name: str | None = checkpoint.name
    if checkpoint.gguf is not None:
        # Otherwise a machine with a kernel for the file's own blocks gets no nn.Linear to quantize.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        options["gguf_file"] = checkpoint.gguf.path.name
        name = str(checkpoint.gguf.path.parent)
    elif checkpoint.weights is not None:
        from safetensors.torch import load_file

        name = None
        try:
            options["state_dict"] = load_file(checkpoint.weights)
        except Exception as error:
            raise CheckpointError(f"{checkpoint.weights} cannot be read: {_first_line(error)}") from error
        if dtype is None:
            floats = [each.dtype for each in options["state_dict"].values() if each.is_floating_point()]
            options["dtype"] = floats[0] if floats else torch.float32
    else:
        options["local_files_only"] = checkpoint.is_local
    try:
        model, info = cls.from_pretrained(name, **options)
    except Exception as error:  # damaged files end in errors of many kinds
        raise CheckpointError(f"{checkpoint} cannot be loaded: {type(error).__name__}: {_first_line(error)}") from error
    # transformers fills both with random numbers.
    if info["mismatched_keys"]:
        fqn, found, wanted = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(
            f"{checkpoint}: {fqn} has the shape {list(found)}, and the config says {list(wanted)}: the config.json "
            "is of another model"
        )
    absent = sorted(info["missing_keys"])
    if absent:
        raise CheckpointError(
            f"{checkpoint} has no weights for {', '.join(absent[:3])}{' and others' if len(absent) > 3 else ''} of "
            f"{cls.__name__}: choose the task that the checkpoint was trained for, or another checkpoint"
        )
    return model.eval()


def _processor(checkpoint: Checkpoint) -> Any:
    """The processor or the tokenizer; None if the checkpoint has none."""
    name = checkpoint.name
    options: dict[str, Any] = {"local_files_only": checkpoint.is_local, "trust_remote_code": False}
    auto: Any = transformers.AutoProcessor
    if checkpoint.is_local:
        files = {path.name for path in Path(checkpoint.name).iterdir()}
        preprocessor = next((each for each in _PROCESSOR_FILES if each in files), None)
        if preprocessor is None:
            auto = transformers.AutoTokenizer
            if not files & _TOKENIZER_FILES:
                if checkpoint.gguf is None or not checkpoint.gguf.has_tokenizer:
                    return None
                name = str(checkpoint.gguf.path.parent)
                options["gguf_file"] = checkpoint.gguf.path.name
        elif not files & _TOKENIZER_FILES:
            # A processor has a tokenizer, and its parts do not.
            text = (Path(checkpoint.name) / preprocessor).read_text(encoding="utf-8")
            auto = transformers.AutoFeatureExtractor if "feature_extractor" in text else transformers.AutoImageProcessor
    try:
        return auto.from_pretrained(name, **options)
    except Exception as error:  # damaged files end in errors of many kinds
        if importlib.util.find_spec("PIL") is None and re.search(r"\bPIL\b|\bPillow\b", str(error)):
            raise CheckpointError(f"the image processor of {name} needs Pillow: pip install pillow") from error
        raise CheckpointError(
            f"the tokenizer or processor of {name} cannot be loaded: {type(error).__name__}: {_first_line(error)}"
        ) from error


# Sample inputs --------------------------------------------------------------------------------------------------------


def sample_inputs(model: Any, processor: Any, length: int, repeat: bool = False) -> dict[str, Any]:
    """The inputs that the model is traced with: a short text, an image, a second of sound, or what they add up to.

    Args:
        model: decides which.
        processor: makes them, if it can; otherwise the sizes in the config do.
        length: the largest number of tokens of the text.
        repeat: repeat the text until it has that number.

    Raises:
        CheckpointError: the model takes inputs of another kind.
    """
    name, config = model.main_input_name, model.config
    if name == "pixel_values" or getattr(config, "image_token_id", None) is not None:
        pixels = _pixels(config, model.dtype)
        if name == "pixel_values":
            return {"pixel_values": pixels}
        return _image_and_text(config, pixels, length)
    if name in ("input_values", "input_features"):
        return {name: _sound(config, processor, name).to(model.dtype)}
    if name != "input_ids":
        raise CheckpointError(
            f"{type(model).__name__} takes {name}, which this command cannot make: use EtExporter in Python"
        )
    inputs = _text(config, processor, length, repeat)
    if "pixel_values" in inspect.signature(model.forward).parameters and not model.can_generate():
        # It compares texts with images, as CLIP does.
        inputs["pixel_values"] = _pixels(config, model.dtype)
    if getattr(config, "is_encoder_decoder", False) and not model.can_generate():
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def _text(config: Any, processor: Any, length: int, repeat: bool = False) -> dict[str, Tensor]:
    tokenizer = getattr(processor, "tokenizer", processor)
    ids: list[int] = list(tokenizer(TEXT)["input_ids"]) if callable(tokenizer) else []
    if len(ids) < 2:
        size = int(config.get_text_config().vocab_size)
        ids = [index % size for index in range(1, 13)]
    tokens = torch.tensor([(ids * (length // len(ids) + 1) if repeat else ids)[: max(2, length)]])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None) or config


def _size(config: Any) -> tuple[int, int]:
    size = getattr(_vision(config), "image_size", None) or 224
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _pixels(config: Any, dtype: torch.dtype) -> Tensor:
    channels = getattr(_vision(config), "num_channels", None) or 3
    return torch.rand(1, int(channels), *_size(config)).to(dtype) * 2 - 1


def _image_and_text(config: Any, pixels: Tensor, length: int) -> dict[str, Any]:
    patch = getattr(_vision(config), "patch_size", None)
    count = getattr(config, "image_seq_length", None) or getattr(config, "mm_tokens_per_image", None)
    if isinstance(patch, int) and not getattr(config, "mm_tokens_per_image", None):
        height, width = _size(config)
        count = (height // patch) * (width // patch)
    if not count:
        raise CheckpointError(f"the config of {config.model_type} does not say how many tokens an image has")
    text = [index % config.image_token_id for index in range(1, 1 + max(2, min(length, 12)))]
    tokens = torch.tensor([[config.image_token_id] * int(count) + text])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels}


def _sound(config: Any, processor: Any, name: str) -> Tensor:
    """A second of a tone."""
    extractor = getattr(processor, "feature_extractor", processor)
    rate = int(getattr(extractor, "sampling_rate", _RATE))
    wave = torch.sin(torch.arange(rate) * (2 * torch.pi * 440 / rate)) / 2
    if hasattr(extractor, "sampling_rate"):
        found: Tensor = extractor(wave.numpy(), sampling_rate=rate, return_tensors="pt")[name]
        return found
    if name == "input_values":
        return wave[None]
    bins = getattr(config, "num_mel_bins", None)
    frames = getattr(config, "max_source_positions", None)
    if not bins:
        raise CheckpointError(
            f"{config.model_type} needs its feature extractor: copy preprocessor_config.json to the model"
        )
    return torch.rand(1, int(bins), 2 * int(frames) if frames else 100)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

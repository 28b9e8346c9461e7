"""The model of an export in eager: quantized again from its checkpoint, but neither traced, rewritten nor lowered.

Two results of a deep model in 16 bits, or with activations in 8 bits, differ by the rounding of both, and by how much
depends on the model and on the inputs. So the model also runs precisely: in float32, with the same quantized weights,
and with activations that are not quantized. The difference of the two is a measure for the differences of other
programs.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten
from transformers import GenerationConfig
from transformers.exporters.exporter_dynamo import patch_model_config
from transformers.exporters.metadata import ExportMetadata, load_treespec
from transformers.exporters.utils import prepare_for_export

from et_cuda_passes.hf.artifact import Component, ExportError
from et_cuda_passes.hf.checkpoint import Checkpoint
from et_cuda_passes.hf.components import fqn_in, split_model, structural_copy
from et_cuda_passes.hf.config import EtConfig
from et_cuda_passes.hf.exporter import QuantizedModel
from et_cuda_passes.hf.loading import load

_DYNAMIC = {"4w": "8da4w", "4w_hqq": "8da4w"}
"""The scheme that a scheme without quantized activations becomes by ``xnnpack_weight_only="dynamic-activation"``."""

Progress = Callable[[str], None]


class Reference:
    """The components of an export as modules of the quantized model.

    Args:
        folder: the export.
        checkpoint: the model that was exported.
        metadata: what transformers recorded about each component.
        source: how the model was loaded for the export: ``task`` and ``keep_gguf``.
        progress: called with the name of each step as it begins.

    Raises:
        ExportError: the checkpoint cannot be loaded, or is not of the model that was exported.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        metadata: Mapping[str, ExportMetadata],
        source: Mapping[str, Any],
        progress: Progress = lambda step: None,
    ) -> None:
        first = next(iter(metadata.values()))
        progress(f"loading {checkpoint}")
        loaded = load(checkpoint, source.get("task"), first.export_dtype, bool(source.get("keep_gguf")))
        parts: Mapping[str, tuple[nn.Module, Any]] = {"model": (loaded.model, loaded.inputs)}
        root: nn.Module = loaded.model
        if list(metadata) != ["model"]:
            progress("splitting the model into components")
            root = structural_copy(loaded.model)
            try:
                parts = split_model(root, loaded.inputs, GenerationConfig.from_pretrained(folder), False)
            except (RuntimeError, ValueError, TypeError) as error:
                raise ExportError(
                    f"{checkpoint} has no components {', '.join(metadata)} as {folder} has: give the model that was "
                    f"exported ({str(error).strip().partition(chr(10))[0]})"
                ) from error
        copies = QuantizedModel(root, progress)
        self._parts: dict[str, tuple[nn.Module, nn.Module, Mapping[str, Any]]] = {}
        self._specs = {}
        precise: dict[int, nn.Parameter] = {}
        for name, each in metadata.items():
            module, inputs = parts.get(name, (None, {}))
            found = type(module).__name__
            if module is None or found != each.architecture:
                has = f"has {found} for it" if module is not None else f"has only {', '.join(parts)}"
                raise ExportError(
                    f"the component {name} of {folder} is a {each.architecture}, and {checkpoint} {has}: give the "
                    "model that was exported"
                )
            config = _as_computed(EtConfig(**each.export_config))
            quantized = copies.get(config, module, fqn_in(root, module))
            flags = prepare_for_export(quantized, dict(inputs))[2]
            rounds = config.quantizes_activations or each.export_dtype != "float32"
            self._parts[name] = (quantized, _precise(quantized, precise) if rounds else quantized, flags)
            self._specs[name] = load_treespec(each.in_spec)

    def run(self, component: Component, leaves: list[Any], precise: bool = False) -> list[Any]:
        """The leaves of what the module returns, and those of its inputs after the call, as it may mutate them.

        Args:
            component: its module runs.
            leaves: of its inputs; not changed.
            precise: run in float32, without quantized activations.

        Raises:
            ExportError: the module does not run with these inputs.
        """
        quantized, in_float32, flags = self._parts[component.name]
        module = in_float32 if precise else quantized
        given = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if precise:
            given = [leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in given]
        _, kwargs = tree_unflatten(given, self._specs[component.name])
        try:
            with torch.no_grad(), patch_model_config(module, flags):
                return [*tree_leaves(module(**_with_masks(kwargs))), *given]
        except Exception as error:
            raise ExportError(
                f"the model itself does not run {component.name} with these inputs "
                f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}): give others with --inputs"
            ) from error


def _as_computed(config: EtConfig) -> EtConfig:
    """The config whose quantized model computes what the export computes: activations may be quantized by an option."""
    if config.xnnpack_weight_only != "dynamic-activation":
        return config
    names = ("qlinear", "qlinear_encoder")
    return replace(config, **{name: _DYNAMIC.get(getattr(config, name), getattr(config, name)) for name in names})


def _precise(module: nn.Module, known: dict[int, nn.Parameter]) -> nn.Module:
    """A copy of ``module`` in float32 with the values of its quantized weights.

    Args:
        module: not changed.
        known: the parameters that were converted for other modules, by the identity of the original.
    """
    copy: nn.Module = structural_copy(module)
    for each in copy.modules():
        for name, parameter in each._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            if id(parameter) not in known:
                value: Any = parameter.detach().to(torch.float32)
                known[id(parameter)] = nn.Parameter(
                    value.dequantize() if type(value) is not Tensor else value, requires_grad=False
                )
            each._parameters[name] = known[id(parameter)]
        for name, buffer in each._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                each._buffers[name] = buffer.float()
    return copy


def _with_masks(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` with the masks that a prefill was traced without, because its attention is causal.

    The model takes an attention without a mask for a causal one only if the prompt has more than one token.
    """
    masks = kwargs.get("attention_mask")
    if not isinstance(masks, dict) or all(mask is not None for mask in masks.values()):
        return kwargs
    given = next((mask for mask in masks.values() if mask is not None), None)
    if given is None:
        # The model makes its own from a mask of tokens.
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        return kwargs | {"attention_mask": torch.ones(tokens.shape[:2], dtype=torch.int64)}
    rows, columns = given.shape[-2:]
    causal = (torch.arange(columns) <= torch.arange(rows)[:, None]).expand(given.shape)
    return kwargs | {"attention_mask": {kind: causal if mask is None else mask for kind, mask in masks.items()}}

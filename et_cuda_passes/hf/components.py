"""The components of a generative model, and the names of their constants in the whole model."""

import copy
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticCache, StaticLayer, StaticSlidingWindowLayer
from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes
from transformers.exporters.utils import decompose_for_generation, is_multimodal, prepare_for_export
from transformers.utils import ModelOutput

from et_cuda_passes.hf.artifact import ExportError
from et_cuda_passes.targets import get_target

Inputs = MutableMapping[str, Any]
"""The kwargs of a forward."""

_PROJECTORS = ("multi_modal_projector", "connector", "embed_vision", "embed_audio")


def split_model(
    model: PreTrainedModel, inputs: Inputs, generation_config: GenerationConfig | None, multi_token_decode: bool
) -> dict[str, tuple[nn.Module, Inputs]]:
    """The components that generation needs, in the order in which it runs them, each with the kwargs that it gets.

    transformers splits off the modules that ``forward`` runs. This function adds those that ``generate`` runs before:
    the encoder of an encoder-decoder model, and in most models the encoders of images and audio. It also adds the token
    embedding of a model whose language model takes embeddings. An export without them could not be run.

    Args:
        model: ``generate`` is called on it.
        inputs: the kwargs of ``generate``; not changed.
        generation_config: see :meth:`et_cuda_passes.hf.exporter.EtExporter.export_for_generation`.
        multi_token_decode: likewise.

    Raises:
        RuntimeError: transformers cannot split the model.
    """
    before: dict[str, Inputs] = {}
    inputs = dict(inputs)
    cache = full_length_cache(model, generation_config)
    if "past_key_values" not in inputs and generation_config is not None and cache is not None:
        # ``generate`` takes a cache, or the name of one.
        generation_config = copy.deepcopy(generation_config)
        generation_config.cache_implementation = None
        inputs["past_key_values"] = cache
    modules = _modules_before_forward(model)
    with torch.no_grad(), _recorded(modules, before):
        parts: dict[str, tuple[nn.Module, Inputs]] = decompose_for_generation(
            model,
            inputs,
            generation_config=generation_config,
            multi_token_decode=multi_token_decode,
        )
    for _, kwargs in parts.values():
        # A mark of ``generate`` on a cache that it did not create, which would belong to the signature of the program.
        cache = kwargs.get("past_key_values")
        if isinstance(cache, StaticCache) and hasattr(cache, "_is_user_defined"):
            del cache._is_user_defined
    return {name: (modules[name], before[name]) for name in modules if name in before and name not in parts} | parts


def _modules_before_forward(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that ``generate`` may run before the model's forward, by the name of their component."""
    modules: dict[str, nn.Module] = {}
    if getattr(model.config, "is_encoder_decoder", False):
        modules["encoder"] = model.get_encoder()
    elif is_multimodal(model):
        for modality in ("image", "audio"):
            modules[f"{modality}_encoder"] = model.get_encoder(modality=modality)
        for parent, name in itertools.product((model.base_model, model), _PROJECTORS):
            if getattr(parent, name, None) is not None:
                modules[name] = getattr(parent, name)
        modules["token_embedding"] = model.get_input_embeddings()
    return {name: module for name, module in modules.items() if module is not None and module is not model}


@contextmanager
def _recorded(modules: Mapping[str, nn.Module], calls: dict[str, Inputs]) -> Iterator[None]:
    """Record the kwargs of the first call of each module."""

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in calls:
            return
        signature = inspect.signature(module.forward)
        bound: dict[str, Any] = dict(signature.bind(*args, **kwargs).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind == inspect.Parameter.VAR_KEYWORD:
                bound |= bound.pop(parameter.name, {})
        calls[name] = copy.deepcopy({key: value for key, value in bound.items() if value is not None})

    handles = [
        module.register_forward_pre_hook(partial(record, name), with_kwargs=True) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def full_length_cache(model: PreTrainedModel, generation_config: GenerationConfig | None) -> StaticCache | None:
    """The static cache that a model with sliding windows is traced with; None for another model or another cache."""
    if generation_config is None or generation_config.cache_implementation != "static":
        return None
    length = generation_config.max_cache_len
    if length is None or model.config.is_encoder_decoder:
        return None
    cache = StaticCache(model.config, max_cache_len=length)
    return with_full_layers(cache, length) if any(cache.is_sliding) else None


def with_full_layers(cache: Cache, length: int | None) -> Cache:
    """``cache``, in place, whose layers with a sliding window hold ``length`` tokens like the others.

    transformers' layers for a window count the tokens in Python, so that a traced decode step would be for one position
    only. The window itself is in the attention mask.
    """
    if isinstance(cache, StaticCache) and length is not None:
        cache.layers = [
            StaticLayer(length) if type(layer) is StaticSlidingWindowLayer else layer for layer in cache.layers
        ]
    return cache


def structural_copy(model: nn.Module) -> Any:
    """A copy of the modules that shares all parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def choose_experts(model: nn.Module, names: Sequence[str]) -> None:
    """Choose the form in which the experts of transformers are exported for the targets ``names``.

    Only targets with kernels for experts have a grouped matrix product, which reads each expert once. The others have
    one for each pair of a row and an expert. A loop over experts cannot be exported.
    """
    if not isinstance(model, PreTrainedModel) or not model._can_set_experts_implementation():
        return
    if not all("int4_experts" in get_target(name).kernels for name in names):
        model.set_experts_implementation("batched_mm")
    elif "eager" in model.get_experts_implementation().values():
        model.set_experts_implementation("grouped_mm")


def with_fqns_of_root(program: ExportedProgram, fqn: str | None, component: str) -> ExportedProgram:
    """``program``, whose constants have the names that they have in the whole model.

    Methods of one file share a constant by its name. The same weight must have one name in all methods, and the
    constants that tracing created, which every program numbers from 0, must have another in each.

    Args:
        program: a program of a submodule; it is not changed.
        fqn: the name of the submodule; None if it is not one of the model's.
        component: the name of the component; empty if it is the only one.
    """
    prefix = f"{component}." if fqn is None else f"{fqn}." if fqn else ""
    names: dict[str, str] = {}

    def renamed(spec: InputSpec) -> InputSpec:
        if spec.target is None:
            return spec
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            names[spec.target] = prefix + spec.target
        elif component:
            names[spec.target] = f"{component}_{spec.target}"
        return InputSpec(spec.kind, spec.arg, names.get(spec.target, spec.target), spec.persistent)

    signature = copy.deepcopy(program.graph_signature)
    signature.input_specs = [renamed(spec) for spec in signature.input_specs]
    for output in signature.output_specs:
        if output.target in names:
            output.target = names[output.target]

    def rename(values: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, prefix + name): value for name, value in values.items()}

    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=signature,
        state_dict=rename(program.state_dict),
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=rename(program.constants),
        verifiers=program.verifiers,
    )


def contiguous(inputs: Inputs) -> Inputs:
    """``inputs`` with every tensor dense, in place: the programs read the memory of their inputs as dense."""
    for name, value in inputs.items():
        inputs[name] = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, value)
    return inputs


def tensor_first(inputs: Inputs) -> Inputs:
    """``inputs`` with one first that is a tensor, or begins with one.

    ExecuTorch 1.5.1 puts new constants before the first input that is no constant, and their entries in the signature
    before the first input. So a program whose first input is None, as a mask may be, fails to lower.
    """
    first = next(
        (
            name
            for name, value in inputs.items()
            if isinstance(next(iter(torch.utils._pytree.tree_leaves(value)), None), torch.Tensor)
        ),
        None,
    )
    return inputs if first is None else {first: inputs[first], **inputs}


def text_length_of(inputs: Inputs) -> int | None:
    """The number of tokens in the inputs of a model."""
    tokens = inputs.get("input_ids")
    return None if tokens is None else int(tokens.shape[1])


def dynamic_lengths(config: Any, model: nn.Module, inputs: Inputs, text_length: int | None) -> dict[str, Any]:
    """The fields by which ``config`` gets the length of the text as the only dynamic size; none if it does not ask."""
    if not config.dynamic or config.max_length is None or config.dynamic_shapes is not None or text_length is None:
        return {}
    # transformers adds inputs before it traces, and the shapes must be those of all.
    prepared = prepare_for_export(model, dict(inputs))[1]
    return {"dynamic_shapes": _length_shapes(prepared, text_length, config.max_length)}


def _length_shapes(value: Any, length: int, longest: int) -> Any:
    """The dynamic shapes of an input, or of all of them, whose only dynamic size is the length of the text.

    Args:
        value: the input; a dict for the kwargs of a component.
        length: the length of the text in it.
        longest: the largest length.
    """
    if isinstance(value, torch.Tensor):
        return {axis: Dim.AUTO(max=longest) for axis, size in enumerate(value.shape) if size == length}
    if type(value) is dict:
        return {name: _length_shapes(each, length, longest) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_length_shapes(each, length, longest) for each in value)
    if isinstance(value, ModelOutput):
        return [_length_shapes(each, length, longest) for each in value.values()]
    return _static(get_auto_dynamic_shapes(value))


def _static(shapes: Any) -> Any:
    """``shapes`` of the same structure without a dynamic size."""
    if isinstance(shapes, dict):
        return {name: _static(each) for name, each in shapes.items() if not isinstance(name, int)}
    return type(shapes)(map(_static, shapes)) if isinstance(shapes, (list, tuple)) else None


def longest_text(config: Any, inputs: Inputs, text_length: int | None) -> float:
    """The largest number of tokens that a component can be run with; infinity if nothing limits it."""
    layers = getattr(inputs.get("past_key_values"), "layers", ())
    if lengths := [layer.max_cache_len for layer in layers if isinstance(layer, StaticLayer)]:
        return int(max(lengths))
    if config.dynamic:
        return math.inf if config.max_length is None else int(config.max_length)
    return text_length or 0


def check_rope(model: nn.Module, longest: float, name: str) -> None:
    """Check that ``model`` computes the same rotary positions for every text of up to ``longest`` tokens.

    With the type "dynamic" (NTK) transformers computes other frequencies when a text is longer than the positions of
    the model. A program cannot do that.

    Raises:
        ExportError: it does not.
    """
    for module in model.modules():
        limit = int(getattr(module, "original_max_seq_len", 0))
        if _dynamic_ropes(module) and longest > limit:
            given = "texts of any length" if longest == math.inf else f"{longest} tokens"
            raise ExportError(
                f"{name}: beyond {limit} tokens the model computes its rotary positions with other frequencies "
                f"(rope_type dynamic), which an export cannot do, and this one is for {given}: give at most {limit} "
                "tokens as max_length, and as max_cache_len of a static cache"
            )


def stop_dynamic_rope(model: nn.Module) -> None:
    """Fix, in place, the frequencies of rotary positions to those of texts that :func:`check_rope` accepts."""
    for module in model.modules():
        ropes = _dynamic_ropes(module)
        for prefix in ropes:
            # A longer text, which the model had before, leaves others.
            setattr(
                module,
                f"{prefix}inv_freq",
                nn.Buffer(getattr(module, f"{prefix}original_inv_freq").clone(), persistent=False),
            )
        if ropes:
            types = {layer: "default" if "dynamic" in kind else kind for layer, kind in _rope_types(module).items()}
            vars(module)["rope_type"] = types.get("", types)


def _dynamic_ropes(module: nn.Module) -> list[str]:
    """The prefixes of the attributes of each set of rotary frequencies that depends on the length."""
    return [f"{layer}_" if layer else "" for layer, kind in _rope_types(module).items() if "dynamic" in kind]


def _rope_types(module: nn.Module) -> dict[str, str]:
    """The types of rotary positions of a module of transformers by type of layer; "" stands for all layers."""
    found = getattr(module, "rope_type", None)
    return {"": found} if isinstance(found, str) else dict(found) if isinstance(found, dict) else {}


def fqn_in(root: nn.Module, module: nn.Module) -> str | None:
    """The name of ``module`` in ``root``; None if it is none of its modules."""
    # transformers splits a model into shallow copies, which have the modules of the original.
    if module is root or (type(module) is type(root) and module._modules == root._modules):
        return ""
    return next((fqn for fqn, each in root.named_modules() if each is module), None)

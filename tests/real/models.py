"""Real architectures by name: SmolLM2 with its own weights, the others from transformers' code with random ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torchao.quantization import IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from et_cuda_passes.quant.decoders import DEQUANTIZE

BF16 = torch.bfloat16
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Real:
    """A model in bf16, its inputs, and the inputs' dynamic dimensions by name.

    ``int8_words``: whether its table of words, and the last linear that shares it, are in int8.
    """

    model: Any
    inputs: Named
    dynamic: dict[str, dict[int, Dim]]
    int8_words: bool = False


def tokens(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16)


def smollm2() -> Real:
    from demo.model import smollm2 as source
    from et_cuda_passes.hf.checkpoint import Checkpoint
    from et_cuda_passes.hf.loading import load

    length = Dim("length", min=2, max=256)
    model = load(Checkpoint.find(str(source())), dtype="bfloat16").model
    model.config.use_cache = False
    return Real(model, {"input_ids": tokens(49152, 1, 9)}, {"input_ids": {1: length}}, int8_words=True)


def whisper() -> Real:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=128,
        num_mel_bins=16,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
    )
    inputs = {"input_features": floats(1, 16, 40), "decoder_input_ids": tokens(128, 1, 5)}
    return Real(WhisperForConditionalGeneration(config), inputs, {})


def mixtral(experts: str = "grouped_mm") -> Real:
    """A model whose experts are stacked matrices, multiplied as a grouped mm, the default of transformers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    model = MixtralForCausalLM(config)
    for layer in model.model.layers:
        # A trained router decides clearly. A random one comes so close to a tie that one bit selects another expert.
        layer.mlp.gate.weight.data *= 50
    model.set_experts_implementation(experts)
    return Real(model, {"input_ids": tokens(128, 1, 6)}, {"input_ids": {1: Dim("length", min=2, max=32)}})


def mixtral_chosen() -> Real:
    """The same model with the experts' weights indexed for each token, as transformers advises for decoding."""
    return mixtral("batched_mm")


def bert() -> Real:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    inputs = {"input_ids": tokens(128, 2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    return Real(BertForSequenceClassification(config), inputs, {})


def vit() -> Real:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
    )
    return Real(ViTForImageClassification(config), {"pixel_values": floats(1, 3, 32, 32)}, {})


MODELS: dict[str, Callable[[], Real]] = {f.__name__: f for f in (smollm2, whisper, mixtral, mixtral_chosen, bert, vit)}


@dataclass(frozen=True)
class Prepared:
    """An exported model with quantized linears, the readers of its weights, and its result with dequantized weights.

    ``calls`` are the FQNs of the weights that run, one for each time; ``experts`` those among them that are stacks.
    """

    program: ExportedProgram
    inputs: Named
    wanted: Tensor
    calls: list[str]
    experts: list[str]


class Int4Stack(nn.Module):
    """A stack of experts' matrices as torchao quantizes it; its configurations accept only matrices."""

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        whole = IntxUnpackedToInt8Tensor.from_hp(weight, (1, 1, 32), torch.int4)
        return whole.qdata, whole.scale, whole.zero_point

    def forward(self, data: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return DEQUANTIZE(data, (1, 1, 32), scale, zero_point, torch.int8, -8, 7, scale.dtype)


def quantize_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Quantizes every stack of experts; returns the modules that hold one, by the stack's FQN.

    Other parameters have three dimensions too: a convolution's kernels, a position for each token.
    """
    stacks = [name for name, parameter in model.named_parameters() if ".experts." in name and parameter.dim() == 3]
    held = {name: model.get_submodule(name.rpartition(".")[0]) for name in stacks}
    for name, module in held.items():
        register_parametrization(module, name.rpartition(".")[2], Int4Stack(), unsafe=True)
    return held


def quantize_words(model: Any) -> nn.Module:
    """Quantizes the table of words to int8, one scale a row; the last linear still reads the same parameter."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is words.weight, "the model ties no table"
    quantize_(words, IntxWeightOnlyConfig(torch.int8, PerAxis(0)), filter_fn=lambda module, _: module is words)
    head.weight = words.weight
    return words


def prepare(name: str) -> Prepared:
    """``name`` in bf16, quantized.

    Linears and experts are in int4 with groups of 32, symmetric or not. A table of words is in int8 if the model has
    ``int8_words``, with the linear that is tied to it.
    """
    torch.manual_seed(0)
    real = MODELS[name]()
    model = real.model.to(BF16).eval().requires_grad_(False)
    words = quantize_words(model) if real.int8_words else None
    held = words.weight if words is not None else None
    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        filter_fn=lambda module, _: isinstance(module, nn.Linear) and module.weight is not held,
    )
    stacks = quantize_experts(model)
    dynamic = {key: real.dynamic.get(key) for key in real.inputs} if real.dynamic else None
    with torch.no_grad():
        program = torch.export.export(model, (), real.inputs, dynamic_shapes=dynamic)
    calls: list[str] = []
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # a tied parameter has its first name
    for module in [module for module in model.modules() if isinstance(module, nn.Linear) or module is words]:
        name = names[id(module.weight)]
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        # The reference is plain torch: a float linear with the dequantized weight.
        module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    for path, module in stacks.items():
        module.register_forward_hook(lambda *_, path=path: calls.append(path))
        remove_parametrizations(module, path.rpartition(".")[2])
    with torch.no_grad():
        wanted = model(**real.inputs).logits
    return Prepared(program, real.inputs, wanted, calls, list(stacks))

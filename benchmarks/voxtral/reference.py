"""The reference: the same weights in eager, operator by operator, with dequantized linears."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.voxtral.clock import Laps, latency
from benchmarks.voxtral.dimensions import Dimensions
from benchmarks.voxtral.weights import Form, build

Method = Callable[..., Any]
"""A function of tensors that returns a tensor or a list with one."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of the methods: mel, tokens [1, prompt + steps] and their embeddings."""

    mel: Tensor
    tokens: Tensor
    embeddings: Tensor

    def cases(self, methods: Mapping[str, Method], dimensions: Dimensions) -> dict[str, Callable[[], Tensor]]:
        """The measured calls. A case may run any number of times, decode only after prefill."""
        prompt, device = dimensions.prompt, self.tokens.device
        embedded = {0: self.embeddings[:, :prompt]}
        embedded |= {prompt + step: self.embeddings[:, prompt + step :][:, :1] for step in range(dimensions.steps)}
        # Separate tensors are aligned; a library would copy an unaligned input.
        text = {
            at: partial(
                methods["text_decoder"], x.clone(), torch.arange(at, at + x.shape[1], dtype=torch.int64, device=device)
            )
            for at, x in embedded.items()
        }
        calls = {
            "audio_encoder": partial(methods["audio_encoder"], self.mel),
            "token_embedding": partial(methods["token_embedding"], self.tokens[:, :prompt].clone()),
            "prefill": text[0],
            **{decode(step): text[prompt + step] for step in range(dimensions.steps)},
        }
        return {name: partial(_only, call) for name, call in calls.items()}


def decode(step: int) -> str:
    """The name of the case of the token ``step`` after the prompt."""
    return "decode" if step == 0 else f"decode+{step}"


def _only(call: Callable[[], Any]) -> Tensor:
    """The one output of a call."""
    result = call()
    if isinstance(result, Tensor):
        return result
    (tensor,) = result
    assert isinstance(tensor, Tensor)
    return tensor


def refer(form: Form, dimensions: Dimensions, path: Path, device: str) -> dict[str, Any]:
    """Run every case in eager, write inputs and outputs to ``path``, and return the latencies.

    Args:
        form: "float" or "dequantized".
        dimensions: sizes of the networks.
        path: file for :class:`Inputs` and the outputs by case.
        device: device of the run.
    """
    lap = Laps()
    model, digest = build(dimensions, form, device, kept=device)
    lap("weights")
    random = torch.Generator(device).manual_seed(1)
    mel = torch.randn(1, dimensions.mel, dimensions.frames, generator=random, device=device).bfloat16()
    size = (1, dimensions.prompt + dimensions.steps)
    tokens = torch.randint(dimensions.vocabulary, size, generator=random, device=device)
    methods = dict(model.named_children())
    with torch.no_grad():
        inputs = Inputs(mel, tokens, model.token_embedding(tokens))
        cases = inputs.cases(methods, dimensions)
        outputs = {name: case() for name, case in cases.items()}
        lap("run")
        eager = {name: latency(case, device) for name, case in cases.items() if "+" not in name}
    lap("time")
    state = {"inputs": vars(inputs), "outputs": outputs}
    torch.save(_cpu(state), path)
    lap("write")
    return {"seconds": lap.seconds, "weights": digest, "latency": eager}


def _cpu(state: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {part: {name: tensor.cpu() for name, tensor in held.items()} for part, held in state.items()}

"""Random inputs from a signature: sizes at the ends of their ranges, and values that belong together."""

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, treespec_dumps
from transformers.exporters.metadata import ExportMetadata

from et_cuda_passes.hf.artifact import Component, ExportError, Input, Signature
from et_cuda_passes.hf.samples import Case, Samples
from tests.hf.models import qwen_config


def samples(inputs: list[Input], ranges: dict[str, tuple[int, int | None]], text: Any = (), **kwargs: Any) -> Samples:
    """For a component whose kwargs are the inputs, but for those of a cache, which are one kwarg."""
    names: dict[str, Any] = {}
    for each in inputs:
        if each.name.startswith("past_key_values"):
            names.setdefault("past_key_values", []).append(0)
        else:
            names[each.name] = 0
    spec = treespec_dumps(tree_flatten(((), names))[1])
    metadata = ExportMetadata(in_spec=spec, kwargs=kwargs)
    return Samples(Component("x", "x", Signature(tuple(inputs), ranges), {}), metadata, qwen_config(), text)


IDS = Input("input_ids", "int64", (1, "s1"))


def test_cases_are_the_shortest_the_longest_and_one_between() -> None:
    assert [str(case) for case in samples([IDS], {"s1": (2, 31)}).cases()] == ["s1=1", "s1=16", "s1=31"]
    assert [case.sizes for case in samples([IDS], {"s1": (5, 6)}).cases()] == [{"s1": 5}, {"s1": 6}]
    assert [str(case) for case in samples([Input("x", "float32", (2, 3))], {}).cases()] == ["its one size"]


def test_size_without_limit_ends_at_a_multiple_of_the_traced_one() -> None:
    found = samples([IDS], {"s1": (2, None)}, input_ids={"shape": [1, 7]}).cases()
    assert found[-1].sizes == {"s1": 28}


def test_expression_of_a_size_follows_the_size() -> None:
    mask = Input("attention_mask", "int64", (1, "s1 + 4"))
    for size in (1, 9):
        ids, ones = samples([IDS, mask], {"s1": (2, 9)}).draw(Case({"s1": size}), torch.Generator())
        assert ids.shape == (1, size) and torch.equal(ones, torch.ones(1, size + 4, dtype=torch.int64))
    hostile = Input("attention_mask", "int64", (1, "__import__('os').getpid() + s1"))
    with pytest.raises(ValueError, match="a size of an input"):
        samples([IDS, hostile], {"s1": (2, 9)}).draw(Case({"s1": 2}), torch.Generator())


def test_values_belong_together() -> None:
    cache = [
        Input("past_key_values_0", "float32", (1, 2, 8, 4)),
        Input("past_key_values_1", "int64", ()),
    ]
    mask = Input("attention_mask", "bool", (1, 1, 1, 8))
    positions = Input("position_ids", "int64", (1, 1))
    drawn = samples([Input("input_ids", "int64", (1, 1)), mask, positions, *cache], {}, text=[5, 3, 7, 9])
    assert [case.past for case in drawn.cases()] == [1, 4, 7]
    ids, visible, position, keys, count = drawn.draw(Case({}, 4), torch.Generator())
    # The fifth token of the text, which is repeated.
    assert (int(ids), int(position), int(count), keys.shape) == (5, 4, 4, (1, 2, 8, 4))
    assert visible.flatten().tolist() == [True] * 5 + [False] * 3


def test_random_tokens_are_in_the_vocabulary() -> None:
    (ids,) = samples([Input("input_ids", "int64", (4, 500))], {}).draw(Case({}), torch.Generator())
    assert int(ids.min()) >= 0 and 60 < int(ids.max()) < 96


def test_constant_is_the_value_of_the_export() -> None:
    found = samples([IDS, Input("attention_mask", constant=None)], {"s1": (2, 4)})
    assert found.draw(Case({"s1": 2}), torch.Generator())[1] is None


def test_huge_input_is_an_error() -> None:
    with pytest.raises(ExportError, match="give inputs of the intended size"):
        samples([IDS], {"s1": (2, 2**40)}).draw(Case({"s1": 2**40}), torch.Generator())

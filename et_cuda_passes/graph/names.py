"""Names of layers and nodes in texts: those that differ only in numbers are alike."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

_INDEX = re.compile(r"(?<![^. ])(?:0|[1-9][0-9]*)(?![^.,])")
"""An index of a layer in FQNs that are joined by ", "."""
_PLACE = "\0"
"""In place of an index; no FQN has it."""


def form_of(name: str) -> str:
    """A name without its indices: equal for the same layer of every block."""
    return _INDEX.sub(_PLACE, name)


def fold(names: Iterable[str]) -> list[str]:
    """FQNs that differ in indices as one text: ``layers.{0..29}.up.weight``; exactly these names, in their order."""
    by_form: dict[str, list[tuple[int, ...]]] = {}
    for name in dict.fromkeys(names):
        by_form.setdefault(form_of(name), []).append(tuple(map(int, _INDEX.findall(name))))
    return [text for form, indices in by_form.items() for text in _fold_form(form, indices)]


def _fold_form(form: str, indices: Sequence[tuple[int, ...]]) -> list[str]:
    # Indices that are always equal, as in the names of two weights of one layer, are one index.
    columns = list(zip(*indices, strict=True))
    different = list(dict.fromkeys(columns))
    places = [different.index(column) for column in columns]
    # Boxes of indices: two with the same sets but one become one box.
    boxes = [tuple(frozenset([index]) for index in row) for row in zip(*different, strict=True)]
    for axis in reversed(range(len(different))):
        joined: dict[tuple[frozenset[int], ...], frozenset[int]] = {}
        for box in boxes:
            key = (*box[:axis], *box[axis + 1 :])
            joined[key] = joined.get(key, frozenset()) | box[axis]
        boxes = [(*key[:axis], found, *key[axis:]) for key, found in joined.items()]
    pieces = form.split(_PLACE)
    if not boxes:
        return [form]
    return [
        "".join(piece + (_ranges(box[places[i]]) if i < len(places) else "") for i, piece in enumerate(pieces))
        for box in boxes
    ]


def _ranges(numbers: frozenset[int]) -> str:
    """``7``, ``{0..29}`` or ``{0,2,5..7}``."""
    runs = [
        [index for _, index in run] for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    ]
    texts = [
        str(run[0]) if len(run) == 1 else ("{}..{}" if len(run) > 2 else "{},{}").format(run[0], run[-1])
        for run in runs
    ]
    return texts[0] if len(numbers) == 1 else f"{{{','.join(texts)}}}"


def without_numbers(text: str) -> str:
    """``text`` without counts and the numbers at the ends of node names, which differ from layer to layer."""
    return re.sub(r"(?<=[a-z])_\d+\b|\b\d+ (?=that )", "", text)

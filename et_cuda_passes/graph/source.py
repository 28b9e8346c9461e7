"""The user's own line behind a node: the innermost frame of its stack trace that is no library's plumbing."""

import re

from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]*)')
_PLUMBING = re.compile(r"[/\\](torch|torchao|executorch)[/\\]")


def source_of(node: Node) -> str:
    """``file:line: code`` of the user's line that made ``node``; empty where the export recorded none.

    Frames inside torch, torchao and executorch are passed over, unless there is no other; code that torch generated is
    no line of anybody's, and is called differently in every run.
    """
    found = _FRAME.finditer(node.meta.get("stack_trace") or "")
    frames = [frame for frame in found if not frame["file"].startswith("<eval_with_key>")]
    own = [frame for frame in frames if not _PLUMBING.search(frame["file"])] or frames
    if not own:
        return ""
    frame = own[-1]
    return f"{frame['file']}:{frame['line']}: {frame['code'].strip()}"

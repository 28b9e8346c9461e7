"""jobs.toml: models x schemes x targets x GPUs as a list of jobs, each of which is one ``export`` or ``lower``."""

import difflib
import inspect
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

from et_cuda_passes.cli.app import COMMON
from et_cuda_passes.cli.console import UsageError
from et_cuda_passes.cli.options import complete_targets
from et_cuda_passes.kernels.gpus import gpu_arch

Command = Callable[..., None]
Options = dict[str, Any]

_FILE_KEYS = (
    "output",
    "cache",
    "cache-limit",
    "retries",
    "options",
    "model",
    "scheme",
    "target",
    "accelerators",
    "exclude",
)
_NEEDS = ("cpus", "gpus", "memory")
_LEAST_LIMIT = 0.001
"""As that of ``--cache-limit``."""
_AXES = ("model", "scheme", "target", "gpu")
_SET_HERE = {
    "model": "the table [model.NAME] names it with path",
    "target": "the table [target.NAME] names it",
    "output-dir": "each job has a folder of its own below output",
    "gpu": "it is a key of [target.NAME]",
    "cache": "it is a key of the file, outside of the tables",
    "cache-limit": "it is a key of the file, outside of the tables",
    "json": "the results of all jobs are one document",
    "overwrite": "a job replaces only its own files",
}
"""Options of the commands that other keys determine."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_URL = re.compile(r"\w+:")


@dataclass(frozen=True)
class Needs:
    """The resources of a job, in the units of Ray.

    Attributes:
        cpus: CPU cores.
        gpus: GPUs.
        memory: bytes; None if it is not known.
        accelerator: the type of the GPU as Ray names it, such as "H100"; None for any.
    """

    cpus: float = 1
    gpus: float = 0
    memory: int | None = None
    accelerator: str | None = None


@dataclass(frozen=True)
class Job:
    """One command, and where its files go.

    Attributes:
        name: unique in the file; also the name of the folder.
        command: the arguments of ``et-cuda-passes``.
        identity: those of them that determine the output: no output folder and no cache.
        inputs: the files and folders that the command reads.
        folder: the output folder of the command.
        log: the file that gets the progress and the errors of the command.
        needs: the resources.
        retries: how often Ray starts the job again after a lost machine, or a command that was killed.
    """

    name: str
    command: tuple[str, ...]
    identity: tuple[str, ...]
    inputs: tuple[Path, ...]
    folder: Path
    log: Path
    needs: Needs
    retries: int

    @property
    def shell_command(self) -> tuple[str, ...]:
        """The command for a shell."""
        return ("et-cuda-passes", *self.command)


@dataclass(frozen=True)
class JobsFile:
    """The content of a jobs.toml.

    Attributes:
        output: the folder of all jobs.
        jobs: in the order of the file.
    """

    output: Path
    jobs: tuple[Job, ...]


def read_jobs(path: Path, export: Command, lower: Command) -> JobsFile:
    """The jobs of a file; ``export`` and ``lower`` are the commands, whose options the file may have.

    Raises:
        UsageError: the file cannot be read, or has an unknown key, a wrong value or two jobs of one name.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML file: {error}") from None
    return _Reader(path, document, {"export": _options_of(export), "lower": _options_of(lower)}).read()


@dataclass(frozen=True)
class _Option:
    """An option of a command: the type of its value, and the least value of a number."""

    kind: Any
    least: float | None
    is_path: bool


def _options_of(command: Command) -> dict[str, _Option]:
    """The options of a command by their names, as "max-length"."""
    hints = get_type_hints(command, include_extras=True)
    annotations = {name: hints[name] for name in inspect.signature(command).parameters}
    annotations |= {name: kind for name, (kind, _) in COMMON.items()}
    found = {}
    for parameter, annotation in annotations.items():
        kind, info = get_args(annotation)[:2]
        if not isinstance(info, OptionInfo):
            continue  # an argument
        # Typer keeps the first name in an annotation as the default.
        names = [each for each in (info.default, *(info.param_decls or ())) if isinstance(each, str)]
        name = next((each[2:] for each in names if each.startswith("--")), parameter.replace("_", "-"))
        if get_origin(kind) in (Union, UnionType):
            kind = next(each for each in get_args(kind) if each is not type(None))
        found[name] = _Option(kind, info.min, kind is Path)
    return found


@dataclass
class _Reader:
    path: Path
    document: dict[str, Any]
    commands: dict[str, dict[str, _Option]]

    def read(self) -> JobsFile:
        self._check_keys(self.document, _FILE_KEYS, "")
        output = self._folder("output")
        if output is None:
            raise self._error('output is missing: name the folder of all results, as in output = "build"')
        models, targets = self._tables("model"), self._tables("target")
        for target in targets:
            self._check_target(target)
        tables = self._tables("scheme")
        schemes = {name: self._options(each, f"[scheme.{name}]", ("export",)) for name, each in tables.items()}
        if not models or not targets:
            lacking = "model" if not models else "target"
            raise self._error(f"there is no {lacking}: add a table [{lacking}.NAME]")
        common = self._options(self._table(self.document, "options", ""), "[options]", ("export", "lower"))
        accelerators = self._table(self.document, "accelerators", "")
        for accelerated in accelerators:
            self._check_gpu(accelerated, "[accelerators]")
        gpus = {name: self._gpus(name, table) for name, table in targets.items()}
        named = [gpu for each in gpus.values() for gpu in each if gpu is not None]
        excluded = list(self._excluded(models, schemes, targets, named))
        sources = {name: self._source(name, table) for name, table in models.items()}
        if schemes and all(command == "lower" for _, command in sources.values()):
            raise self._error("a [scheme.NAME] quantizes a model that is exported, and each path is a .pt2: remove it")
        of_target = {
            name: self._options(_without(table, "gpu", "needs"), f"[target.{name}]", ("export", "lower"))
            for name, table in targets.items()
        }
        commands = {command for _, command in sources.values()}
        self._check_used(common, "[options]", commands)
        for name, each in of_target.items():
            self._check_used(each, f"[target.{name}]", commands)
        jobs: dict[str, Job] = {}
        for model, model_table in models.items():
            source, command = sources[model]
            own = self._options(_without(model_table, "path"), f"[model.{model}]", (command,))
            for scheme in schemes if command == "export" and schemes else [None]:
                chosen = {} if scheme is None else schemes[scheme]
                for target, table in targets.items():
                    needs = self._needs(target, table)
                    for gpu in gpus[target]:
                        axes = {"model": model, "scheme": scheme, "target": target, "gpu": gpu}
                        if any(_fits(axes, each) for each in excluded):
                            continue
                        options = {**common, **chosen, **of_target[target], **own}
                        options = {name: each for name, each in options.items() if name in self.commands[command]}
                        job = self._job(command, source, axes, options, output, needs, accelerators)
                        if job.name in jobs:
                            raise self._error(f"two jobs have the name {job.name}: rename a model, scheme or target")
                        jobs[job.name] = job
        if not jobs:
            raise self._error("[[exclude]] leaves no job")
        return JobsFile(output, tuple(jobs.values()))

    def _job(
        self,
        command: str,
        source: Path | str,
        axes: Mapping[str, str | None],
        options: Options,
        output: Path,
        needs: dict[str, Any],
        accelerators: dict[str, Any],
    ) -> Job:
        name = "-".join(re.sub(r"[^\w.+-]", "_", each) for each in axes.values() if each is not None)
        target, gpu = str(axes["target"]), axes["gpu"]
        arguments = ["--model", str(source)] if command == "export" else [str(source)]
        arguments += ["--target", target, *(["--gpu", gpu] if gpu else [])]
        inputs = [source] if isinstance(source, Path) else []
        places: list[str] = []
        for option, value in sorted(options.items()):
            known = self.commands[command][option]
            values = value if isinstance(value, list) else [value]
            written = [f"--{option}"] if value is True else [part for each in values for part in (f"--{option}", each)]
            if value is False:
                continue
            if option == "stream":
                places += written
                continue
            arguments += written
            if known.is_path:
                inputs.append(Path(value))
        if cache := self._cache():
            places += ["--cache", cache]
            if (limit := self.document.get("cache-limit")) is not None:
                if self._number(limit, "cache-limit") < _LEAST_LIMIT:
                    raise self._error(f"cache-limit must be at least {_LEAST_LIMIT} GB; got {limit}")
                places += ["--cache-limit", str(limit)]
        elif "cache-limit" in self.document:
            raise self._error("cache-limit limits the folder of cache: give that too")
        folder = output / name
        places += ["--output-dir", str(folder), *(["--overwrite"] if command == "export" else [])]
        on_gpu = "cuda" in target.split(",") and options.get("stop-after") != "rewrite"
        needs = {"gpus": 1 if on_gpu else 0, **needs}
        memory = needs.pop("memory", None)
        accelerator = accelerators.get(gpu, accelerators.get(gpu.partition(":")[0])) if gpu and needs["gpus"] else None
        if accelerator is not None and not isinstance(accelerator, str):
            raise self._error(f'[accelerators] {gpu} must be a text, such as "H100"; got {accelerator!r}')
        return Job(
            name,
            (command, *arguments, *places),
            (command, *arguments),
            tuple(inputs),
            folder,
            output / f"{name}.log",
            Needs(**needs, memory=None if memory is None else int(memory * 1e9), accelerator=accelerator),
            self._retries(),
        )

    # Tables -----------------------------------------------------------------------------------------------------------

    def _error(self, text: str) -> UsageError:
        return UsageError(f"{self.path}: {text}")

    def _check_keys(self, table: Mapping[str, Any], known: Iterable[str], place: str) -> None:
        for key in table:
            if key not in known:
                raise self._error(f"{place}{' has ' if place else ''}unknown key {key!r}; {_nearest(key, known)}")

    def _table(self, table: Mapping[str, Any], key: str, place: str) -> dict[str, Any]:
        found = table.get(key, {})
        if not isinstance(found, dict):
            raise self._error(f"{place}{key} must be a table; got {found!r}")
        return found

    def _tables(self, axis: str) -> dict[str, dict[str, Any]]:
        tables = self._table(self.document, axis, "")
        for name in tables:
            if not isinstance(tables[name], dict):
                raise self._error(f"{axis}.{name} must be a table: write [{axis}.NAME], and the keys below it")
        return tables

    def _excluded(
        self, models: Iterable[str], schemes: Iterable[str], targets: Iterable[str], gpus: Iterable[str]
    ) -> Iterator[Options]:
        entries = self.document.get("exclude", [])
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise self._error("write each combination that is left out as [[exclude]], in double brackets")
        names = dict(zip(_AXES, (models, schemes, targets, gpus), strict=True))
        for each in entries:
            if not each:
                raise self._error(f"[[exclude]] is empty and would leave out every job; {_nearest('', _AXES)}")
            self._check_keys(each, _AXES, "[[exclude]]")
            for axis, value in each.items():
                for name in value if isinstance(value, list) else [value]:
                    if name not in names[axis]:
                        raise self._error(f"[[exclude]] names the {axis} {name!r}; {_nearest(name, names[axis])}")
            yield each

    def _source(self, name: str, table: Mapping[str, Any]) -> tuple[Path | str, str]:
        """The model as the command takes it, and the command."""
        text = table.get("path")
        if not isinstance(text, str) or not text:
            raise self._error(
                f"[model.{name}] has no path: name a .pt2 to be lowered, or a folder, file or Hub name to be exported"
            )
        path = self.path.parent.absolute() / Path(text).expanduser()
        command = "lower" if path.suffix == ".pt2" else "export"
        if path.exists():
            return path, command
        if path.suffix in (".pt2", ".gguf", ".safetensors") or not _HUB_NAME.fullmatch(text):
            raise self._error(f"[model.{name}]: there is no file or folder {path}")
        return text, command

    def _gpus(self, target: str, table: Mapping[str, Any]) -> list[str | None]:
        gpus = table.get("gpu", [None])
        gpus = gpus if isinstance(gpus, list) else [gpus]
        if not gpus or not all(each is None or isinstance(each, str) for each in gpus):
            raise self._error(f'[target.{target}] gpu must be one name or several, as in ["sm_80", "sm_90"]')
        for gpu in filter(None, gpus):
            self._check_gpu(gpu, f"[target.{target}]")
        return gpus

    def _check_gpu(self, name: str, place: str) -> None:
        try:
            gpu_arch(name)
        except ValueError as error:
            raise self._error(f"{place} {error}") from None

    def _check_target(self, target: str) -> None:
        known = complete_targets("")
        for name in target.split(","):
            if ":" not in name and name.strip() not in known:
                raise self._error(f"[target.{target}]: there is no target {name.strip()!r}; {_nearest(name, known)}")

    def _needs(self, target: str, table: Mapping[str, Any]) -> dict[str, Any]:
        needs = self._table(table, "needs", f"[target.{target}] ")
        self._check_keys(needs, _NEEDS, f"[target.{target}] needs")
        found = {name: self._number(value, f"[target.{target}] needs.{name}") for name, value in needs.items()}
        gpus = found.get("gpus", 0)
        if gpus > 1 and gpus != int(gpus):  # as Ray demands
            raise self._error(f"[target.{target}] needs.gpus must be a whole number or less than 1; got {gpus}")
        return found

    def _number(self, value: Any, place: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise self._error(f"{place} must be a number, and not negative; got {value!r}")
        return value

    def _retries(self) -> int:
        retries = self.document.get("retries", 2)
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise self._error(f"retries must be a whole number, and not negative; got {retries!r}")
        return retries

    def _folder(self, key: str) -> Path | None:
        text = self.document.get(key)
        if text is not None and (not isinstance(text, str) or not text):
            raise self._error(f"{key} must be the path of a folder; got {text!r}")
        return None if text is None else self.path.parent.absolute() / Path(text).expanduser()

    def _cache(self) -> str | None:
        text = self.document.get("cache")
        folder = self._folder("cache")
        return None if folder is None else text if _URL.match(str(text)) else str(folder)

    # Options ----------------------------------------------------------------------------------------------------------

    def _options(self, table: Mapping[str, Any], place: str, commands: tuple[str, ...]) -> Options:
        """Options with their values as texts; a path is relative to the file."""
        known = {name: option for each in commands for name, option in self.commands[each].items()}
        found: Options = {}
        for key, value in table.items():
            name = key.replace("_", "-")
            if name in _SET_HERE:
                raise self._error(f"{place} has {key}, which the jobs file sets itself: {_SET_HERE[name]}")
            if name not in known:
                others = [each for each in known if each not in _SET_HERE]
                what = " and ".join(commands)
                raise self._error(f"{place} has {key}, which is no option of {what}; {_nearest(name, others)}")
            found[name] = self._value(value, known[name], f"{place} {key}")
        return found

    def _check_used(self, options: Options, place: str, commands: Iterable[str]) -> None:
        """Refuse an option that no command of this file has, and that would be without effect."""
        for name in options:
            if not any(name in self.commands[command] for command in commands):
                command = next(each for each in self.commands if name in self.commands[each])
                models = ".pt2 files, which are lowered" if command == "export" else "models that are exported"
                raise self._error(
                    f"{place} has {name}, an option of {command}, and the file has only {models}: remove it"
                )

    def _value(self, value: Any, option: _Option, place: str) -> Any:
        kind = get_origin(option.kind) or option.kind
        if kind is list:
            values = value if isinstance(value, list) else [value]
            if all(isinstance(each, str) for each in values):
                return values
            raise self._error(f"{place} must be a text or several; got {value!r}")
        if kind is bool:
            if isinstance(value, bool):
                return value
            raise self._error(f"{place} must be true or false; got {value!r}")
        if kind in (int, float):
            numbers = (int,) if kind is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, numbers):
                raise self._error(f"{place} must be a {'whole ' if kind is int else ''}number; got {value!r}")
            if option.least is not None and value < option.least:
                raise self._error(f"{place} must be at least {option.least}; got {value}")
            return str(value)
        if not isinstance(value, str):
            raise self._error(f"{place} must be a text; got {value!r}")
        if issubclass(kind, Enum) and value not in list(kind):
            raise self._error(f"{place} must be {' or '.join(kind)}; got {value!r}")
        return str(self.path.parent.absolute() / Path(value).expanduser()) if option.is_path else value


def _without(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


def _fits(axes: Mapping[str, str | None], excluded: Options) -> bool:
    """Whether a job has one of the values of every key."""
    return all(axes[axis] in (value if isinstance(value, list) else [value]) for axis, value in excluded.items())


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(str(name), names, 1)
    return f"the nearest is {near[0]}" if near else f"known are {', '.join(sorted(names)) or 'none'}"

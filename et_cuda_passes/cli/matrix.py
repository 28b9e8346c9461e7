"""``matrix``: the jobs of a jobs.toml, printed, run in processes of this machine, or run on a Ray cluster."""

import json
import os
import shlex
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stdout, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperCommand

from et_cuda_passes.cli.console import (
    LoweringError,
    UsageError,
    check_writable,
    exits_on_sigterm,
    handle_errors_without_torch,
    one_line,
    print_json,
)
from et_cuda_passes.cli.documents import JobResult, Matrix
from et_cuda_passes.cli.jobs import Job, read_jobs
from et_cuda_passes.cli.options import Json
from et_cuda_passes.cli.work import CommandKilled, Digests, failure, finished, key_of, recorded, run_job
from et_cuda_passes.unfinished import remove_unfinished, replaced_file

RESULTS = "results.json"
_DIGESTS = "inputs.json"
_CONNECT_SECONDS = 10
_ANY = ""
"""The address of ``--ray`` without one."""

Report = Callable[[Job, str, JobResult | None], None]
"""Called when the state of a job changes."""


class MatrixCommand(TyperCommand):
    """A command whose option ``--ray`` may have an address, or none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As Typer's."""
        args = list(args)
        for index, argument in enumerate(args):
            if argument == "--ray" and (index + 1 == len(args) or args[index + 1].startswith("-")):
                args.insert(index + 1, _ANY)
        return super().parse_args(ctx, args)


def matrix(
    jobs: Annotated[Path, typer.Argument(metavar="JOBS", help="A TOML file: models, schemes, targets and GPUs.")],
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="The jobs of this name, which may have * and ?; may be repeated."),
    ] = None,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print each job as a command for a shell, and run nothing.")
    ] = False,
    count: Annotated[
        int, typer.Option("--jobs", "-j", metavar="N", min=1, help="How many jobs run at a time on this machine.")
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="[ADDRESS]",
            help="Run the jobs on a Ray cluster; without an address, on the one that Ray finds or starts here.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export or lower every combination of models, schemes, targets and GPUs, each into a folder of its own.

    A job that is done is not done again. The results of all jobs are also in results.json in the output folder.
    """
    from et_cuda_passes.cli import lower
    from et_cuda_passes.cli.exporting import export

    with handle_errors_without_torch(), exits_on_sigterm():
        if ray is not None and (count > 1 or print_only):
            raise UsageError(f"--ray and {'--print' if print_only else '--jobs'} exclude each other: give one")
        file = read_jobs(jobs, export, lower)
        chosen = _chosen(file.jobs, only)
        if print_only and not as_json:
            for job in chosen:
                typer.echo(shlex.join(job.shell_command))
            return
        if print_only:
            results = [_not_run(job) for job in chosen]
            print_json(Matrix(str(file.output), results))
            return
        check_writable(file.output)
        if ray is not None:
            _check_ray()
        file.output.mkdir(parents=True, exist_ok=True)
        remove_unfinished(file.output)
        known = {job.name: _not_run(job) for job in chosen}
        try:
            with _Progress(chosen) as progress:

                def report(job: Job, state: str, result: JobResult | None) -> None:
                    if result is not None:
                        known[job.name] = result
                    progress.change(job, state, result)

                left = _unfinished(chosen, file.output / _DIGESTS, report)
                if ray is None:
                    _run_here(left, count, file.output / _DIGESTS, report)
                elif left:
                    # Ray prints on stdout when it tries a job again.
                    with redirect_stdout(sys.stderr):
                        _run_on_ray(left, ray, file.output / _DIGESTS, report)
        finally:
            document = Matrix(str(file.output), list(known.values()))
            others = {job.name: recorded(job) or _not_run(job) for job in file.jobs if job.name not in known}
            found = others | _results_of_others(file.output / RESULTS) | known
            whole = Matrix(str(file.output), [found[job.name] for job in file.jobs])
            with replaced_file(file.output / RESULTS) as stream:
                stream.write((whole.to_json() + "\n").encode())
        if as_json:
            print_json(document)
        else:
            _print_results(document.jobs)
        failed = [each for each in document.jobs if each.status == "failed"]
        if failed:
            logs = ", ".join(each.log for each in failed)
            raise LoweringError(f"{len(failed)} of {len(document.jobs)} jobs failed; the logs are {logs}")


def _chosen(jobs: Iterable[Job], only: list[str] | None) -> list[Job]:
    jobs = list(jobs)
    for pattern in only or ():
        if not any(fnmatchcase(job.name, pattern) for job in jobs):
            raise UsageError(f"--only {pattern}: no job has this name; --print --json lists the names")
    return [job for job in jobs if only is None or any(fnmatchcase(job.name, pattern) for pattern in only)]


def _not_run(job: Job) -> JobResult:
    return JobResult(job.name, list(job.shell_command), str(job.folder), str(job.log), "not run", 0.0)


def _results_of_others(path: Path) -> dict[str, JobResult]:
    """The results that other runs of a jobs file left, of which each can have run some of the jobs."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # no results, or those of another version
        entries = json.loads(path.read_text(encoding="utf-8"))["jobs"]
        return {each["job"]: JobResult(**each) for each in entries if each["status"] != "not run"}
    return {}


def _unfinished(jobs: list[Job], path: Path, report: Report) -> list[Job]:
    """The jobs that are not done; the digests of their files are remembered for the processes that run them."""
    digests = Digests(path)
    left = []
    for job in jobs:
        report(job, "checking", None)
        try:
            result = finished(job, key_of(job, digests))
        except OSError as error:
            result = failure(job, f"{error.filename}: {error.strerror}")
        if result is None:
            left.append(job)
        report(job, "waiting" if result is None else result.status, result)
    digests.save()
    return left


# This machine --------------------------------------------------------------------------------------------------------


def _run_here(jobs: list[Job], count: int, digests: Path, report: Report) -> None:
    stop = threading.Event()

    def work(job: Job) -> JobResult:
        report(job, "running", None)
        try:
            return run_job(job, digests, stop)
        except CommandKilled as error:
            return failure(job, f"{error}: run matrix again")

    with _threads_shared(count), ThreadPoolExecutor(count) as pool:
        try:
            pending = {pool.submit(work, job): job for job in jobs}
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    report(pending.pop(future), result.status, result)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _threads_shared(count: int) -> Iterator[None]:
    """Divide the cores among so many commands, unless OMP_NUM_THREADS is set."""
    name = "OMP_NUM_THREADS"
    if count == 1 or name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, (os.cpu_count() or 1) // count))
    try:
        yield
    finally:
        del os.environ[name]


# Ray -----------------------------------------------------------------------------------------------------------------


def _check_ray() -> None:
    try:
        import ray  # noqa: F401
    except ImportError:
        raise UsageError("--ray needs ray: pip install 'et-cuda-passes[ray]'") from None


def _check_address(address: str) -> None:
    """Check that something listens at HOST:PORT. Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto", "local", or nothing
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"--ray {address}: no connection ({error}); give the address that `ray start --head` prints"
        ) from None


def _run_on_ray(jobs: list[Job], address: str, digests: Path, report: Report) -> None:
    """Give all jobs to Ray, which places each where its resources are, and tries it again after a lost machine."""
    import ray

    _check_address(address)
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"--ray {address or 'without an address'}: {one_line(error)}") from None
    try:
        _warn_of_missing(jobs, ray.cluster_resources())
        remote = ray.remote(run_job)
        pending = {}
        for job in jobs:
            needs = job.needs
            options: dict[str, Any] = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "memory": needs.memory}
            options |= {"accelerator_type": needs.accelerator} if needs.accelerator else {}
            retries = {"max_retries": job.retries, "retry_exceptions": [CommandKilled]}
            pending[remote.options(name=job.name, **options, **retries).remote(job, digests)] = job
            report(job, "given to Ray", None)
        try:
            while pending:
                (done,), _ = ray.wait(list(pending), num_returns=1)
                result = _result_of(done, pending[done])
                report(pending.pop(done), result.status, result)
        except BaseException:
            for each in pending:
                ray.cancel(each)
            # A command that was interrupted removes its temporary files before its task ends.
            ray.wait(list(pending), num_returns=len(pending), timeout=30)
            raise
    finally:
        ray.shutdown()


def _result_of(done: Any, job: Job) -> JobResult:
    import ray

    try:
        result: JobResult = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        return failure(job, f"{one_line(error.cause or error)}; Ray tried {job.retries + 1} times")
    except ray.exceptions.RayError as error:
        return failure(job, f"Ray: {one_line(error)}")
    return result


def _warn_of_missing(jobs: list[Job], resources: dict[str, float]) -> None:
    """Name the resources that no machine of the cluster has now. Ray waits for one that joins."""
    for job in jobs:
        wanted = {"CPU": job.needs.cpus, "GPU": job.needs.gpus, "memory": float(job.needs.memory or 0)}
        if job.needs.accelerator:
            wanted[f"accelerator_type:{job.needs.accelerator}"] = 0.001
        lacking = [f"{name}: {count:g}" for name, count in wanted.items() if count > resources.get(name, 0)]
        if lacking:
            typer.echo(f"warning: {job.name} waits for a machine with {', '.join(lacking)}", err=True)


# Results -------------------------------------------------------------------------------------------------------------


class _Progress:
    """The jobs on stderr: in a terminal a table that changes, elsewhere a line when a job ends."""

    def __init__(self, jobs: list[Job]) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._states = {job.name: "" for job in jobs}
        self._results: dict[str, JobResult] = {}
        self._lock = threading.Lock()
        self._live = Live(console=self._console, transient=True, get_renderable=self._table, refresh_per_second=4)

    def __enter__(self) -> "_Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def change(self, job: Job, state: str, result: JobResult | None) -> None:
        """Show the new state of a job."""
        with self._lock:
            self._states[job.name] = state
            if result is not None:
                self._results[job.name] = result
                done = f"{len(self._results)} of {len(self._states)}"
                self._console.print(f"{done}  {job.name}: {_sentence(result)}", markup=False)

    def _table(self) -> Table:
        with self._lock:
            table = Table("job", "state", box=None, pad_edge=False)
            for name, state in self._states.items():
                if name not in self._results:
                    table.add_row(Text(name), Text(state))
            return table


def _sentence(result: JobResult) -> str:
    if result.error:
        return f"failed: {result.error} (log: {result.log})"
    return result.status if result.status != "written" else f"written in {result.seconds:.1f} s"


def _print_results(results: list[JobResult]) -> None:
    names = ("seconds", "bytes", "rewritten", "kept", "missed")
    table = Table("job", "status", *(Column(name, justify="right") for name in names), "error and log", box=None)
    table.pad_edge = False
    for each in results:
        counts = (
            "" if count is None else f"{count:,}" for count in (each.bytes, each.rewritten, each.kept, each.missed)
        )
        error = f"{each.error} ({each.log})" if each.error else ""
        table.add_row(Text(each.job), each.status, f"{each.seconds:.1f}", *counts, Text(error, overflow="fold"))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(
            highlight=False, width=max(200, *(len(each.error or "") + len(each.log) + 120 for each in results))
        )
    console.print(table)

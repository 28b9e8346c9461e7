"""Shared by all tests: golden files, the skip without a GPU, and reproducible random numbers."""

import gc
import importlib
import os
import random
import secrets
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

GOLDEN = Path(__file__).parent / "golden"

# A deadline would depend on the load of the machine. In CI the same commit runs the same examples.
settings.register_profile("house", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("house")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers fill the cores; more threads would compete with them.
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        # ExecuTorch's CUDA backend removes files of Inductor's cache that another worker may be about to link.
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "inductor"))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}-{os.environ['PYTEST_XDIST_WORKER']}"


# The seed is in the environment, so that workers and processes that tests start draw the same numbers.
SEED = "TEST_SEED"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="of all random numbers; by default 0 in CI, elsewhere another each time")
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden from what the code does now, instead of comparing",
    )


def pytest_configure(config: pytest.Config) -> None:
    # The rules of packages that happen to be installed would change what the tests expect.
    os.environ["ETCP_PLUGINS"] = "0"
    given = config.getoption("--seed")
    if given is not None:
        os.environ[SEED] = str(given)
    else:
        os.environ.setdefault(SEED, "0" if os.environ.get("CI") else str(secrets.randbelow(2**16)))


def pytest_report_header() -> str:
    return f"random numbers: --seed={os.environ[SEED]} draws them again"


def seed(name: str) -> None:
    """Seed the generators from the run's seed and ``name`` alone, so that earlier tests have no influence."""
    value = zlib.crc32(f"{os.environ[SEED]} {name}".encode())
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def pytest_collectstart(collector: pytest.Collector) -> None:
    # A module may draw numbers while it is imported.
    seed(collector.nodeid)


def pytest_collection_finish() -> None:
    # Torch and the tests are millions of objects, which each full collection would visit: a fifth of the suite's time.
    gc.collect()
    gc.freeze()
    # The C++ that calls AOTInductor's kernels takes most of the time of a compilation for the CPU, and computes no
    # number: it is not optimized. The kernels are, as always. Precompiled headers take as long as two programs, and g++
    # compiles no program faster with them.
    inductor = importlib.import_module("torch._inductor.config")
    inductor.aot_inductor.compile_wrapper_opt_level = "O0"
    inductor.aot_inductor.precompile_headers = False


def pytest_unconfigure() -> None:
    # Otherwise nanobind reports the frozen objects as leaks.
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def seeded_module(request: pytest.FixtureRequest) -> None:
    seed(request.node.nodeid)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    seed(request.node.nodeid)


# This runs first, so that `-m golden` sees the marker.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: text must equal tests/golden/<name>.txt; `make golden` writes that file instead."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"tests/golden/{name}.txt does not exist: `make golden` writes it")
        assert text == path.read_text(encoding="utf-8"), (
            f"differs from tests/golden/{name}.txt: if the new text is right, `make golden` and commit it"
        )

    return compare

"""The library that the tests of this folder share; compiling it takes 15 seconds."""

import pytest

from tests.delegate.delegated import Part, counting


@pytest.fixture(scope="session")
def part() -> Part:
    return counting()

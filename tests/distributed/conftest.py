import pytest

from .workers import Workers


@pytest.fixture(scope="session")
def two():
    workers = Workers(2)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def four():
    workers = Workers(4)
    yield workers
    workers.close()

"""One thread per test process, of which there are as many as cores; one seed for every test."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same random numbers, in whatever order and process it runs.

    Not from 0, the seed of the checks' own generators: a point equal to the vectors drawn at it is
    no generic point.
    """
    torch.manual_seed(1729)

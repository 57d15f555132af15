"""What all unit tests share."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_garbage_of_other_modules():
    """Tests count descriptors: what others left to the collector must be gone."""
    gc.collect()

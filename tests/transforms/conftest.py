"""What tests of rotations share: a folder of random models per test file, and no gradients where nothing is learned."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("originals")


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield

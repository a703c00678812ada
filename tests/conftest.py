"""What holds for every test: no network unless it is marked so, no display, one thread per process of many."""

import functools
import os
import socket
from urllib.parse import urlparse

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests marked network are run with HF_HUB_OFFLINE=0
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores already
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("network") and not _hub_answers():
        pytest.skip("the Hugging Face hub cannot be reached")


@functools.cache
def _hub_answers() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        socket.create_connection((urlparse(constants.ENDPOINT).hostname, 443), timeout=5).close()
    except OSError:
        return False
    return True

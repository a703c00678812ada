"""What holds for every test: no network, no display, and a working directory that is nobody's."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests marked network are run with HF_HUB_OFFLINE=0
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores already
    os.environ.setdefault("OMP_NUM_THREADS", "1")

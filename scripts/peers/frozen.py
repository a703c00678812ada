"""What the drivers of this folder share: one command line, the frozen tokens, and the checkpoint that each leaves.

A driver runs in the virtual environment of its tool, so nothing here may need more than torch and transformers.
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

TOKENIZER_FILES = ("chat_template.jinja", "merges.txt", "vocab.json")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every driver takes; a driver may add its own."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", type=Path, required=True, help="a folder with a Hugging Face checkpoint")
    made.add_argument("--tokens", type=Path, required=True, help="safetensors with `windows` (windows, tokens) int64")
    made.add_argument("--bits", type=int, required=True)
    made.add_argument("--group-size", type=int, required=True)
    made.add_argument("--output", type=Path, required=True, help="the checkpoint: weights as they dequantise")
    return made


def windows(tokens: Path) -> Tensor:
    """(windows, tokens) int64, as `jointq calibrate` wrote them."""
    with safe_open(tokens, "pt") as file:
        return file.get_tensor("windows")


def load(model: Path) -> PreTrainedModel:
    """The model on the CPU in the checkpoint's own dtype."""
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto")


@torch.no_grad()
def save(source: Path, parameters: Mapping[str, Tensor], output: Path) -> None:
    """The checkpoint `source` in its own dtype, with those of these parameters that it has too."""
    model = load(source)
    for name, parameter in model.named_parameters():
        if name in parameters:
            parameter.copy_(parameters[name])
    model.save_pretrained(output)
    for file in source.iterdir():
        if "token" in file.name or file.name in TOKENIZER_FILES:
            shutil.copyfile(file, output / file.name)

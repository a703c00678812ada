#!/usr/bin/env python
"""Write a random Llama checkpoint of any size, block by block, so that big shapes can be tried without a download.

    python scripts/make_random_model.py models/random-llama1b                  # exactly Llama-3.2-1B's shape, 2.5 GB
    python scripts/make_random_model.py models/random-8 --layers 8 --hidden 1024 --intermediate 4096

The weights are Gaussian noise in bf16 and the tokenizer is the bundled model's, so perplexity means nothing; memory,
disk and time are those of the real thing.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM

from jointq_cli.models.checkpoint import write_index
from jointq_cli.models.sources import BUNDLED
from jointq_cli.system.tensor_files import save_tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    # The defaults are meta-llama/Llama-3.2-1B's config.json.
    shape = {"layers": 16, "hidden": 2048, "intermediate": 8192, "heads": 32, "kv-heads": 8, "vocabulary": 128256}
    for name, value in shape.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        vocab_size=arguments.vocabulary,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    write(config, arguments.output)


def write(config: LlamaConfig, output: Path) -> None:
    """Writes the checkpoint with one shard for each block, so that only one is ever in memory."""
    output.mkdir(parents=True, exist_ok=True)
    with init_empty_weights():
        names = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters() if name != "lm_head.weight"}
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, shape in names.items():
        block = name.split(".")[2] if name.startswith("model.layers.") else "outer"
        parts.setdefault(block, {})[name] = shape
    shards = []
    for number, part in enumerate(parts.values(), 1):
        shards.append(output / f"model-{number:05d}-of-{len(parts):05d}.safetensors")
        save_tensors(shards[-1], {name: noise(name, shape, generator) for name, shape in part.items()})
    write_index(output, shards)
    (output / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copyfile(file, output / file.name)
    size = sum(shard.stat().st_size for shard in shards)
    print(f"{output}: {sum(map(torch.Size.numel, names.values())) / 1e6:,.1f} M parameters, {size / 1e9:.2f} GB")


def noise(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:  # gains of the norms
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[1] ** -0.5, generator=generator)


if __name__ == "__main__":
    main()

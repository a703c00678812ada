"""`jointq COMMAND --help` for the commands that compose a config, from the config tree and without Hydra."""

from jointq_cli.cli import config_files

GROUPS = {
    "quantize": [
        "recipe",
        "quality",
        "model",
        "calibration",
        "rotation",
        "smoothing",
        "quantizer",
        "qep",
        "curvature",
        "allocation",
        "refinement",
        "activations",
        "evaluation",
        "tracking",
        "sweep",
    ],
    "plan": [
        "recipe",
        "quality",
        "model",
        "calibration",
        "rotation",
        "smoothing",
        "quantizer",
        "qep",
        "curvature",
        "allocation",
        "refinement",
        "activations",
        "evaluation",
    ],
    "rotate": ["recipe", "model", "calibration", "rotation", "smoothing"],
    "evaluate": ["model", "evaluation"],
    "calibrate": ["recipe", "model", "calibration"],
}

OPENINGS = {
    "quantize": """\
Quantise a model, write a checkpoint that transformers loads, and measure what it cost.

usage: jointq quantize [recipe=NAME] [GROUP=OPTION ...] [KEY=VALUE ...]

  jointq quantize                                          the bundled model at 4 bits, offline
  jointq quantize recipe=llama1b_w4g128                    a recipe by name (jointq recipes lists them)
  jointq quantize model.path=DIR quantizer.bits=3          any checkpoint directory, hub id or FILE.gguf
  jointq quantize quantizer=rtn                            another option of a group
  jointq quantize layers.overrides={down_proj:{bits:8}}    settings of some layers (docs/layers.md)
  jointq quantize -m quantizer.bits=4,3,2                  a sweep: one run per value
  jointq quantize -m +sweep=lambda                         a sweep that comes with jointq (docs/sweeps.md)""",
    "plan": """\
Show what quantize would do with the same arguments: its stages, which of them the store has, time, memory, disk.

Reads configs and headers only, and writes nothing.

usage: jointq plan [recipe=NAME] [GROUP=OPTION ...] [KEY=VALUE ...]

  jointq plan                                              the bundled model
  jointq plan recipe=pocket_w4a4 quantizer.bits=3          any arguments of quantize
  jointq plan model.path=DIR calibration=c4                a model before its weights are read""",
    "rotate": """\
Smooth and rotate a model: its activations and weights become easier to quantise, its function stays.

usage: jointq rotate [recipe=NAME] [GROUP=OPTION ...] [KEY=VALUE ...]

  jointq rotate                                            the bundled model, R1 and R2 learned, offline
  jointq rotate recipe=llama1b_w4g128 rotation=hadamard    another model, random Hadamard matrices
  jointq rotate smoothing=smoothquant rotation=none        scales of channels only""",
    "evaluate": """\
Measure the perplexity of a checkpoint by the protocol that quantize uses.

usage: jointq evaluate model.path=DIR [reference=DIR] [engine=NAME] [GROUP=OPTION ...] [KEY=VALUE ...]

  jointq evaluate model.path=runs/NAME/DATE/checkpoint reference=pocket
  jointq evaluate model.path=DIR evaluation=wikitext2
  jointq evaluate model.path=DIR evaluation=text evaluation.path=FILE.txt
  jointq evaluate model.path=RUN/export/FORMAT reference=RUN/checkpoint engine=llama.cpp

engine=transformers | llama.cpp | mlx | vllm: measured as this engine computes it; docs/serving.md""",
    "calibrate": """\
Freeze the calibration tokens of a recipe in a file, for a machine without network.

usage: jointq calibrate [recipe=NAME] [output=FILE.safetensors] [GROUP=OPTION ...] [KEY=VALUE ...]

  jointq calibrate recipe=llama1b_w4g128 output=tokens.safetensors
  jointq quantize recipe=llama1b_w4g128 calibration.tokens=tokens.safetensors""",
}

OPTIONS = """\
Options
  --cfg job             print the composed config and stop: every key with its value
  -m, --multirun        run a sweep over comma-separated values
  --config-dir DIR      a folder of your own configs, such as DIR/recipe/mine.yaml
  --info defaults       how the config was composed
  --hydra-help          all options of Hydra"""


def main(arguments: list[str]) -> int:
    print(text(arguments[0]))
    return 0


def text(command: str) -> str:
    """Usage, examples, every group with its options, keys outside of groups, options."""
    parts = [OPENINGS[command], "Groups"]
    for group in GROUPS[command]:
        names = config_files.options(group)
        if len(names) > 1:
            summaries = {name: config_files.summary(path) for name, path in names.items()}
            parts.append(_listed(f"  {'+' if group == 'sweep' else ''}{group}=", summaries, indent=4))
    keys = config_files.keys("quantize" if command == "plan" else command)
    parts.append(_listed("Keys outside of groups", keys, indent=2))
    return "\n\n".join([*parts, OPTIONS])


def _listed(title: str, summaries: dict[str, str], indent: int) -> str:
    width = max(map(len, summaries))
    return "\n".join([title, *(f"{' ' * indent}{name:<{width}}  {text}" for name, text in summaries.items())])

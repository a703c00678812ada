"""Quantise a tiny random model of every family that AutoModelForCausalLM builds, and compare with plain transformers.

    python scripts/check_families.py --work DIR                    # those of which DIR has no result yet
    python scripts/check_families.py --work DIR mixtral qwen3_moe  # these, whether DIR has results of them or not
    python scripts/check_families.py --work DIR --table docs/families.md  # and write the table of all results

A family is right where the checkpoint that jointq writes has, loaded by plain transformers, the perplexity that jointq
reports, and differs from the source in the weights that it lists as quantised alone. Where the family can be rotated,
the rotated checkpoint must have the perplexity of the source too. Each family has a process of its own.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import shutil
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from jointq_cli import pipeline  # noqa: F401  imported before the processes of the families are forked
from jointq_cli.cli.commands import quantize as _quantize  # noqa: F401
from jointq_cli.cli.main import main as jointq
from jointq_cli.data.pydoc import topics
from jointq_cli.errors import JointqError
from jointq_cli.formats.export import exporter_of
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.sources import BUNDLED
from jointq_cli.report import load_report
from jointq_cli.stages.export import write_export
from jointq_cli.stages.finished_run import open_finished

WINDOW, WINDOWS = 64, 4  # tokens, of the evaluation
CLOSE = 1e-4  # relative difference of two perplexities in float32 that rounding may cause
ROTATED_CLOSE = 0.02  # the same of a rotated model, whose weights are rounded to bfloat16
MOST_PARAMETERS = 20_000_000  # of a tiny model
EXPORTS = ("compressed-tensors", "gptq", "gguf:q4_1", "mlx")
SETTINGS = {
    "quantizer": "rtn",
    "quantizer.group_size": "32",
    "qep": "none",
    "calibration.num_samples": "8",
    "calibration.seqlen": str(WINDOW),
    "evaluation": "text",
    "evaluation.seqlen": str(WINDOW),
    "evaluation.max_windows": str(WINDOWS),
    "generate_tokens": "0",
    "runtime.dtype": "float32",
    "runtime.num_threads": "1",
}

# What makes a config small, by the names that families have for it. Only those are given that a config has already.
HIDDEN, MLP, HEADS, HEAD_DIM, LAYERS = 64, 128, 4, 16, 4
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), MLP),
    **dict.fromkeys(("dim_ff", "dff", "d_inner", "feed_forward_size", "intermediate_size_mlp"), MLP),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size"), MLP),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "index_n_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "attention_head_size", "kv_channels"), HEAD_DIM),
    **dict.fromkeys(("swa_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), HEAD_DIM),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), HEAD_DIM),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 64),
    "moe_shared_expert_intermediate_size": 64,
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_headdim",), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), HEADS),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention", "window_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 256),
    "vocab_size": 2048,
    "hidden_size_global": HIDDEN,
    "rotary_dim": 8,
    "index_topk": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "is_decoder": True,
}

SLIDING_MLA = {
    **{f"swa_{name}": 16 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    **{f"swa_{name}": 32 for name in ("head_dim", "q_lora_rank", "kv_lora_rank")},
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "shared_experts_intermediate_size": 64,
}
PER_LAYER_INPUTS = {"vocab_size_per_layer_input": 2048, "hidden_size_per_layer_input": 16}
INDEXER = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}

# What a family needs besides. FAMILY+WORD is another model of a family, with which other things can be done.
TWEAKS: dict[str, dict[str, Any]] = {
    "axk2": {"gated_norm_rank": 32},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": SLIDING_MLA,
        "vision_config": {"per_layer_config": {}, "adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "dots3_note_text": SLIDING_MLA,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        **PER_LAYER_INPUTS,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
    },
    "gemma4": {"text_config": {**PER_LAYER_INPUTS, "global_head_dim": 32}},
    "gemma4_unified": {
        "text_config": {"global_head_dim": 32},
        "vision_config": {"mm_embed_dim": HIDDEN, "mm_posemb_size": 64},
    },
    "got_ocr2": {"vision_config": {"output_channels": 32, "mlp_dim": MLP}},
    "gemma4_text": {**PER_LAYER_INPUTS, "global_head_dim": 32},
    "gemma4_text+experts": {
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "kimi_linear": {"linear_head_dim": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": HEAD_DIM},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass
class Result:
    """What became of one family. outcome: right | refused | wrong | not built (by this script or by transformers)."""

    family: str
    outcome: str = ""
    model: str = ""  # the class
    reason: str = ""
    share: float = 0.0  # of the weights of the blocks that is quantised
    left_out: dict[str, float] = field(default_factory=dict)
    perplexity: float = 0.0  # of the quantised model, as jointq reports it
    difference: float = 0.0  # from that of plain transformers, relative
    rotated: str = ""  # which rotations were made
    exports: list[str] = field(default_factory=list)
    not_exported: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def line(self) -> str:
        words = [f"{self.family:24} {self.outcome:9}"]
        if self.outcome in ("right", "wrong"):
            words.append(f"{self.share:4.0%} perplexity {self.perplexity:8.2f} off by {self.difference:.0e}")
            words.append(f"rotated: {self.rotated or 'no'}, exports: {' '.join(self.exports) or 'none'}")
        if self.left_out:
            words.append("without " + ", ".join(f"{name} {share:.1%}" for name, share in self.left_out.items()))
        return "  ".join([*words, self.reason, f"{self.seconds:.0f} s"])


def tiny_config(family: str) -> Any:
    return small(CONFIG_MAPPING[family.partition("+")[0]], TWEAKS.get(family, {}))


def small(kind: Any, tweaks: dict[str, Any]) -> Any:
    """A config of this class with small sizes, those of the configs inside it too. tweaks: further arguments; a dict is
    for the config inside of that name."""
    default = kind()
    names = {kind.attribute_map.get(name, name): value for name, value in SIZES.items()}
    arguments = {name: value for name, value in names.items() if name in vars(default)}
    if "kv_lora_rank" in vars(default):  # keys and values of all heads from one vector
        arguments["num_key_value_heads"] = HEADS
    parts = {name: part for name, part in vars(default).items() if isinstance(part, PreTrainedConfig)}
    arguments |= {name: value for name, value in tweaks.items() if name not in parts}
    arguments |= {name: small(type(part), tweaks.get(name, {})) for name, part in parts.items()}
    return kind(**arguments)


def write_model(family: str, directory: Path) -> str:
    """A random model with the bundled tokenizer; returns its class. Matrices are drawn so that every block matters."""
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(tiny_config(family)).num_parameters()
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} M parameters; TWEAKS has to name what makes its config small")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            parameter.data = torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
        elif "norm" in name or name.endswith("bias"):  # gains of one and biases of zero would be no test
            parameter.data += 0.1 * torch.randn_like(parameter)
    for part in model.modules():
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            part.weight.data[part.padding_idx] = (
                0  # transformers sets those of some families to zero when it loads them
            )
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(directory)
    return type(model).__name__


@torch.no_grad()
def perplexity(directory: Path, text: Path) -> float:
    """By plain transformers, over the first WINDOWS windows of the text; the first token of each is not scored.

    Raises ValueError where the checkpoint lacks a tensor or has one too many."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(loading[problem]):
            raise ValueError(f"{problem} {found[0]}")
    ids = torch.tensor(AutoTokenizer.from_pretrained(directory)(text.read_text()).input_ids)
    rows = ids[: WINDOWS * WINDOW].reshape(WINDOWS, WINDOW)
    logits = model.eval()(input_ids=rows, use_cache=False).logits.float()
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    return math.exp(losses)


def check(result: Result, place: Path, text: Path) -> None:
    """Fills in the result of one family; leaves its files in `place`."""
    result.outcome = "not built"
    result.model = write_model(result.family, place / "model")
    before = perplexity(place / "model", text)
    result.outcome, result.reason = "wrong", "jointq stopped without a message"
    run = place / "run"
    code = command("quantize", f"model.path={place / 'model'}", text=text, run=run)
    if not (run / "report.json").is_file():
        error = [line for line in (place / "quantize.log").read_text().splitlines() if line.startswith("error: ")]
        is_refused = code == 1 and error and not list(run.rglob("*.safetensors"))
        result.outcome = "refused" if is_refused else "wrong"
        result.reason = " ".join(error)[7:].replace(f"{place / 'model'}: ", "") or result.reason
        return
    report = load_report(run / "report.json")
    assert report.coverage is not None
    result.share, result.left_out = report.coverage.share, report.coverage.left_out
    result.perplexity = report.quantized.value
    after = perplexity(run / "checkpoint", text)
    result.difference = abs(after / result.perplexity - 1)
    changed = changed_weights(place / "model", run / "checkpoint")
    listed = sum(layer.out_features * layer.in_features for layer in report.layers)
    problems = {
        f"exit code {code}": code != 0,
        f"plain transformers: {after:.4f}": result.difference > CLOSE,
        f"plain transformers on the original: {before:.4f}, jointq: {report.original.value:.4f}": (
            abs(before / report.original.value - 1) > CLOSE
        ),
        f"{changed} weights changed, {listed} listed": changed != listed,
    }
    result.reason = "; ".join(problem for problem, is_real in problems.items() if is_real)
    result.outcome = "wrong" if result.reason else "right"
    export(result, run, place)
    rotate(result, place, text, before)


def command(word: str, *settings: str, text: Path, run: Path) -> int:
    """Runs a command of jointq in this process, its output in WORD.log beside the run directory."""
    places = [f"evaluation.path={text}", f"hydra.run.dir={run}", f"store={run.parent / 'store'}"]
    with (
        (run.parent / f"{word}.log").open("w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        return jointq([word, *settings, *(f"{k}={v}" for k, v in SETTINGS.items()), *places])


def changed_weights(source: Path, result: Path) -> int:
    """How many elements the tensors have that are not the same to the bit in both checkpoints."""
    ours, theirs = Checkpoint(source), Checkpoint(result)
    return sum(math.prod(ours.shapes[name]) for name in ours.shapes if not ours.same_bytes(theirs, name))


def export(result: Result, run: Path, place: Path) -> None:
    """Writes the run's model in each format, and reads it back."""
    try:
        finished = open_finished(run, torch.device("cpu"))
    except JointqError as error:
        result.not_exported = dict.fromkeys(EXPORTS, str(error))
        return
    for word in EXPORTS:
        directory = place / word.replace(":", "-")
        directory.mkdir()
        try:
            finished.check([exporter_of(word)])
            write_export(finished.model, exporter_of(word), directory)
            result.exports.append(word)
        except JointqError as error:
            result.not_exported[word] = str(error)


def rotate(result: Result, place: Path, text: Path, before: float) -> None:
    """Rotates the source with what its family admits: R1 and R2, or R2 alone."""
    for name, more in {"R1+R2": [], "R2": ["rotation.r1=false"]}.items():
        run = place / name
        if command("rotate", "rotation=hadamard", f"model.path={place / 'model'}", *more, text=text, run=run):
            continue
        after = perplexity(run / "checkpoint", text)
        if abs(after / before - 1) > ROTATED_CLOSE:
            result.outcome = "wrong"
            result.reason += f" {name}: perplexity {after:.2f}, before {before:.2f}"
        result.rotated = name
        return


def check_one(family: str, work: Path) -> None:
    """In a process of its own: tries one family and writes its result."""
    result, start = Result(family), time.monotonic()
    place = work / "files" / family
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with (place / "error.log").open("w") as log, contextlib.redirect_stderr(log):
        try:
            check(result, place, work / "text.txt")
        except Exception as error:  # of transformers, and the bugs that this script is to find
            traceback.print_exc()
            result.outcome = "wrong" if result.outcome == "right" else result.outcome
            result.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    result.seconds = time.monotonic() - start
    (work / f"{family}.json").write_text(json.dumps(asdict(result), indent=1))


def check_all(families: list[str], work: Path, limit: float, *, keep: bool) -> None:
    """Tries each family in a process of its own for `limit` seconds at most, and prints its line."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "text.txt").write_text("\n".join(topics("evaluation"))[:8000])
    for family in families:
        process = multiprocessing.get_context("fork").Process(target=check_one, args=(family, work))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
        file = work / f"{family}.json"
        if process.exitcode:
            failed = Result(family, "wrong", reason=f"the process ended with {process.exitcode}", seconds=limit)
            file.write_text(json.dumps(asdict(failed), indent=1))
        print(Result(**json.loads(file.read_text())).line(), flush=True)
        if not keep:
            shutil.rmtree(work / "files" / family, ignore_errors=True)


def counts(results: list[Result]) -> str:
    """How many families are right, refused, wrong and not built, and the share of the first in those that are built."""
    found = Counter(result.outcome for result in results)
    built = len(results) - found["not built"]
    words = (f"{found[outcome]} {outcome}" for outcome in ("right", "refused", "wrong", "not built"))
    return f"{len(results)} families: {', '.join(words)}; {found['right'] / max(built, 1):.1%} of those built are right"


def table(results: list[Result]) -> str:
    rows = [f"| {' | '.join(cells(result))} |" for result in results]
    return f"""\
# Families of models

What jointq does with a tiny random model of each family that `AutoModelForCausalLM` of transformers
{transformers.__version__} builds, written by

    python scripts/check_families.py --work DIR --table docs/families.md

{counts(results)}.

Right: the checkpoint has, loaded by plain transformers, the perplexity that jointq reports, and differs from the source
in the tensors that are listed as quantised alone. Quantised: the share of the weights of the decoder blocks. Rotated:
the rotations that leave the perplexity as it is. Exported: the layouts that were written and read back, at 4 bits with
zero-points in groups of 32; whether a runtime knows the family is not tried here. Without zero-points,
compressed-tensors holds experts too.

| family | | quantised | without | rotated | exported |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def cells(result: Result) -> list[str]:
    if result.outcome != "right":
        return [result.family, result.outcome, "", result.reason.replace("|", "\\|"), "", ""]
    without = ", ".join(f"{name} {share:.1%}" for name, share in result.left_out.items())
    return [result.family, "right", f"{result.share:.1%}", without, result.rotated, ", ".join(result.exports)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; default: all without a result")
    parser.add_argument("--work", type=Path, required=True, help="directory of the results, a file for each family")
    parser.add_argument("--table", type=Path, help="write the results as Markdown")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one family")
    parser.add_argument("--keep", action="store_true", help="keep models, runs and logs, in DIR/files")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # no threads, which a forked process would lack
    everything = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *TWEAKS})
    if unknown := [name for name in given.families if name not in everything]:
        parser.error(f"{unknown[0]}: no such family; there are {', '.join(everything)}")
    todo = given.families or [name for name in everything if not (given.work / f"{name}.json").is_file()]
    check_all(todo, given.work, given.limit, keep=given.keep)
    files = [given.work / f"{name}.json" for name in everything]
    results = [Result(**json.loads(file.read_text())) for file in files if file.is_file()]
    print(counts(results))
    if given.table:
        given.table.write_text(table(results))


if __name__ == "__main__":
    main()

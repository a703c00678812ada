"""Train "pocket", the model bundled with the package, on the text in a Python installation.

    python scripts/train_pocket.py --prepare .pocket              # text -> tokenizer and tokens
    python scripts/train_pocket.py --train .pocket --stop 1500    # all text, at a high learning rate
    python scripts/train_pocket.py --train .pocket --mix even --start .pocket/running \\
        --steps 900 --lr 3e-3 --warmup 50 --short 0.4 --seed 10   # little repetition, learning rate to zero
    python scripts/train_pocket.py --score .pocket                # held-out perplexity of the saved model

A mixture of experts on the same text begins as the bundled model, each MLP made into experts of half its size:

    python scripts/train_pocket.py --prepare .pocket --tokenizer src/jointq_cli/pocket
    python scripts/train_pocket.py --train .pocket --start src/jointq_cli/pocket --experts 8 --out pocket-moe \\
        --mix even --steps 600 --lr 2e-3 --warmup 30 --short 0.6 --seed 20 --threads 1
    python scripts/train_pocket.py --score .pocket --out pocket-moe

The steps are separate because they may run on different machines: preparing needs the packages whose
docstrings are read, training needs only torch, transformers and the prepared folder.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

VOCABULARY = 2048
CONTEXT = 1024  # what the model can take
WINDOW = 512  # what it is trained and scored on
SEPARATOR = "<|endoftext|>"

# How often a pass reads each source. The language reference is what the model is for, and there is very
# little of it; the standard library is written in nearly the same style. The second stage repeats little:
# with the topics read 15 times there, they were learnt by heart (perplexity 1.2) and held-out text gained
# nothing.
MIXES: dict[str, dict[str, float]] = {
    "broad": {"topics": 12, "stdlib": 4, "libraries": 1},
    "even": {"topics": 2, "stdlib": 1, "libraries": 0.5},
}


def prepare(folder: Path, tokenizer: Path | None) -> None:
    """Write the tokenizer, one array of token ids per source, the dev share and the held-out text.

    tokenizer: the folder of one to use; None trains one on the text.
    """
    from jointq_cli.data import pydoc as pydoc_text

    reference = len(pydoc_text.topics("train"))
    library = len(pydoc_text.docstrings(()))
    documents = pydoc_text.training_documents()
    # Documents that lost every paragraph to the leak guard shift the borders by a few; it only moves a
    # handful of files from one repeat count to another.
    sources = {
        "topics": documents[:reference],
        "stdlib": documents[reference : reference + library],
        "libraries": documents[reference + library :],
    }
    fast = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else new_tokenizer(sources)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)

    def encode(texts: list[str]) -> np.ndarray:
        rows = [[*row.ids, 0] for row in fast.backend_tokenizer.encode_batch(texts)]  # 0 is the separator
        return np.concatenate([np.asarray(row, dtype=np.uint16) for row in rows])

    # The dev share steers choices; the evaluation topics are only ever reported.
    shares = {name: [text for i, text in enumerate(texts) if i % 40] for name, texts in sources.items()}
    shares["dev"] = [text for texts in sources.values() for i, text in enumerate(texts) if i % 40 == 0]
    shares["evaluation"] = pydoc_text.topics("evaluation")
    counts = {}
    for name, texts in shares.items():
        tokens = encode(texts)
        np.save(folder / f"{name}.npy", tokens)
        counts[name] = {
            "documents": len(texts),
            "characters": sum(map(len, texts)),
            "bytes": sum(len(text.encode()) for text in texts),
            "tokens": len(tokens),
        }
        print(name, counts[name], flush=True)
    (folder / "counts.json").write_text(json.dumps(counts, indent=2))


def new_tokenizer(sources: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the texts of each source."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    weights = {"topics": 8, "stdlib": 3, "libraries": 1}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (text for name, texts in sources.items() for text in texts for _ in range(weights[name])),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        clean_up_tokenization_spaces=False,  # or decode(encode(text)) would eat spaces before punctuation
        model_max_length=CONTEXT,
    )


def new_model(dropout: float) -> LlamaForCausalLM:
    """3.7 M parameters; every Linear reads a multiple of 128 inputs, as groups of 128 need."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=CONTEXT,
            attention_dropout=dropout,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )


@torch.no_grad()
def mixture_of(dense: LlamaForCausalLM, experts: int) -> MixtralForCausalLM:
    """The model with `experts` experts, two of them active, in place of each MLP: as many active parameters.

    Each expert is a random half of the MLP's neurons with doubled outputs, and the halves of a pair are all of them, so
    that the mean over all experts is the MLP (sparse upcycling: Komatsuzaki et al., 2023, arXiv:2212.05055).
    """
    config = dense.config.to_dict() | {
        "intermediate_size": dense.config.intermediate_size // 2,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    del config["architectures"], config["model_type"]
    mixture = MixtralForCausalLM(MixtralConfig(**config))
    mixture.load_state_dict(dense.state_dict(), strict=False)
    for block, source in zip(mixture.model.layers, dense.model.layers, strict=True):
        for expert in range(experts):
            if expert % 2 == 0:
                halves = torch.randperm(dense.config.intermediate_size).chunk(2)
            neurons = halves[expert % 2]
            gate_up = torch.cat([source.mlp.gate_proj.weight[neurons], source.mlp.up_proj.weight[neurons]])
            block.mlp.experts.gate_up_proj[expert] = gate_up
            block.mlp.experts.down_proj[expert] = 2 * source.mlp.down_proj.weight[:, neurons]
    return mixture


def batches(folder: Path, mix: str, size: int, window: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of windows. Each pass joins the documents in a new order and cuts them anew."""
    sources = []
    for name, repeats in MIXES[mix].items():
        tokens = np.load(folder / f"{name}.npy")
        sources.append((np.split(tokens, np.flatnonzero(tokens == 0)[:-1] + 1), repeats))
    length = window + 1  # each position predicts the next one
    turn = 0
    while True:
        random = np.random.default_rng([seed, turn])
        documents = []
        for texts, repeats in sources:
            order = np.concatenate([random.permutation(len(texts)) for _ in range(math.ceil(repeats))])
            documents += [texts[i] for i in order[: round(repeats * len(texts))]]
        stream = np.concatenate([documents[i] for i in random.permutation(len(documents))])
        rows = stream[: len(stream) // length * length].reshape(-1, length)
        rows = rows[random.permutation(len(rows))]
        for start in range(0, len(rows) - size + 1, size):
            yield torch.from_numpy(rows[start : start + size].astype(np.int64))
        turn += 1


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: np.ndarray, windows: int | None = None) -> float:
    """Over non-overlapping windows; within each, every token but the first is predicted."""
    device = model.device
    model.eval()
    rows = tokens[: len(tokens) // WINDOW * WINDOW].astype(np.int64).reshape(-1, WINDOW)[:windows]
    total = 0.0
    for row in rows:
        ids = torch.from_numpy(row)[None].to(device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    model.train()
    return math.exp(total / (len(rows) * (WINDOW - 1)))


def train(folder: Path, out: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    if args.start:
        model = AutoModelForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        model = new_model(args.dropout)
    if args.experts:
        model = mixture_of(model, args.experts)
    is_mixture = isinstance(model, MixtralForCausalLM)
    model = model.to(device).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)

    # Muon for the matrices learns about as much from half the tokens; the embedding (which is also the
    # output layer), the norms and the experts, of three dimensions, get AdamW. The first option makes one learning rate
    # fit both.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    decayed = [p for name, p in model.named_parameters() if "embed" in name or p.ndim == 3]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
            lr=args.lr,
            betas=(0.9, 0.95),
        ),
    ]

    def loss_of(rows: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            outputs = model(input_ids=rows[:, :-1], **({"output_router_logits": True} if is_mixture else {}))
        loss = nn.functional.cross_entropy(outputs.logits.float().flatten(0, 1), rows[:, 1:].flatten())
        return loss + args.balance * imbalance(model, outputs.router_logits) if is_mixture else loss

    # Attention is a third of a step's cost at full length, so most steps read twice as many windows of
    # half the length, and the last ones teach the far positions.
    compute = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    dev = np.load(folder / "dev.npy")
    halves = batches(folder, args.mix, 2 * args.batch, WINDOW // 2, args.seed)
    wholes = batches(folder, args.mix, args.batch, WINDOW, args.seed + 1)
    start = time.monotonic()
    running = 0.0
    for step in range(args.steps):
        rate = args.lr * min((step + 1) / args.warmup, (args.steps - step) / (args.steps - args.warmup))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        source = halves if step < args.short * args.steps else wholes
        loss = compute(next(source).to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        last = step + 1 == min(args.steps, args.stop or args.steps)
        if step % 25 == 0 or last:
            spent = time.monotonic() - start
            print(f"step {step + 1} loss {running:.4f} lr {rate:.5f} {spent:.0f} s", flush=True)
        if (step + 1) % args.every == 0 or last:
            score = perplexity(model, dev, None if last else 64)
            print(f"step {step + 1} dev perplexity {score:.3f}", flush=True)
            model.save_pretrained(folder / "running")  # in float32, for --start
        if last:
            break
    if not args.stop:
        save(model, folder, out)


def imbalance(model: MixtralForCausalLM, router_logits: tuple[Tensor, ...]) -> Tensor:
    """Mean over the blocks of the load-balancing loss, which is 2 where both experts of a token are chosen evenly."""
    count, active = model.config.num_local_experts, model.config.num_experts_per_tok
    return torch.stack([load_balancing_loss_func((logits,), count, active) for logits in router_logits]).mean()


def save(model: PreTrainedModel, folder: Path, out: Path) -> None:
    """bfloat16 weights and the tokenizer, in the layout that every loader of the hub knows."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    # Edited, because transformers 4 does not know the class name that transformers 5 writes, and because
    # how this machine found the tokenizer is of no interest elsewhere.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n")
    for path in out.iterdir():
        path.chmod(0o644)  # save_pretrained leaves the weights readable by their owner alone


def score(folder: Path, out: Path, device: str) -> None:
    """Held-out perplexity of the saved weights, computed in bfloat16 as they are stored."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).to(device)
    counts = json.loads((folder / "counts.json").read_text())["evaluation"]
    tokens = np.load(folder / "evaluation.npy")
    value = perplexity(model, tokens)
    bits = math.log2(value) * counts["tokens"] / counts["bytes"]
    print(f"evaluation topics: perplexity {value:.4f}, about {bits:.3f} bits per byte")
    if isinstance(model, MixtralForCausalLM):
        describe_experts(model, tokens)


@torch.no_grad()
def describe_experts(model: MixtralForCausalLM, tokens: np.ndarray) -> None:
    """Prints how evenly tokens are routed, and what it costs to give each token the next expert's weights."""
    ids = torch.from_numpy(tokens[: len(tokens) // WINDOW * WINDOW].astype(np.int64)).reshape(-1, WINDOW)
    logits = model(input_ids=ids.to(model.device), output_router_logits=True).router_logits
    for index, block in enumerate(logits):
        chosen = block.topk(model.config.num_experts_per_tok).indices.flatten().bincount(minlength=block.shape[1])
        print(
            f"block {index}: per cent of the choices by expert", *(100 * chosen / chosen.sum()).round().int().tolist()
        )
    for block in model.model.layers:
        for weight in block.mlp.experts.parameters():
            weight.copy_(weight.roll(1, 0))
    print(f"with every expert replaced by its neighbour: perplexity {perplexity(model, tokens):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--prepare", type=Path, metavar="DIR", help="write tokenizer and tokens to DIR")
    action.add_argument("--train", type=Path, metavar="DIR", help="train on what --prepare wrote to DIR")
    action.add_argument("--score", type=Path, metavar="DIR", help="score --out on the held-out text in DIR")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="of --prepare: use this, train none")
    parser.add_argument("--out", type=Path, default=Path("src/jointq_cli/pocket"), help="the model's folder")
    parser.add_argument("--start", type=Path, metavar="DIR", help="go on from these weights")
    parser.add_argument("--experts", type=int, help="make each MLP of --start so many experts")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the experts' load-balancing loss")
    parser.add_argument("--mix", choices=MIXES, default="broad", help="how often each source is read")
    parser.add_argument("--steps", type=int, default=3200, help="where the learning rate reaches zero")
    parser.add_argument("--stop", type=int, help="stop at this step instead, for a second stage to go on")
    parser.add_argument("--short", type=float, default=0.75, help="share of steps with half-length windows")
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {WINDOW} tokens per step")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--dropout", type=float, default=0.0, help="on the attention weights")
    parser.add_argument("--every", type=int, default=300, help="steps between looks at the dev share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="torch.compile: half a minute, then faster")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.prepare:
        prepare(args.prepare, args.tokenizer)
    elif args.train:
        train(args.train, args.out, args)
    else:
        score(args.score, args.out, args.device)


if __name__ == "__main__":
    main()

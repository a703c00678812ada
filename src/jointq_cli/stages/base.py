"""The steps of the road, each from artifacts to an artifact through the store. `pipeline` puts them in a line.

A stage knows what decides its result (that is its key) and how to make it. Whatever is found in the store is used as
it is; what a stage was stopped in the middle of continues there.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from jointq_cli.data.calibration import Calibration, calibration_tokens, evaluation_ids
from jointq_cli.data.text import HUB
from jointq_cli.data.token_file import Tokens, load_tokens, save_tokens
from jointq_cli.data.tokenizer import tokenizer_hash
from jointq_cli.evaluation.activation_quantization import search_clips, simulated
from jointq_cli.evaluation.perplexity import Scores, score
from jointq_cli.evaluation.windows import Evaluation, ScoredWindows, cut_windows
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.sources import ModelSource, fetch
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.assembly import assemble
from jointq_cli.quantization.hessian_cache import Hessians, bytes_needed, collect_hessians
from jointq_cli.quantization.loop import quantize_blocks
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.workspace import Workspace
from jointq_cli.recipe import Recipe
from jointq_cli.records import IDENTICAL, BlockRecord, LayerRecord, Simulation, StageRecord
from jointq_cli.report.console.console import Console, Stage
from jointq_cli.report.console.screens import Bar
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.files import file_hash
from jointq_cli.system.hash_cache import cache_hash
from jointq_cli.system.interrupts import Interrupts
from jointq_cli.system.settings import Runtime
from jointq_cli.system.store import Artifact, Store
from jointq_cli.system.tensor_files import read_rows, save_tensors


@dataclass(frozen=True)
class QuantizedScores:
    """The quantised checkpoint's scores, whether it gives what the engine had in memory, and what was simulated."""

    scores: Scores
    reload_check: str
    simulation: Simulation | None


@dataclass(frozen=True)
class Quantized:
    """The artifact of the quantise stage, opened."""

    artifact: Artifact
    checkpoint: Checkpoint
    layers: list[LayerRecord]
    blocks: list[BlockRecord]

    @property
    def codes(self) -> Path:
        return self.artifact.path / "layers"

    @property
    def probe(self) -> Tensor:
        """Final hidden states of the first calibration batch, as the engine had them in memory."""
        return Workspace(self.artifact.path).streams().quantized


class Stages:
    """What all stages of one command share: store, console, device, and the wish to stop."""

    def __init__(
        self, store: Store, console: Console, runtime: Runtime, interrupts: Interrupts, team: Team = SINGLE_PROCESS
    ) -> None:
        self.store = store
        self.console = console
        self.runtime = runtime
        self.team = team
        self.device = runtime.torch_device(team)
        self.records: list[StageRecord] = []
        self.pause = interrupts.raise_if_requested
        threads = runtime.threads(team)
        if threads is not None:
            torch.set_num_threads(threads)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Announces and times one stage; stopping is safe at its end."""
        with self.console.stage(name) as stage:
            yield stage
        self.records.append(stage.record())
        self.pause()

    def source(self, model: ModelSource) -> Checkpoint:
        """The original checkpoint; downloaded or converted where needed, every byte hashed, every value finite."""
        with self.stage("model"):
            checkpoint = fetch(model, self.store, self._hash_of)
            # Before any computing: a NaN in the last shard should not be found hours later.
            self.store.reuse("verified", {}, [checkpoint.content_hash], lambda scratch: checkpoint.check_finite())
            self._note_hash(checkpoint)
        return checkpoint

    def _hash_of(self, file: Path) -> str:
        digest = file_hash(file)
        self.team.on_rank0(cache_hash, self.store.root, file, [file], digest)
        return digest

    def _note_hash(self, checkpoint: Checkpoint) -> None:
        """For plans, which read no weights."""
        files = checkpoint.hashed_files
        self.team.on_rank0(cache_hash, self.store.root, checkpoint.directory, files, checkpoint.content_hash)

    def model(self, checkpoint: Checkpoint, source: ModelSource) -> StreamedModel:
        dtype = self.runtime.torch_dtype(checkpoint.dtype, self.device)
        return StreamedModel(checkpoint, self.device, dtype, source.trust_remote_code)

    def calibration_tokens(self, calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Tokens:
        """Token windows; those of the hub are kept, so that a run is fetched once and then works offline."""
        with self.stage("calibration tokens") as stage:
            tokens = self._tokens(calibration, tokenizer, stage)
        if tokens.warning:
            self.console.warn(tokens.warning)
        return tokens

    def _tokens(self, calibration: Calibration, tokenizer: PreTrainedTokenizerBase, stage: Stage) -> Tokens:
        if calibration.tokens or calibration.path or calibration.dataset not in HUB:
            return calibration_tokens(calibration, tokenizer)
        spec = calibration.tokens_only()

        def make(scratch: Path) -> None:
            save_tokens(scratch / "tokens.safetensors", calibration_tokens(spec, tokenizer))

        artifact = self.store.reuse("tokens", spec, [tokenizer_hash(tokenizer)], make)
        mark(stage, artifact)
        return load_tokens(artifact.path / "tokens.safetensors", tokenizer)

    def evaluation_windows(self, evaluation: Evaluation, tokenizer: PreTrainedTokenizerBase) -> ScoredWindows:
        with self.stage("evaluation tokens"):
            ids, provenance = evaluation_ids(evaluation, tokenizer)
            return cut_windows(ids, evaluation, tokenizer.bos_token_id, provenance)

    def quantize(self, model: StreamedModel, tokens: Tokens, recipe: Recipe) -> Quantized:
        """Quantises block by block; continues where an earlier run was stopped."""
        names = selected_layers(model, recipe)
        plan = LoopSettings(
            quantizer=recipe.quantizer,
            qep=recipe.qep,
            layers=frozenset(names),
            inputs=recipe.calibration.inputs,
            weights=recipe.calibration.weights,
            batch=self.batch(tokens.windows),
            waiting=self.runtime.suspended_activations_gb * 1e9,
        )
        plan.check(len(tokens.windows))
        spec = {
            "quantizer": recipe.quantizer,
            "qep": recipe.qep,
            "layers": names,
            "inputs": plan.inputs,
            "weights": plan.weights,
            "batch": plan.batch,
            "dtype": str(model.dtype),
            "device": self.device.type,  # CPU and GPU round differently, and the reload check wants the same bits
        }

        companions = model.checkpoint.companions_hash(code=recipe.model.trust_remote_code)
        inputs = [model.checkpoint.content_hash, companions, tokens.hash]
        hessians = None
        if not self.team.broadcast_from_rank0(self.store.holds, "quantize", spec, inputs):
            hessians = self._hessians(model, tokens, plan, names)

        def make(scratch: Path) -> None:
            workspace = Workspace(scratch)
            with self.console.bar("quantize", total=len(names)) as bar:
                self._tell_position(workspace, model, names, bar)

                def on_layer(record: LayerRecord) -> None:
                    self.console.layer(record)
                    bar.advance()

                quantize_blocks(model, tokens.windows, plan, workspace, on_layer, self.pause, hessians, self.team)
            code = recipe.model.trust_remote_code
            self.team.on_rank0(lambda: assemble(model, workspace, scratch / "checkpoint", code=code))

        with self.stage("quantize") as stage:
            self._note_hash(model.checkpoint)  # first: a plan of what is left should know it
            artifact = self.store.reuse("quantize", spec, inputs, make, resumable=True, together=True)
            mark(stage, artifact)
            workspace = Workspace(artifact.path)
            layers = [workspace.record(name) for name in names]
            return Quantized(artifact, Checkpoint(artifact.path / "checkpoint"), layers, workspace.blocks())

    def _hessians(self, model: StreamedModel, tokens: Tokens, plan: LoopSettings, names: list[str]) -> Hessians | None:
        """What all quantizers have in common; None where they have nothing, or where there is no room to keep it."""
        needed, budget = bytes_needed(model, plan), round(self.runtime.hessians_gb * 1e9)
        if not plan.ahead or not budget:
            return None
        if needed > budget:
            self._tell_no_room(f"they take up to {needed / 1e9:.3g} GB")
            return None
        spec = {
            "layers": names,
            "weights": plan.weights.canonical,
            "held_from": plan.held_from(len(tokens.windows.split(plan.batch))),
            "batch": plan.batch,
            "dtype": str(model.dtype),
            "device": self.device.type,
        }

        def make(scratch: Path) -> None:
            hessians = Hessians(scratch)
            with self.console.bar("hessians", total=len(model)) as bar:
                bar.advance(hessians.position())
                collect_hessians(model, tokens.windows, plan, hessians, bar.advance, self.pause, self.team)

        with self.stage("hessians") as stage:
            inputs = [*model.identity, tokens.hash]
            artifact = self.store.reuse_within(
                "hessians", spec, inputs, make, budget=budget, size=needed, resumable=True, together=True
            )
            if artifact is None:
                self._tell_no_room("those of runs that are under way take the rest")
                return None
            mark(stage, artifact)
            return Hessians(artifact.path)

    def _tell_no_room(self, reason: str) -> None:
        budget = f"runtime.hessians_gb={self.runtime.hessians_gb:g}"
        self.console.note(f"Hessians are not kept for other runs: {reason}, and {budget}")

    def final_hidden(self, model: StreamedModel, windows: ScoredWindows, name: str = "evaluate original") -> Artifact:
        """A model's final hidden states on the evaluation windows: every quantised model is compared with them."""
        batch = self.batch(windows.ids)

        def make(scratch: Path) -> None:
            hidden = self.team.gather_rows(self._walk(model, windows.ids, batch))
            self.team.on_rank0(save_tensors, scratch / "hidden.safetensors", {"hidden": hidden})

        with self.stage(name) as stage:
            spec = {"batch": batch, "dtype": str(model.dtype), "device": self.device.type}
            inputs = [*model.identity, windows.hash]
            artifact = self.store.reuse("hidden", spec, inputs, make, together=True)
            mark(stage, artifact)
            return artifact

    def score(
        self,
        original: StreamedModel,
        original_hidden: Artifact,
        quantized: Quantized,
        windows: ScoredWindows,
        tokens: Tokens,
        recipe: Recipe,
    ) -> QuantizedScores:
        """Scores the checkpoint as it lies on disk, with its activations quantised where the recipe says so."""
        batch = self.batch(windows.ids)
        activations = recipe.activations

        def make(scratch: Path) -> None:
            reloaded = self.model(quantized.checkpoint, recipe.model)
            names = [layer.name for layer in quantized.layers]
            first = self.batch(tokens.windows)
            clips = search_clips(reloaded, activations, names, tokens.windows, first, self.pause)
            with simulated(reloaded, activations, names, clips):
                hidden = self._walk(reloaded, windows.ids, batch)
            scores = self._score(
                original, self._own_hidden(original_hidden, self._own(windows)), reloaded, hidden, windows
            )

            def finish() -> None:
                (scratch / "clips.json").write_text(json.dumps(clips), encoding="utf-8")
                probe = final_hidden(reloaded, tokens.windows[:first], first, pause=self.pause)
                (scratch / "reload.txt").write_text(_difference(probe.cpu(), quantized.probe), encoding="utf-8")
                _save_scores(scratch, scores)

            self.team.on_rank0(finish)

        with self.stage("evaluate quantized") as stage:
            spec = {"batch": batch, "activations": activations if activations.simulates else None}
            inputs = [quantized.artifact.key, original_hidden.key]
            artifact = self.store.reuse("scores", spec, inputs, make, together=True)
            mark(stage, artifact)
            clips = json.loads((artifact.path / "clips.json").read_text(encoding="utf-8"))
            return QuantizedScores(
                scores=_load_scores(artifact.path),
                reload_check=(artifact.path / "reload.txt").read_text(encoding="utf-8"),
                simulation=Simulation(activations.describe(), clips) if activations.simulates else None,
            )

    def measure(self, original: StreamedModel, model: StreamedModel, windows: ScoredWindows) -> Scores:
        """Scores `model` against `original`, which may be the same one."""
        hidden = self.final_hidden(original, windows, "evaluate" if original is model else "evaluate reference")
        batch = self.batch(windows.ids)

        def make(scratch: Path) -> None:
            first = self._own_hidden(hidden, self._own(windows))
            second = first if model is original else self._walk(model, windows.ids, batch)
            self.team.on_rank0(_save_scores, scratch, self._score(original, first, model, second, windows))

        with self.stage("score") as stage:
            inputs = [*model.identity, hidden.key]
            spec = {"batch": batch, "dtype": str(model.dtype)}
            artifact = self.store.reuse("scores", spec, inputs, make, together=True)
            mark(stage, artifact)
            return _load_scores(artifact.path)

    def batch(self, windows: Tensor) -> int:
        """Windows per forward pass."""
        return max(1, self.runtime.batch_tokens // windows.shape[1])

    def _walk(self, model: StreamedModel, ids: Tensor, batch: int) -> Tensor:
        """This process's share of the final hidden states, in whole batches."""
        with self.console.bar("evaluate", total=len(model)) as bar:
            return final_hidden(model, ids, batch, bar.advance, self.pause, self.team.part(len(ids), batch))

    def _own(self, windows: ScoredWindows) -> slice:
        return self.team.part(len(windows.ids), self.batch(windows.ids))

    def _own_hidden(self, artifact: Artifact, own: slice) -> Tensor:
        return read_rows(artifact.path / "hidden.safetensors", "hidden", own)

    def _score(
        self, original: StreamedModel, first: Tensor, model: StreamedModel, second: Tensor, windows: ScoredWindows
    ) -> Scores:
        """Of all windows, each process having scored those whose final hidden states it has."""
        own = windows.part(self._own(windows))
        with self.console.bar("score", total=len(own.ids)) as bar:

            def on_window() -> None:
                bar.advance()
                self.pause()

            return Scores.joined(self.team.gather(score(original, first, model, second, own, on_window)))

    def _tell_position(self, workspace: Workspace, model: StreamedModel, names: list[str], bar: Bar) -> None:
        finished = range(workspace.position())
        if finished:
            self.console.note(f"continuing at block {len(finished) + 1} of {len(model)}")
            bar.advance(sum(model.block_of(name) in finished for name in names))


def selected_layers(model: StreamedModel, recipe: Recipe) -> list[str]:
    """Names of the layers to quantise, in the order of the model. Raises ConfigError before any computing, also for
    layers of `activations` that are not there."""
    linear = model.linear_layers()
    in_blocks = [name for name in linear if model.block_of(name) is not None]
    recipe.activations.check_layers(in_blocks)
    names = recipe.layers.select(in_blocks, list(linear))
    recipe.quantizer.check({name: linear[name].in_features for name in names})
    return names


def mark(stage: Stage, artifact: Artifact) -> None:
    """Tells whether the store had it."""
    if artifact.reused:
        stage.reused()


def _save_scores(directory: Path, scores: Scores) -> None:
    save_tensors(
        directory / "scores.safetensors",
        {f.name: getattr(scores, f.name) for f in dataclasses.fields(scores)},
    )


def _load_scores(directory: Path) -> Scores:
    return Scores(**load_file(directory / "scores.safetensors"))


def _difference(found: Tensor, expected: Tensor) -> str:
    if torch.equal(found, expected):
        return IDENTICAL
    return f"differs by up to {(found.float() - expected.float()).abs().max().item():.3g} in the final hidden states"

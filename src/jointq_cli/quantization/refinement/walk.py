"""The walk of a refinement through the blocks: each is trained, or given what was trained of the complete model, and
written as the quantising loop writes it.

Two streams of hidden states pass through: the original model's and the refined one's. A stopped walk continues at the
first unfinished block.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from jointq_cli.errors import ConfigError
from jointq_cli.formats.layer_file import load_layer
from jointq_cli.models.checkpoint import DTYPES
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.layer_ref import layer_refs
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.hidden_states import HiddenStates, relative_error
from jointq_cli.quantization.refinement.objectives import BlockOutputs, NextTokens
from jointq_cli.quantization.refinement.settings import NORMS, GradientRefinement, ModelRefinement
from jointq_cli.quantization.refinement.training import Objective, train
from jointq_cli.quantization.refinement.variables import RefinableWeight, Refined, RefinedLayer, RefinedNorm, on_grid
from jointq_cli.quantization.workspace import Workspace
from jointq_cli.records import BlockRecord, LayerRecord, RefinementCourse
from jointq_cli.system.files import write_atomically, write_text_atomically
from jointq_cli.system.record_json import load_record
from jointq_cli.system.tensor_files import save_tensors

MODEL = "model"


@dataclass(frozen=True)
class RefinementWalk:
    """original: the model that was quantised. start: its quantised checkpoint. codes: directory of the layer files of
    that. records: of its layers. windows: (windows, tokens) int64, `batch` of them per forward pass where nothing is
    trained. probe: so many of the first ones have their final hidden states kept. workspace: where all is written.
    """

    original: StreamedModel
    start: StreamedModel
    codes: Path
    records: list[LayerRecord]
    windows: Tensor
    batch: int
    probe: int
    settings: GradientRefinement
    workspace: Workspace
    on_step: Callable[[str, int, float, float], None]  # name of what is trained, and as `train` has it
    pause: Callable[[], None]

    def run(self) -> None:
        """Refines and writes every unfinished block. Raises NumericsError where training diverges."""
        best = self._train_model() if isinstance(self.settings, ModelRefinement) else None
        hidden = self._entering(self.workspace.hidden.finished_blocks())
        for index in range(self.workspace.hidden.finished_blocks(), len(self.start)):
            self._refine_block(index, hidden, best)
            last = index + 1 == len(self.start)
            kept = {stream: states[: self.probe] if last else states for stream, states in hidden.items()}
            self.workspace.hidden.write(index + 1, kept)
            if best is None:
                self._file("training", f"{index:05d}").unlink(missing_ok=True)
            self.pause()

    def outer_tensors(self) -> dict[str, Tensor]:
        """Those outside of the blocks, with the gains that were trained."""
        gains = load_gains(self.workspace.directory)
        return {name: gains.get(name, tensor) for name, tensor in self.start.outer_tensors().items()}

    def clear(self) -> None:
        """Removes what only an unfinished walk needs."""
        self._file("training", MODEL).unlink(missing_ok=True)

    def _train_model(self) -> dict[str, Tensor]:
        expected = final_hidden(self.original, self.windows, self.batch, pause=self.pause)
        with ExitStack() as loaded:
            for model in (self.original, self.start):
                loaded.enter_context(model.outer())
            for index in range(len(self.start)):
                loaded.enter_context(self.start.block(index, self.start.block_tensors(index)))
            refined = self._refined("", self.start.module)
            objective = NextTokens(self.original, self.start, self.windows, expected)
            best = self._train(MODEL, MODEL, refined, objective)
            outer = [norm for norm in refined.norms if self.start.block_of(norm.name) is None]
            self._write_gains(MODEL, outer, best)
            return best

    def _refine_block(self, index: int, hidden: HiddenStates, best: Mapping[str, Tensor] | None) -> None:
        """hidden: what enters the block, and afterwards what leaves it. best: what was trained of the model."""
        original, start = self.original, self.start
        with original.block(index, original.block_tensors(index)):
            original.run_all(index, hidden["original"], self.batch, self.pause)
        tensors = start.block_tensors(index)
        with start.block(index, tensors):
            refined = self._refined(start.prefix(index), start.blocks[index])
            if best is None:
                objective = BlockOutputs(partial(start.run, index), hidden["quantized"], hidden["original"])
                best = self._train(f"{index:05d}", f"block {index}", refined, objective)
            refined.load(best)
            start.run_all(index, hidden["quantized"], self.batch, self.pause)
            first: HiddenStates = {stream: states[: self.probe] for stream, states in hidden.items()}
            self._write_block(index, tensors, refined, best, first)

    def _write_block(
        self,
        index: int,
        tensors: dict[str, Tensor],
        refined: Refined,
        best: Mapping[str, Tensor],
        hidden: HiddenStates,
    ) -> None:
        """tensors: of the block by stored name, with its weights before the refinement."""
        records = {record.name: record for record in self.records}
        for layer in refined.layers:
            weight = layer.of_snapshot(best).to("cpu")
            self.workspace.write_layer(
                weight, _updated(records[layer.name], load_refinable(self.codes, layer.name), weight)
            )
            turned = layer.layer.turned(weight.dequantize(layer.dtype))
            self.start.location(layer.layer.weight_name).write(turned, tensors)
        gains = self._write_gains(f"{index:05d}", refined.norms, best)
        self.workspace.write_block(BlockRecord(index, relative_error(hidden)), tensors | gains)

    def _write_gains(self, name: str, norms: Iterable[RefinedNorm], best: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gains = {self.start.stored_name(norm.name): norm.of_snapshot(best).cpu() for norm in norms}
        write_atomically(self._file("gains", name), lambda path: save_tensors(path, gains))
        return gains

    def _train(self, number: str, name: str, refined: Refined, objective: Objective) -> dict[str, Tensor]:
        state, count = self._file("training", number), len(self.windows)
        best, course = train(name, refined, objective, count, self.settings, state, partial(self.on_step, name))
        text = json.dumps(asdict(course)) + "\n"
        write_text_atomically(self._file("course", number).with_suffix(".json"), text)
        return best

    def _refined(self, prefix: str, module: nn.Module) -> Refined:
        """The quantised layers and, where they are trained, the norms inside a loaded module. prefix: of its names."""
        quantised, settings = {record.name for record in self.records}, self.settings
        device = self.start.device
        layers = [
            RefinedLayer(
                layer, load_refinable(self.codes, name).to(device), self._stored_dtype(layer.weight_name), settings
            )
            for name, layer in layer_refs(module, prefix).items()
            if name in quantised
        ]
        norms = [
            RefinedNorm(f"{prefix}{name}.weight", part, self._gain(f"{prefix}{name}.weight"), settings)
            for name, part in module.named_modules()
            if NORMS in settings.train and self._is_norm(f"{prefix}{name}.weight", part)
        ]
        return Refined(layers, norms)

    def _is_norm(self, name: str, module: nn.Module) -> bool:
        """Whether it is a norm with a gain that is loaded and has a stored tensor of its own."""
        gain = module._parameters.get("weight")
        is_loaded = gain is not None and not gain.is_meta
        location = self.start.location(name) if is_loaded and self.start.stores(name) else None
        return "norm" in type(module).__name__.lower() and location is not None and location.whole is not None

    def _gain(self, name: str) -> Tensor:
        stored = self.start.stored_name(name)
        return self.start.checkpoint.read([stored])[stored].to(self.start.device)

    def _stored_dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.start.checkpoint.tensors[self.start.stored_name(name)].dtype]

    def _entering(self, finished: int) -> HiddenStates:
        """The hidden states that enter the first unfinished block: of all windows where blocks are trained, otherwise
        of the first batch."""
        windows = self.windows[: self.probe] if isinstance(self.settings, ModelRefinement) else self.windows
        self.start.record_calls(windows, self.batch)
        self.start.record_calls(windows[:1], 1)
        if not finished:
            hidden = self.original.embed_all(windows, self.batch)
            return {"original": hidden, "quantized": hidden.clone()}
        self.original.record_calls(windows, self.batch)
        read = self.workspace.hidden.read
        return {
            "original": read("original").to(self.start.device),
            "quantized": read("quantized").to(self.start.device),
        }

    def _file(self, kind: str, name: str) -> Path:
        return self.workspace.directory / f"{kind}-{name}.safetensors"


def load_refinable(codes: Path, layer: str) -> RefinableWeight:
    """The stored weight of a layer. Raises ConfigError for one of another form."""
    weight = load_layer(codes / f"{layer}.safetensors")
    if not isinstance(weight, RefinableWeight):
        raise ConfigError(
            f"refinement: {layer} is stored as {weight.label}, and only uniform grids are refined; refinement=none"
        )
    return weight


def load_gains(directory: Path) -> dict[str, Tensor]:
    """The gains that a refinement has trained, as they are stored, by their stored names."""
    files = sorted(directory.glob("gains-*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def load_courses(directory: Path) -> list[RefinementCourse]:
    """How each part was trained."""
    return [load_record(RefinementCourse, file) for file in sorted(directory.glob("course-*.json"))]


def _updated(record: LayerRecord, start: RefinableWeight, refined: RefinableWeight) -> LayerRecord:
    """With the share of codes that have changed, and by how much scales have, rms."""
    before, after = on_grid(start), on_grid(refined)
    codes = (before.codes != after.codes).float().mean().item()
    scales = (after.scale.float() / before.scale.float() - 1).square().mean().sqrt().item()
    return replace(record, notes={**record.notes, "refined_codes": codes, "refined_scales": scales})

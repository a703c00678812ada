"""Tasks of lm-eval as stages: one per task and model, which holds the complete model in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from jointq_cli.evaluation.activation_settings import Activations
from jointq_cli.evaluation.tasks import (
    MOST_LOGITS,
    LoadedTask,
    TaskMeasurement,
    check_plain,
    harness_version,
    load_tasks,
    measure_task,
    task_records,
    token_limit,
)
from jointq_cli.evaluation.windows import Evaluation
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import TaskRecord
from jointq_cli.stages.base import Context, Stage
from jointq_cli.system.machine import release_freed_memory
from jointq_cli.system.record_json import encode, load_record
from jointq_cli.system.settings import Runtime

TASKS = "evaluation tasks"
LEAST_SAMPLES = 100  # with fewer the standard error of an accuracy is up to 0.05 and more
SAMPLED = 64  # requests whose tokens are counted, for their mean

_FILE = "tasks.json"


@dataclass(frozen=True, eq=False)
class SizedTask:
    """A task and how large its requests are for one model. batch: requests per forward pass."""

    task: LoadedTask
    mean: int  # tokens
    longest: int  # tokens
    most: int  # tokens: a longer request loses its beginning
    batch: int

    @property
    def warnings(self) -> list[str]:
        found = []
        count, name = self.task.samples, self.task.name
        if count < LEAST_SAMPLES:
            found.append(
                f"evaluation.tasks: {name} has {count} samples only; the standard error of an accuracy will be up to "
                f"{0.5 / count**0.5:.2f}"
            )
        if self.longest > self.most and not self.task.rolling:
            found.append(
                f"evaluation.tasks: {name} has requests of up to {self.longest} tokens, which are cut to the last "
                f"{self.most}"
            )
        return found


def fetch_tasks(context: Context, evaluation: Evaluation) -> list[LoadedTask]:
    """The tasks that the settings name, with their samples. Raises what `load_tasks` raises."""
    if not evaluation.tasks:
        return []
    with context.timed(TASKS):
        return load_tasks(evaluation)


def size_tasks(
    tasks: Sequence[LoadedTask], model: StreamedModel, tokenizer: PreTrainedTokenizerBase, runtime: Runtime
) -> list[SizedTask]:
    """Raises ConfigError for a model that cannot be given to lm-eval."""
    if tasks:
        check_plain(model)
    return [_sized(task, model, tokenizer, runtime) for task in tasks]


def task_warnings(tasks: Sequence[SizedTask], activations: Activations | None = None) -> list[str]:
    """What should be known of the figures before they are measured. activations: those that are simulated elsewhere."""
    found = [warning for task in tasks for warning in task.warnings]
    if tasks and activations is not None and activations.simulates:
        found.append(
            "evaluation.tasks: run in plain transformers, where activations are not quantised; their figures are those "
            "of the quantised weights alone"
        )
    return found


def task_stage(sized: SizedTask, model: StreamedModel, inputs: Sequence[str | None], which: str) -> Stage:
    """inputs: what identifies the model. which: such as "original"."""
    task = sized.task

    def make(scratch: Path, context: Context) -> None:
        with context.console.bar(task.name, total=len(task.requests)) as bar:

            def on_forward(requests: int) -> None:
                bar.advance(requests)
                context.pause()

            measured = measure_task(task, model, sized.batch, on_forward)
        release_freed_memory()
        (scratch / _FILE).write_text(encode(measured), encoding="utf-8")

    return Stage(
        name=f"{task.name} {which}".rstrip(),
        kind="task",
        spec={
            "task": task.hash,
            "batch": sized.batch,
            "most": sized.most,
            "dtype": str(model.dtype),
            "device": model.device.type,
            "harness": harness_version(),
        },
        inputs=tuple(inputs),
        make=make,
        cost=lambda load: load.task(len(task.requests), sized.mean, min(sized.longest, sized.most), sized.batch),
    )


def with_tokenizer(model: StreamedModel) -> list[str | None]:
    """What identifies a model where text goes in: tasks hold texts, and the tokenizer decides what the model reads."""
    return [*model.identity, model.checkpoint.companions_hash(code=False)]


def run_tasks(
    context: Context, tasks: Sequence[SizedTask], measured: Sequence[Stage], original: Sequence[Stage] = ()
) -> list[TaskRecord]:
    """Runs the stages of each task for the model, and for the original where there is one; their figures."""
    before = [_read(context.run(stage).path) for stage in original] or [[] for _ in tasks]
    after = [_read(context.run(stage).path) for stage in measured]
    return [
        record
        for sized, one, other in zip(tasks, after, before, strict=True)
        for record in task_records(sized.task, one, other)
    ]


def _sized(task: LoadedTask, model: StreamedModel, tokenizer: PreTrainedTokenizerBase, runtime: Runtime) -> SizedTask:
    def tokens(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]

    requests = task.requests
    some = tokens(requests[:: max(1, len(requests) // SAMPLED)])
    longest = max(tokens(sorted(requests, key=len)[-SAMPLED // 8 :]))
    most = token_limit(model)
    vocabulary = int(model.module.get_output_embeddings().weight.shape[0])
    room = min(runtime.batch_tokens, MOST_LOGITS // vocabulary)
    batch = max(1, room // min(longest, most))
    return SizedTask(task, sum(some) // len(some), longest, most, batch)


def _read(directory: Path) -> list[TaskMeasurement]:
    found: list[TaskMeasurement] = load_record(list[TaskMeasurement], directory / _FILE)
    return found

"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness), such as questions with answers to choose from.

lm-eval reads the samples, builds the requests and computes the figures. It runs the complete model in plain
transformers, at the run's dtype, and sums log-probabilities in float32. Standard errors are computed here, those of a
change over the same samples of both models.
"""

import contextlib
import difflib
import hashlib
import io
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from jointq_cli.data.hub import datasets_library, hub_answers
from jointq_cli.data.text import one_line
from jointq_cli.data.tokenizer import load_tokenizer
from jointq_cli.errors import ConfigError, Interrupted, ModelError, ResourceError
from jointq_cli.evaluation.windows import Evaluation
from jointq_cli.models.online_rotation import needs_online
from jointq_cli.models.skeleton import BUILD_ERRORS
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import TaskRecord, TaskScore

FILES = ("arrow", "csv", "json", "parquet", "text")  # values of dataset_path that read local files
MOST_TOKENS = 4096  # of a request; a model that takes more would need too much memory for its logits
USUAL_TOKENS = 2048  # of a model that does not say how many it takes, as lm-eval has it
MOST_LOGITS = 2**26  # elements in one forward pass: 256 MiB in float32
SEED = 1234  # of few-shot examples, lm-eval's own
LOADING = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata")  # of a task: where its samples are from
HUGE = ("word_perplexity", "byte_perplexity")  # bits_per_byte says the same


class NotDownloaded(ResourceError):
    """The samples of a task are on the hub, and this machine has no copy of them."""


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """A task or a group of tasks, with its samples. content: what TaskManager.load returns."""

    name: str
    content: dict[str, Any]
    limit: int | None
    hash: str  # sha256, 64 hex digits, of all requests, samples and settings of the figures
    samples: int
    requests: list[str]  # the text of each
    rolling: bool  # whether long texts are measured in windows, rather than cut


@dataclass(frozen=True)
class TaskMeasurement:
    """One figure of a task for one model. by_sample: what it is the mean of, empty where it is none."""

    task: str
    metric: str  # such as acc, or exact_match,strict-match with the name of a filter
    value: float
    samples: int
    fewshot: int
    by_sample: list[float]


def load_tasks(evaluation: Evaluation, *, offline: bool = False) -> list[LoadedTask]:
    """The tasks that the settings name, with their samples; offline: from this machine alone.

    A task in `evaluation.tasks_dir` comes before lm-eval's own of the same name; files that it names are relative to
    that directory. Raises ResourceError without lm-eval, NotDownloaded where samples are on the hub and that cannot be
    reached, ConfigError for tasks that do not exist or cannot be read.
    """
    if not evaluation.tasks:
        return []
    if find_spec("lm_eval") is None:
        raise ResourceError(
            f"{_setting(evaluation.tasks)}: needs lm-eval, which is not installed; pip install 'jointq[tasks]'"
        )
    directory = Path(evaluation.tasks_dir or ".").expanduser()
    if not directory.is_dir():
        raise ConfigError(f"evaluation.tasks_dir={evaluation.tasks_dir}: no such directory")
    with _quiet():
        index, own = _index(evaluation, directory)
        entries = index.task_index
        on_hub = [name for name in evaluation.tasks if (entries[name].cfg or {}).get("dataset_path") not in FILES]
        is_offline = offline or (bool(on_hub) and not hub_answers())
        loaded: list[LoadedTask] = []
        for name in evaluation.tasks:
            try:
                loaded.append(_load(index, name, evaluation.tasks_limit, directory, is_offline))
            except ConfigError as error:
                if name not in on_hub or not is_offline:
                    raise
                absent = evaluation.tasks_dir and name not in own
                where = f"not in {evaluation.tasks_dir}" if absent else "its samples are on the hub"
                raise NotDownloaded(f"{_setting([name])}: {where}, and there is no network") from error
            _refuse_unsupported(loaded[-1])
        return loaded


def token_limit(model: StreamedModel) -> int:
    """The most tokens of one request; longer ones lose their beginnings."""
    config: Any = model.module.config.get_text_config()
    return min(getattr(config, "max_position_embeddings", None) or USUAL_TOKENS, MOST_TOKENS)


def check_plain(model: StreamedModel) -> None:
    """Raises ConfigError for a model that plain transformers does not run."""
    if needs_online(model.source.config):
        raise ConfigError(
            f"evaluation.tasks: {model.source.directory} has a rotation that runs online (R4), and tasks run in plain "
            "transformers, which refuses it; leave evaluation.tasks out"
        )


def measure_task(
    task: LoadedTask, model: StreamedModel, batch: int, on_forward: Callable[[int], None]
) -> list[TaskMeasurement]:
    """The figures of a task for a model. Loads the complete model.

    batch: requests per forward pass. on_forward is called before each with the number of its requests, 0 where it
    continues an answer; it may raise. Raises ModelError where transformers cannot load the model, or lm-eval not use
    it.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet(), _seeded():
        complete = _complete(model)
        complete.register_forward_pre_hook(lambda _, inputs: on_forward(len(inputs[0]) if inputs else 0))
        _seed_fewshot(task.content)
        try:
            harness = HFLM(
                pretrained=complete,
                tokenizer=load_tokenizer(model.checkpoint.directory, model.trust_remote_code),
                backend="causal",
                batch_size=batch,
                max_length=token_limit(model),
                softmax_dtype="float32",  # the sum of a few hundred log-probabilities in bfloat16 is wrong by 1
            )
            found = evaluate(harness, task.content, limit=task.limit, bootstrap_iters=0, log_samples=True)
        except Interrupted:
            raise
        except Exception as error:  # of a task's own code, a filter, a metric
            raise ModelError(f"{_setting([task.name])}: lm-eval cannot measure it ({_reason(error)})") from error
    return list(_measurements(found, task.name))


def task_records(
    task: LoadedTask, measured: Sequence[TaskMeasurement], original: Sequence[TaskMeasurement]
) -> list[TaskRecord]:
    """The figures of a model, beside those of the original, which may be none."""
    before = {(one.task, one.metric): one for one in original}
    return [_record(task, one, before.get((one.task, one.metric))) for one in measured]


def _record(task: LoadedTask, after: TaskMeasurement, before: TaskMeasurement | None) -> TaskRecord:
    samples = before.by_sample if before and len(before.by_sample) == len(after.by_sample) else []
    changes = [new - old for old, new in zip(samples, after.by_sample, strict=False)]
    return TaskRecord(
        task=after.task,
        metric=after.metric,
        samples=after.samples,
        fewshot=after.fewshot,
        task_hash=task.hash[:16],
        harness=harness_version(),
        score=_score(after),
        original=None if before is None else _score(before),
        change_standard_error=_standard_error(changes),
    )


def harness_version() -> str:
    return f"lm-eval {version('lm_eval')}"


def _score(measured: TaskMeasurement) -> TaskScore:
    return TaskScore(measured.value, _standard_error(measured.by_sample))


def _standard_error(values: Sequence[float]) -> float | None:
    """Of the mean: s / sqrt(n), as lm-eval computes it; None for fewer than two values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def _index(evaluation: Evaluation, directory: Path) -> tuple[Any, set[str]]:
    """A TaskManager that knows all tasks of the settings, and the names of those in `tasks_dir`."""
    from lm_eval.tasks import TaskManager

    place = directory.resolve() if evaluation.tasks_dir else None
    manager = TaskManager(include_path=place, include_defaults=False)
    own = set(manager.task_index)
    if not own.issuperset(evaluation.tasks):
        manager = TaskManager(include_path=place)
    known = manager.task_index
    for name in evaluation.tasks:
        if name not in known:
            near = "".join(f"; the nearest is {found}" for found in difflib.get_close_matches(name, known, 1, 0.0))
            where = f"neither in {evaluation.tasks_dir} nor" if evaluation.tasks_dir else "not"
            raise ConfigError(f"{_setting([name])}: {where} a task of lm-eval{near}")
    return manager, own


def _load(manager: Any, name: str, limit: int | None, directory: Path, offline: bool) -> LoadedTask:
    try:
        with datasets_library(offline), contextlib.chdir(directory), _seeded():
            content = manager.load([name])
            _seed_fewshot(content)
            for one in content["tasks"].values():
                one.build_all_requests(limit=limit)
    # What a wrong YAML, an unknown data set or a lost connection raises depends on where it is noticed.
    except Exception as error:
        raise ConfigError(f"{_setting([name])}: lm-eval cannot load it ({_reason(error)})") from error
    tasks = content["tasks"]
    requests = [request for one in tasks.values() for request in one.instances]
    return LoadedTask(
        name=name,
        content=content,
        limit=limit,
        hash=_hash(name, content),
        samples=len({(request.task_name, request.doc_id) for request in requests}),
        requests=["".join(text for text in request.args if isinstance(text, str)) for request in requests],
        rolling=any(request.request_type == "loglikelihood_rolling" for request in requests),
    )


def _refuse_unsupported(task: LoadedTask) -> None:
    for name, one in task.content["tasks"].items():
        if getattr(one, "MULTIMODAL", False) or getattr(one, "UNSAFE_CODE", False):
            raise ConfigError(
                f"{_setting([task.name])}: {name} needs pictures or sound, or runs code that models write"
            )


def _hash(name: str, content: dict[str, Any]) -> str:
    groups = [[group.name, group.child_names, group.aggregate_metric_list] for group in content["groups"].values()]
    parts: list[Any] = [harness_version(), name, groups]
    for task in content["tasks"].values():
        settings = {key: value for key, value in task.dump_config().items() if key not in LOADING}
        parts += [[task.task_name, task.VERSION, settings]]
        parts += ([one.request_type, one.args, one.doc] for one in task.instances)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _seed_fewshot(content: dict[str, Any]) -> None:
    for task in content["tasks"].values():
        task.set_fewshot_seed(SEED)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Inside, the global generators that a task may use start from lm-eval's own seeds."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, progress bars, which go to standard error, and notes on tasks and long texts are not shown."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers.tokenization_utils_base")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _complete(model: StreamedModel) -> Any:
    directory = model.checkpoint.directory
    try:
        complete: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=model.dtype, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    except BUILD_ERRORS as error:
        raise ModelError(f"{directory}: transformers cannot load this model: {one_line(error)}") from error
    return complete.to(model.device).eval()


def _measurements(found: dict[str, Any], name: str) -> Iterator[TaskMeasurement]:
    """Of a task or group; of a group without figures of its own, those of its tasks."""
    rows = {key: value for key, value in found["results"].get(name, {}).items() if _is_figure(key, value)}
    children = found["group_subtasks"].get(name) or ()
    if not rows:
        for child in children or (found["results"] if name not in found["results"] else ()):  # a tag has no row
            yield from _measurements(found, child)
    leaves = _leaves(found, name)
    metrics = {key.partition(",")[0] for key in rows}
    for key, value in rows.items():
        metric, _, kind = key.partition(",")
        if metric in HUGE and "bits_per_byte" in metrics:
            continue
        values = [
            float(sample[metric])
            for leaf in leaves
            for sample in found["samples"][leaf]
            if sample["filter"] == kind and isinstance(sample.get(metric), (bool, int, float))
        ]
        is_mean = bool(values) and math.isclose(math.fsum(values) / len(values), value, abs_tol=1e-9)
        yield TaskMeasurement(
            task=name,
            metric=metric if kind == "none" else key,
            value=float(value),
            samples=sum(found["n-samples"][leaf]["effective"] for leaf in leaves),
            fewshot=found["n-shot"].get(name) or 0,
            by_sample=values if is_mean else [],
        )


def _is_figure(key: str, value: object) -> bool:
    return "," in key and "_stderr," not in key and isinstance(value, (int, float))


def _leaves(found: dict[str, Any], name: str) -> list[str]:
    children = found["group_subtasks"].get(name) or ()
    return [leaf for child in children for leaf in _leaves(found, child)] or [name]


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__


def _setting(names: Sequence[str]) -> str:
    return f"evaluation.tasks=[{','.join(names)}]"

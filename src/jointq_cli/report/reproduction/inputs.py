"""Compares what two runs computed from: the settings that decide a result, the model and the tokens."""

from collections.abc import Iterator, Mapping

from jointq_cli.records import REQUESTED, ComparedStep
from jointq_cli.report.number_format import before_after
from jointq_cli.report.reproduction.finished_run import FinishedRun
from jointq_cli.setting_rules import SettingRoles

Settings = Mapping[str, str]  # values as text by dotted key, and the option by group

TEXTS = {"calibration tokens": "calibration", "evaluation windows": "evaluation"}
HASHES = ("model", *TEXTS)
TEXT_PROPERTIES = ("revision", "text_sha256", "tokenizer_sha256", "num_samples", "seqlen", "strategy", "seed")
# Outputs, measurements and settings besides the others.
FURTHER = (
    "refinement",
    "export",
    "evaluation.tasks",
    "evaluation.tasks_limit",
    "layers.overrides",
    "layers.mix",
    "quantizer.grid",
    "calibration.add_generated",
    "curvature",
    "allocation",
    "calibration.matmul_precision",
    "quantizer.zero_point",
    "quantizer.incoherence",
    "quantizer.incoherence_seed",
)
MOST_NAMED = 3  # settings in one message


def deciding_differences(ours: Settings, theirs: Settings, roles: SettingRoles) -> list[str]:
    """Such as "quantizer.bits 4 → 3", for each deciding setting that both runs have and each entry of a dictionary that
    one has; a run may lack an empty one."""
    empty = {key for settings in (ours, theirs) for key, value in settings.items() if value == "{}"}
    both = ours.keys() & theirs.keys()
    shared = {key for key in (*ours, *theirs) if key in both or (roles.is_entry(key) and key not in empty)}
    return [
        f"{key} {before_after(ours.get(key), theirs.get(key))}"
        for key in dict.fromkeys([*ours, *theirs])
        if key in shared and roles.decides(key) and ours.get(key) != theirs.get(key)
    ]


def config(
    original: FinishedRun, replay: FinishedRun, roles: SettingRoles, results_are_identical: bool
) -> ComparedStep:
    """A setting that only one run has was added or removed by another version of the code, where it has an implicit
    value. Only identical results show that it is the same value."""
    ours, theirs = _without_unused(original), _without_unused(replay)
    differing = deciding_differences(ours, theirs, roles)
    if differing:
        return ComparedStep("config", REQUESTED, False, _first_of(differing))
    one_sided = [*_only_in(ours, theirs, "the original", roles), *_only_in(theirs, ours, "the replay", roles)]
    if one_sided and not results_are_identical:
        return ComparedStep("config", REQUESTED, False, f"not known to be the same: {'; '.join(one_sided)}")
    return ComparedStep("config", REQUESTED, True, "; ".join(one_sided))


def _without_unused(run: FinishedRun) -> Settings:
    """Without the settings of further things that ask for none, and those of experts where the model has none; older
    runs do not have them."""
    has_experts = any(layer.tokens is not None for layer in run.report.layers)
    return {
        key: value
        for key, value in run.settings.items()
        if not (key in FURTHER and value in ("null", "[]", "{}", "none", "0"))
        and (has_experts or key.partition(".")[0] != "experts")
    }


def hashes(original: FinishedRun, replay: FinishedRun) -> list[ComparedStep]:
    return [_hash(name, original, replay) for name in HASHES]


def _only_in(ours: Settings, theirs: Settings, run: str, roles: SettingRoles) -> Iterator[str]:
    found = [f"{key}={value}" for key, value in ours.items() if roles.decides(key) and key not in theirs]
    if found:
        yield f"only {run} has {_first_of(found)}"


def _first_of(texts: list[str]) -> str:
    more = [f"{len(texts) - MOST_NAMED} more"] if len(texts) > MOST_NAMED else []
    return ", ".join([*texts[:MOST_NAMED], *more])


def _hash(name: str, original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    ours, theirs = original.manifest.hashes.get(name), replay.manifest.hashes.get(name)
    if ours == theirs and ours is not None:
        return ComparedStep(name, REQUESTED, True, ours[:16])
    details = [f"sha256 {before_after(ours and ours[:16], theirs and theirs[:16])}"]
    if name in TEXTS:
        details += _text_changes(*(run.manifest.texts.get(TEXTS[name], {}) for run in (original, replay)))
    return ComparedStep(name, REQUESTED, False, "; ".join(details))


def _text_changes(ours: Mapping[str, str], theirs: Mapping[str, str]) -> Iterator[str]:
    """The recorded properties in which two texts differ."""
    for key in TEXT_PROPERTIES:
        if ours.get(key) != theirs.get(key):
            digits = 16 if key.endswith("sha256") else None
            yield f"{key} {before_after(*(value and value[:digits] for value in (ours.get(key), theirs.get(key))))}"
    if "pydoc" in (ours.get("dataset"), theirs.get("dataset")) and ours.get("revision") != theirs.get("revision"):
        yield "the text pydoc is the documentation of the Python that runs"

"""What two runs were asked for: the settings that decide a result, the model and the tokens."""

from collections.abc import Iterator, Mapping

from jointq_cli.records import ASKED, ComparedStep
from jointq_cli.report import number_format as units
from jointq_cli.report.reproduction.finished_run import Evidence
from jointq_cli.setting_rules import SettingRoles

Settings = Mapping[str, str]  # values as text by dotted key, and the option by group

TEXTS = {"calibration tokens": "calibration", "evaluation windows": "evaluation"}
HASHES = ("model", *TEXTS)
TOLD_OF_A_TEXT = ("revision", "text_sha256", "tokenizer_sha256", "num_samples", "seqlen", "strategy", "seed")
MOST_NAMED = 3  # settings that differ


def deciding_differences(ours: Settings, theirs: Settings, roles: SettingRoles) -> list[str]:
    """Such as "quantizer.bits 4 → 3", for each deciding setting that both know."""
    shared = {key for key in (*ours, *theirs) if (key in ours and key in theirs) or roles.is_entry(key)}
    return [
        f"{key} {units.arrow(ours.get(key), theirs.get(key))}"
        for key in dict.fromkeys([*ours, *theirs])
        if key in shared and roles.decides(key) and ours.get(key) != theirs.get(key)
    ]


def config(original: Evidence, replay: Evidence, roles: SettingRoles, proven: bool) -> ComparedStep:
    """proven: all else is identical. Settings that came or went with the code have a value for the other run too;
    whether it is the same one, only the results can tell."""
    ours, theirs = original.settings, replay.settings
    differing = deciding_differences(ours, theirs, roles)
    if differing:
        return ComparedStep("config", ASKED, False, _first_of(differing))
    one_sided = [*_only_in(ours, theirs, "the original", roles), *_only_in(theirs, ours, "the replay", roles)]
    if one_sided and not proven:
        return ComparedStep("config", ASKED, False, f"not known to be the same: {'; '.join(one_sided)}")
    return ComparedStep("config", ASKED, True, "; ".join(one_sided))


def hashes(original: Evidence, replay: Evidence) -> list[ComparedStep]:
    return [_hash(name, original, replay) for name in HASHES]


def _only_in(ours: Settings, theirs: Settings, whose: str, roles: SettingRoles) -> Iterator[str]:
    found = [f"{key}={value}" for key, value in ours.items() if roles.decides(key) and key not in theirs]
    if found:
        yield f"only {whose} has {_first_of(found)}"


def _first_of(told: list[str]) -> str:
    more = [f"{len(told) - MOST_NAMED} more"] if len(told) > MOST_NAMED else []
    return ", ".join([*told[:MOST_NAMED], *more])


def _hash(name: str, original: Evidence, replay: Evidence) -> ComparedStep:
    ours, theirs = original.manifest.hashes.get(name), replay.manifest.hashes.get(name)
    if ours == theirs and ours is not None:
        return ComparedStep(name, ASKED, True, ours[:16])
    told = [f"sha256 {units.arrow(ours and ours[:16], theirs and theirs[:16])}"]
    if name in TEXTS:
        told += _texts(*(run.manifest.texts.get(TEXTS[name], {}) for run in (original, replay)))
    return ComparedStep(name, ASKED, False, "; ".join(told))


def _texts(ours: Mapping[str, str], theirs: Mapping[str, str]) -> Iterator[str]:
    """Why two texts are not the same, as far as is known."""
    for key in TOLD_OF_A_TEXT:
        if ours.get(key) != theirs.get(key):
            digits = 16 if key.endswith("sha256") else None
            yield f"{key} {units.arrow(*(value and value[:digits] for value in (ours.get(key), theirs.get(key))))}"
    if "pydoc" in (ours.get("dataset"), theirs.get("dataset")) and ours.get("revision") != theirs.get("revision"):
        yield "the text pydoc is the documentation of the Python that runs"

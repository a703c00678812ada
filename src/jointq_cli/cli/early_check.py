"""What a command says before torch is imported, which takes seconds: that an override cannot be parsed, that a group
has no such option, or that it has begun. Everything else is checked when the config is composed."""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException

from jointq_cli.cli import config_files
from jointq_cli.cli.config_errors import ConfigErrorFormatter

SWEEP_OPTIONS = ("-m", "--multirun")


def check_early(command: str, overrides: list[str], options: Sequence[str]) -> None:
    """Raises JointqError, or prints the first line.

    With options that add config files, such as --config-dir, or that print the config, overrides are only parsed.
    """
    plain = all(word in SWEEP_OPTIONS for word in options) and not any("searchpath" in word for word in overrides)
    try:
        chosen = _choices(overrides)
        for group, option in chosen.items() if plain else ():
            known = [] if group.startswith("hydra/") else list(config_files.options(group))  # Hydra's plugins add more
            if known and option not in known:
                raise MissingConfigException("", f"{group}/{option}", known)
    except HydraException as error:
        raise ConfigErrorFormatter([], {}, overrides).format(error) from error
    if plain:
        recipe = (config_files.default_options(command) | chosen).get("recipe", "")
        words = [
            word for word in overrides if not word.startswith(("recipe=", "hydra."))
        ]  # a run has its recipe's name
        print(
            f"{' '.join(filter(None, ['jointq', command, recipe, *words]))}: loading PyTorch and transformers",
            flush=True,
        )


def _choices(overrides: list[str]) -> dict[str, str]:
    """The overrides GROUP=OPTION of one option each. Raises HydraException for one that cannot be parsed."""
    values = {word.key_or_group: word.value() for word in OverridesParser.create().parse_overrides(overrides)}
    return {group: value for group, value in values.items() if isinstance(value, str)}

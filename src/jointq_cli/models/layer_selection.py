"""Which linear layers are quantised: the rules of the reference implementation (OneComp), in its order. And which of
them have settings of their own.

Routers of experts are small, and an error of theirs sends tokens to other experts: they are left out by default. Layers
whose weight the model uses without calling them are left out always, since no hook sees what the weight multiplies.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from jointq_cli.errors import ConfigError
from jointq_cli.models.k_mixes import MIXES
from jointq_cli.models.layer_ref import LayerRef
from jointq_cli.setting_rules import check_settings, setting, shown

KEEP = "keep"  # in `overrides`, of layers that are not quantised
REGEX = "re:"  # before a pattern that is a regular expression, as in compressed-tensors

# A part of the name of a router: mlp.gate, block_sparse_moe.router.layer, mlp.shared_expert_gate. The gate of a gated
# MLP may have the same name, but it has more outputs than inputs.
_ROUTER = re.compile(r"(^|\.)(router|gate|router_gate|moe_gate|shared_expert_gate)(\.|$)")


def find_routers(linear: Mapping[str, LayerRef]) -> set[str]:
    """Those of the linear layers (by name) that choose or weight experts."""
    return {name for name, layer in linear.items() if _ROUTER.search(name) and layer.out_features < layer.in_features}


def find_uncalled(model: nn.Module) -> set[str]:
    """The linear layers (by name) whose weight the model uses without calling the layer: dt_proj in the mixers of
    Mamba-1, Falcon-Mamba and Jamba, which are known by their A_log."""
    mixers = [name for name, part in model.named_modules() if hasattr(part, "dt_proj") and hasattr(part, "A_log")]
    return {f"{name}.dt_proj" for name in mixers}


@dataclass(frozen=True)
class LayerSelection:
    """Filters over the names of a model's linear layers, applied in the order of the fields.

    A *name* must match a layer's full name or its last components (`lm_head`, `mlp.down_proj`); a *keyword* may occur
    anywhere in it. Empty includes select everything, but routers are included by a name only. `num_layers` keeps the
    first of the remaining layers.

    `overrides`: settings of the quantizer, or KEEP, for those of the remaining layers that a pattern matches: a name, a
    name with the wildcards of a shell, or REGEX and a regular expression that matches the beginning of a full name.
    `mix`: llama.cpp's choice of a K grid for each layer that no override decides.
    """

    include_layer_names: list[str] = setting([])
    include_layer_keywords: list[str] = setting([])
    exclude_layer_names: list[str] = setting(["lm_head"])
    exclude_layer_keywords: list[str] = setting([])
    num_layers: int | None = setting(None, least=1, null="for all")
    overrides: dict[str, Any] = setting({})
    mix: str | None = setting(None, choices=tuple(MIXES), null="for the quantizer's own grid")

    def __post_init__(self) -> None:
        check_settings(self, "layers")
        for pattern, settings in self.overrides.items():
            if not (isinstance(settings, dict) or settings == KEEP):
                rule = f"must be settings of the quantizer, such as {{bits: 8}}, or {KEEP}"
                raise ConfigError(f"{override_key(pattern)}={shown(settings)}: {rule}")
            _check_pattern(pattern)

    def select(
        self, names: list[str], known: list[str], routers: Collection[str] = (), uncalled: Collection[str] = ()
    ) -> list[str]:
        """The names to quantise, in the order of `names`.

        names: linear layers inside the decoder blocks. known: every linear layer of the model; patterns are checked
        against these, so that the head may be excluded although it is not in a block. routers: left out unless
        included by name. uncalled: left out always.
        Raises ConfigError for a pattern that matches no layer, for one that includes uncalled layers alone, and when no
        layer is left.
        """
        self._refuse_unmatched_patterns(known)
        self._refuse_uncalled(names, uncalled)
        chosen = [name for name in names if name not in uncalled]
        if self.include_layer_names:
            chosen = [name for name in chosen if _named(name, self.include_layer_names)]
        else:
            chosen = [name for name in chosen if name not in routers]
        if self.include_layer_keywords:
            chosen = [name for name in chosen if _contains(name, self.include_layer_keywords)]
        chosen = [name for name in chosen if not _named(name, self.exclude_layer_names)]
        chosen = [name for name in chosen if not _contains(name, self.exclude_layer_keywords)]
        if self.num_layers is not None:
            chosen = chosen[: self.num_layers]
        if not chosen:
            raise ConfigError(f"layers: the rules select none of the model's {len(names)} linear layers")
        return chosen

    def match_overrides(self, names: Collection[str]) -> dict[str, str]:
        """The first pattern of `overrides` that matches a layer, by the layer's name, for those that one matches.

        names: what `select` returned. Raises ConfigError for a pattern that decides none.
        """
        found: dict[str, str] = {}
        for pattern in self.overrides:
            meant = [name for name in names if _matches(name, pattern)]
            if not meant:
                raise ConfigError(f"{override_key(pattern)}: matches none of the {len(names)} layers to quantise")
            own = [name for name in meant if name not in found]
            if not own:
                earlier = ", ".join(dict.fromkeys(found[name] for name in meant))
                raise ConfigError(
                    f"{override_key(pattern)}: the first match decides, and earlier patterns ({earlier}) have all that "
                    "it matches; put it before them"
                )
            found |= dict.fromkeys(own, pattern)
        return found

    def _refuse_unmatched_patterns(self, known: list[str]) -> None:
        for key, matches in (
            ("include_layer_names", _named),
            ("include_layer_keywords", _contains),
            ("exclude_layer_names", _named),
            ("exclude_layer_keywords", _contains),
        ):
            for pattern in getattr(self, key):
                is_default = (key, pattern) == ("exclude_layer_names", "lm_head")  # some heads have other names
                if not is_default and not any(matches(name, [pattern]) for name in known):
                    raise ConfigError(
                        f"layers.{key}: {pattern!r} matches none of the model's {len(known)} linear layers"
                    )

    def _refuse_uncalled(self, names: list[str], uncalled: Collection[str]) -> None:
        includes = (("include_layer_names", _named), ("include_layer_keywords", _contains))
        for key, matches in includes:
            for pattern in getattr(self, key):
                found = [name for name in names if matches(name, [pattern])]
                if found and set(found) <= set(uncalled):
                    raise ConfigError(
                        f"layers.{key}: {pattern!r} asks for {found[0]}, which cannot be quantised: the model uses its "
                        "weight without calling the layer, so that its inputs cannot be seen"
                    )


def _named(name: str, patterns: list[str]) -> bool:
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def _contains(name: str, keywords: list[str]) -> bool:
    return any(keyword in name for keyword in keywords)


def override_key(pattern: str) -> str:
    return f"layers.overrides.{pattern}"


def _check_pattern(pattern: str) -> None:
    if pattern.startswith(REGEX):
        try:
            re.compile(pattern.removeprefix(REGEX))
        except re.error as error:
            raise ConfigError(f"{override_key(pattern)}: not a regular expression: {error}") from error


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith(REGEX):
        return re.match(pattern.removeprefix(REGEX), name) is not None
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")

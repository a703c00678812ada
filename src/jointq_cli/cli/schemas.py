"""The recipes' dataclasses as Hydra needs them: the same names and fields, but mutable and without defaults.

Mutable, since OmegaConf does not let yaml or overrides set the fields of a frozen one. Without defaults, since a key
that a config file lacks, or has as ???, must be reported as missing. They are attributes of this module, created on
access, so that a launcher can send a config to another process: there pickle finds them under the same name.
"""

import dataclasses
import functools
import typing
from typing import Any


@functools.cache
def mutable_schema(schema: type[Any]) -> type[Any]:
    hints = typing.get_type_hints(schema)
    fields = [(field.name, _field_type(hints[field.name])) for field in dataclasses.fields(schema)]
    bases = tuple(mutable_schema(base) for base in schema.__bases__ if dataclasses.is_dataclass(base))
    return dataclasses.make_dataclass(schema.__name__, fields, bases=bases, namespace={"__module__": __name__})


def __getattr__(name: str) -> type[Any]:
    if name.startswith("__"):  # the import system looks for some in every module
        raise AttributeError(name)
    from jointq_cli.recipe import schemas  # brings torch, which shell completion does without

    for schema in schemas():
        for known in schema.__mro__:
            if known.__name__ == name and dataclasses.is_dataclass(known):
                return mutable_schema(known)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def _field_type(annotation: Any) -> Any:
    nested = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    return mutable_schema(annotation) if nested else annotation

"""What a checkpoint says of its origin: the key `jointq` of its config.json.

The key is the first one of the file and on a line of its own. Without that line the file has the bytes of the model
that was quantised, by which runs of versions that write the key, another one or none are compared.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any

from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.sources import looks_local
from jointq_cli.system.files import encoded, file_hashes, write_text_atomically

KEY = "jointq"
SOURCE_LAYOUT = "dequantized"  # below it: the layout that the weights were published in
CONFIG = "config.json"
_START = re.compile(rf'\s*\{{\n  "{KEY}": ')


def write_identity(directory: Path, identity: Mapping[str, str]) -> None:
    """Puts `identity` into the config.json of a checkpoint, in the place of that of the model that it was made from.

    A format without config.json stays as it is.
    """
    file = directory / CONFIG
    if file.is_file():
        head, brace, rest = without_identity(file.read_bytes().decode()).partition("{")
        line = f'\n  "{KEY}": {json.dumps(identity, ensure_ascii=False)},'
        write_text_atomically(file, head + brace + line + rest)


def without_identity(config: str) -> str:
    """The text of a config.json without the key. Raises JSONDecodeError."""
    if found := _START.match(config):
        _, end = JSONDecoder().raw_decode(config, found.end())
        config = config[: config.index("{") + 1] + config[end + 1 :]
    keys: dict[str, Any] = json.loads(config)
    if KEY not in keys:
        return config
    rest = {name: value for name, value in keys.items() if name != KEY}  # written again by transformers
    return json.dumps(rest, indent=2, ensure_ascii=False) + "\n"


def result_hashes(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """sha256 of each file by its path below `root`; of a config.json that of its bytes without the key."""
    listed = list(files)
    hashes = file_hashes(root, listed)
    for file in (file for file in listed if file.name == CONFIG):
        try:
            text = encoded(without_identity(file.read_bytes().decode()))
        except (JSONDecodeError, UnicodeDecodeError):  # was changed: no hash of a run is that of its bytes
            continue
        hashes[file.relative_to(root).as_posix()] = hashlib.sha256(text).hexdigest()
    return hashes


def quantised_by(checkpoint: Checkpoint) -> str:
    """How jointq has quantised these weights, as a line; "" where nothing shows that it has. A rotated model is not."""
    own = checkpoint.config.get(KEY)
    if isinstance(own, dict):
        return str(own.get("quantizer", ""))
    run = checkpoint.directory.absolute().parent  # of a version that wrote no key
    is_run = checkpoint.directory.name == "checkpoint" and (run / "report.json").is_file() and (run / "codes").is_dir()
    return f"the run {run}" if is_run else ""


def dequantised_from(checkpoint: Checkpoint) -> str:
    """The layout from which jointq has dequantised these weights before anything else; "" for none."""
    own = checkpoint.config.get(KEY)
    return str(own.get(SOURCE_LAYOUT, "")) if isinstance(own, dict) else ""


def base_model(path: str, config: Mapping[str, Any]) -> str:
    """The name of a model as a hub id, where it has one. path: as in model.path; config: of its config.json.

    A model that jointq has made says itself what it was made from. A local one is called by its directory, or by the
    hub id in whose cache it lies.
    """
    own = config.get(KEY)
    if isinstance(own, dict) and isinstance(own.get("base_model"), str):
        return str(own["base_model"])
    local = Path(path).expanduser()
    if path == "pocket" or not (looks_local(path) or local.exists()):
        return path
    cached = next((part for part in local.parts if part.startswith("models--")), "")
    return "/".join(cached.split("--")[1:]) or local.absolute().name.removesuffix(".gguf")

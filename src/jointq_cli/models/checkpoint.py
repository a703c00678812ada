"""A Hugging Face checkpoint directory as tensors by name, read a few at a time.

Knows safetensors files, their index, and the config and tokenizer files beside them. Knows nothing of modules, and
loads no pickle.
"""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from jointq_cli.errors import ModelError, NumericsError
from jointq_cli.system.files import check_utf8, encoded, file_hash

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# The files of a model other than its weights. A README is left out: it describes the original model.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")

NOT_COMPANIONS = (INDEX, PICKLES[1], "adapter_config.json")  # match the patterns above, but belong to other weights
DTYPES = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
QUANTISED = "quantization_config"
PACKED_KEYS = (QUANTISED, "quantization")  # of a packed checkpoint's config.json; the second is MLX's
SCALES = ("_scale_inv", "_scale")  # at the end of a weight's name: block-wise fp8, as DeepSeek's; compressed-tensors
PACKED = ".qweight"  # of GPTQ and AWQ, whose older checkpoints have their settings in a file of their own
WRAPPERS = ("_orig_mod.", "base_model.model.", "base_model.")  # of torch.compile and of PEFT
CHUNK = 1 << 24  # bytes compared at a time


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as described by the header of its safetensors file."""

    file: Path
    dtype: str  # safetensors' name, such as BF16
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    nbytes: int


class Checkpoint:
    """A directory with config.json and safetensors weights.

    The constructor reads only the config and the headers of the weight files. Raises ModelError when a file is missing,
    incomplete or damaged, and for a quantised checkpoint.
    """

    def __init__(self, directory: Path, content_hash: str | None = None, *, packed: bool = False) -> None:
        """content_hash: where it is known already; otherwise the property of that name reads every weight. packed:
        whether the checkpoint may be a quantised one, whose packed tensors the caller understands."""
        check_utf8(directory)
        self.directory = directory
        if content_hash is not None:
            self.content_hash = content_hash
        self.config = _read_config(directory)
        self.tensors, self._wrapper = _unwrapped(_read_headers(directory))
        if not packed and (sign := _sign_of_quantisation(self.config, self.tensors)):
            raise ModelError(f"{directory}: is quantised already ({sign})")

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors in their stored dtypes, as copies on the CPU.

        Raises ModelError for a name that the checkpoint lacks and for an unsupported dtype.
        """
        return {name: self._read_one(name) for name in names}

    def same_bytes(self, other: "Checkpoint", name: str) -> bool:
        """Whether tensor `name` has the same dtype, shape and bytes in both; reads CHUNK bytes at a time."""
        ours, theirs = self.tensors[name], other.tensors[name]
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return False
        with ours.file.open("rb") as one, theirs.file.open("rb") as two:
            one.seek(ours.offset)
            two.seek(theirs.offset)
            sizes = [min(CHUNK, ours.nbytes - done) for done in range(0, ours.nbytes, CHUNK)]
            return all(one.read(size) == two.read(size) for size in sizes)

    @property
    def warnings(self) -> list[str]:
        """What a user should know about the choice of files, and about names and dtypes of tensors."""
        found = []
        if all((self.directory / name).is_file() for name in (SINGLE, INDEX)):
            found.append(f"{self.directory}: has both {SINGLE} and {INDEX}; {SINGLE} is read, as transformers does")
        if self._wrapper:
            found.append(f"{self.directory}: all names of tensors begin with {self._wrapper}; read without it")
        if double := [name for name, info in self.tensors.items() if info.dtype == "F64"]:
            found.append(
                f"{self.directory}: {len(double)} of {len(self.tensors)} tensors are float64, {double[0]} first; "
                "they are rounded to the dtype that the model is run in"
            )
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    @cached_property
    def content_hash(self) -> str:
        """sha256 over config.json and every weight file: the model's identity, independent of its path."""
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(file_hash, self.hashed_files))
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def known_hash(self) -> str | None:
        """`content_hash`, or None before its first computation. Reads no weight."""
        return vars(self).get("content_hash")

    @property
    def hashed_files(self) -> list[Path]:
        """The files that `content_hash` covers."""
        return [self.directory / "config.json", *sorted({info.file for info in self.tensors.values()})]

    @cached_property
    def code_hash(self) -> str:
        """sha256 over names and bytes of the Python files that come with the model."""
        return _named_hash(sorted(self.directory.glob("*.py")))

    def companions(self, *, code: bool) -> list[Path]:
        """The model's files other than its weights; with `code` also its Python files (trust_remote_code)."""
        patterns = (*COMPANIONS, "*.py") if code else COMPANIONS
        found = {file for pattern in patterns for file in self.directory.glob(pattern) if file.is_file()}
        return sorted(file for file in found if file.name not in NOT_COMPANIONS)

    def companions_hash(self, *, code: bool) -> str:
        """sha256 over names and bytes of `companions`."""
        return _named_hash(self.companions(code=code))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of most of the weights."""
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            if info.dtype in ("F32", "BF16", "F16"):
                sizes[info.dtype] += math.prod(info.shape)
        return DTYPES[sizes.most_common(1)[0][0]] if sizes else torch.float32

    @cached_property
    def parameters(self) -> int:
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @cached_property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in {info.file for info in self.tensors.values()})

    def _read_one(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise ModelError(f"{self.directory}: holds no tensor {name}, which its config.json asks for")
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise ModelError(f"{info.file}: tensor {name} has dtype {info.dtype}, which is not supported")
        # Read, not memory-mapped: mapped pages would count as resident memory in addition to the copy.
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        with info.file.open("rb") as file:
            file.seek(info.offset)
            if file.readinto(raw.numpy().data) != info.nbytes:
                raise ModelError(f"{info.file}: ends before tensor {name} does; half-downloaded?")
        return raw.view(DTYPES[info.dtype]).reshape(info.shape)


def write_index(directory: Path, shards: list[Path]) -> None:
    """Writes model.safetensors.index.json for `shards`, safetensors files in `directory`."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        for name, info in _read_header(shard).items():
            weight_map[name] = shard.name
            total += info.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Checkpoint, target: Path, *, code: bool) -> None:
    """Copies `companions`: config, generation config, tokenizer and the like; with `code` also Python files."""
    for file in source.companions(code=code):
        shutil.copyfile(file, target / file.name)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(f"model.path={directory}: no such directory")
    if not path.is_file():
        raise ModelError(f"{path}: missing, so this is no Hugging Face checkpoint{_meant_instead(directory)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return config


def _meant_instead(directory: Path) -> str:
    """What to do with a directory that is known to be something else."""
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        return f"; {adapter.name} makes it a LoRA adapter: merge it into its model first (merge_and_unload of PEFT)"
    if (directory / "checkpoint" / "config.json").is_file():
        return f"; of a run of jointq, name the checkpoint: {directory / 'checkpoint'}"
    return ""


def _unwrapped(tensors: dict[str, TensorInfo]) -> tuple[dict[str, TensorInfo], str]:
    """The tensors without the wrappers that all of their names begin with, and these wrappers."""
    wrapper = ""
    while found := next((one for one in WRAPPERS if tensors and all(name.startswith(one) for name in tensors)), ""):
        tensors = {name.removeprefix(found): info for name, info in tensors.items()}
        wrapper += found
    return tensors, wrapper


def _sign_of_quantisation(config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """What shows that a checkpoint is quantised: a key of its config.json, at any level, or names of tensors."""
    if packed := next((name for name in tensors if name.endswith(PACKED)), None):
        return f"by GPTQ or AWQ: it holds {packed}"
    mlx = (name.removesuffix("weight") + "scales" for name in tensors if name.endswith(".weight"))
    if isinstance(config.get("quantization"), dict) or (packed := next((one for one in mlx if one in tensors), None)):
        return f"by MLX: it holds {packed}" if packed else "by MLX: its config.json has a quantization"
    if key := _key_of_quantisation(config):
        return f"its config.json has a {key}"
    scales = (f"{name}{ending}" for name in tensors for ending in SCALES)
    scale = next((scale for scale in scales if scale in tensors), None)
    return scale and f"it holds a {scale} beside a weight"


def _key_of_quantisation(config: dict[str, Any]) -> str | None:
    """The dotted name of the first quantization_config that is not null."""
    if config.get(QUANTISED) is not None:
        return QUANTISED
    for name, value in config.items():
        if isinstance(value, dict) and (key := _key_of_quantisation(value)):
            return f"{name}.{key}"
    return None


def _read_headers(directory: Path) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(directory):
        tensors.update(_read_header(file))
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, chosen in the order of transformers: a single file before an index."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not a safetensors index ({error})") from error
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ModelError(
                f"{index}: names {len(missing)} of {len(names)} shards that are missing, {missing[0]} first; "
                "half-downloaded?"
            )
        return [directory / name for name in names]
    if any((directory / name).exists() for name in PICKLES):
        raise ModelError(f"{directory}: has its weights as pickle only, which is never loaded; convert to safetensors")
    raise ModelError(f"{directory}: has neither {SINGLE} nor {INDEX}")


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors that the file's header lists."""
    try:
        with safe_open(file, framework="pt"):  # raises for a file that is truncated or malformed
            pass
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: damaged or half-downloaded ({error})") from error
    header.pop("__metadata__", None)
    return {
        name: TensorInfo(file, entry["dtype"], tuple(entry["shape"]), 8 + size + start, stop - start)
        for name, entry in header.items()
        for start, stop in [entry["data_offsets"]]
    }


def require_finite(name: str, tensor: torch.Tensor, place: Path) -> None:
    """Raises NumericsError for a tensor with NaN or Inf. place: its file or directory, for the message."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:  # torch has no isfinite for 8 bits
        return
    # A million values at a time: the mask of an entire embedding matrix would set the run's peak memory.
    bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.flatten().split(1 << 20))
    if bad:
        raise NumericsError(f"{place}: tensor {name} holds {bad} values that are NaN or Inf")


def _named_hash(files: Iterable[Path]) -> str:
    """sha256 over names and bytes of files."""
    return hashlib.sha256(encoded("".join(file.name + file_hash(file) for file in files))).hexdigest()

"""llama.cpp by its C functions, which the shared object of the package xllamacpp exports.

The package's own Python functions generate text and give no logits of a prompt. The declarations are those of llama.h
at llama.cpp's build 11549. Structs are passed by value and grow from build to build, so no other version is called.
"""

import importlib.util
from collections import deque
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointq_cli.errors import ModelError
from jointq_cli.evaluation.engine_model import EngineModel

PACKAGE = "xllamacpp"
VERSION = "2026.10.11549"
TOKENS_AT_ONCE = 512  # of a window, whose intermediate results are in memory together
_ERROR = 4  # llama.cpp's level of messages
_DECLARATIONS = """
struct llama_model_params {
  void *devices; void *tensor_buft_overrides; int32_t n_gpu_layers; int split_mode; int load_mode; int lazy_mode;
  int32_t main_gpu; const float *tensor_split; void *progress_callback; void *progress_callback_user_data;
  void *kv_overrides; bool vocab_only; bool check_tensors; bool use_extra_bufts; bool no_host; bool no_alloc;
  bool load_mtp; };
struct llama_context_params {
  uint32_t n_ctx; uint32_t n_batch; uint32_t n_ubatch; uint32_t n_seq_max; uint32_t n_rs_seq; uint32_t n_outputs_max;
  uint32_t n_outputs_max_per_seq; int32_t n_threads; int32_t n_threads_batch; int ctx_type; int rope_scaling_type;
  int pooling_type; int attention_type; int flash_attn_type; float rope_freq_base; float rope_freq_scale;
  float yarn_ext_factor; float yarn_attn_factor; float yarn_beta_fast; float yarn_beta_slow; uint32_t yarn_orig_ctx;
  float defrag_thold; void *cb_eval; void *cb_eval_user_data; int type_k; int type_v; size_t moe_cache_size;
  void *abort_callback; void *abort_callback_data; bool embeddings; bool offload_kqv; bool no_perf; bool op_offload;
  bool swa_full; bool kv_unified; void *samplers; size_t n_samplers; void *ctx_other; };
struct llama_batch {
  int32_t n_tokens; int32_t *token; float *embd; int32_t *pos; int32_t *n_seq_id; int32_t **seq_id; int8_t *logits; };
void llama_backend_init(void);
void llama_log_set(void (*log_callback)(int, const char *, void *), void *user_data);
struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
void *llama_model_load_from_file(const char *path, struct llama_model_params params);
void llama_model_free(void *model);
void *llama_init_from_model(void *model, struct llama_context_params params);
void llama_free(void *context);
void *llama_model_get_vocab(void *model);
int32_t llama_vocab_n_tokens(void *vocab);
int32_t llama_tokenize(void *vocab, const char *text, int32_t length, int32_t *tokens, int32_t most, bool add_special,
  bool parse_special);
void *llama_get_memory(void *context);
void llama_memory_clear(void *memory, bool data);
int32_t llama_decode(void *context, struct llama_batch batch);
float *llama_get_logits(void *context);
"""
# Default values of fields all over the structs, the last ones among them: other values mean another layout.
_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "main_gpu": 0, "use_extra_bufts": 1, "load_mtp": 0}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "flash_attn_type": -1,
    "defrag_thold": -1,
    "type_k": 1,
    "type_v": 1,
    "moe_cache_size": 0,
    "offload_kqv": 1,
    "op_offload": 1,
    "n_samplers": 0,
}


@dataclass(frozen=True, eq=False)
class _Library:
    """The C functions, silent. errors: the last messages of failures."""

    ffi: Any
    functions: Any
    errors: deque[str]
    on_message: Any  # the callback, which C holds no reference to


@cache
def _library() -> _Library:
    """Raises ModelError where it is another version, or its structs are laid out otherwise."""
    from cffi import FFI

    if version(PACKAGE) != VERSION:
        raise ModelError(f"{PACKAGE} {version(PACKAGE)} is installed; pip install {PACKAGE}=={VERSION}")
    ffi: Any = FFI()
    ffi.cdef(_DECLARATIONS)
    functions = ffi.dlopen(str(_shared_object()))
    for found, expected in (
        (functions.llama_model_default_params(), _MODEL_DEFAULTS),
        (functions.llama_context_default_params(), _CONTEXT_DEFAULTS),
    ):
        different = [name for name, value in expected.items() if getattr(found, name) != value]
        if different:
            raise ModelError(f"{PACKAGE} {VERSION}: {different[0]} is not where llama.h has it")
    errors: deque[str] = deque(maxlen=4)

    def keep(level: int, text: Any, _: Any) -> None:
        if level >= _ERROR and text != ffi.NULL:
            errors.append(ffi.string(text).decode(errors="replace").strip())

    on_message = ffi.callback("void(int, const char *, void *)", keep)
    functions.llama_log_set(on_message, ffi.NULL)
    functions.llama_backend_init()
    return _Library(ffi, functions, errors, on_message)


def _shared_object() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    folders = found.submodule_search_locations if found else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob(f"{PACKAGE}*.so"))]
    if not files:
        raise ModelError(f"{PACKAGE} {VERSION} has no shared object on this system")
    return files[0]


class LlamaCppModel(EngineModel):
    """A GGUF file in llama.cpp. Its key-value cache is in float16, as `llama-server` has it by default."""

    def __init__(self, file: Path) -> None:
        if file.is_dir():
            raise ModelError("it is a directory, and llama.cpp opens one GGUF file")
        self._library = _library()
        c, self._context, self._tokens = self._library.functions, None, 0
        self._library.errors.clear()
        self._model = c.llama_model_load_from_file(str(file).encode(), c.llama_model_default_params())
        self._require(self._model != self._library.ffi.NULL)
        self._vocab = c.llama_model_get_vocab(self._model)
        self.vocabulary = int(c.llama_vocab_n_tokens(self._vocab))

    def log_probabilities(self, ids: Tensor) -> Tensor:
        c, ffi, count = self._library.functions, self._library.ffi, len(ids)
        if count != self._tokens:
            self._open_context(count)
        c.llama_memory_clear(c.llama_get_memory(self._context), True)
        tokens, wanted = ffi.new("int32_t[]", ids.tolist()), ffi.new("int8_t[]", [1] * count)
        # Without positions and sequences, tokens follow each other in one.
        batch = ffi.new("struct llama_batch *", {"n_tokens": count, "token": tokens, "logits": wanted})
        self._require(c.llama_decode(self._context, batch[0]) == 0)
        logits = ffi.buffer(c.llama_get_logits(self._context), count * self.vocabulary * 4)
        return torch.log_softmax(torch.frombuffer(logits, dtype=torch.float32).view(count, -1), dim=-1)

    def tokenize(self, text: str) -> list[int]:
        """As transformers does it, names of special tokens in the text are these tokens."""
        c, raw = self._library.functions, text.encode()
        most = len(raw) + 8  # no token is shorter than a byte, but for a space that some tokenizers put first
        ids = self._library.ffi.new("int32_t[]", most)
        count = c.llama_tokenize(self._vocab, raw, len(raw), ids, most, False, True)
        self._require(count >= 0)
        return list(ids[0:count])

    def close(self) -> None:
        self._close_context()
        self._library.functions.llama_model_free(self._model)

    def _open_context(self, tokens: int) -> None:
        self._close_context()
        c = self._library.functions
        settings = c.llama_context_default_params()
        settings.n_ctx = settings.n_batch = tokens
        settings.n_ubatch = min(tokens, TOKENS_AT_ONCE)
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        context = c.llama_init_from_model(self._model, settings)
        self._require(context != self._library.ffi.NULL)
        self._context, self._tokens = context, tokens

    def _close_context(self) -> None:
        if self._context is not None:
            self._library.functions.llama_free(self._context)
            self._context, self._tokens = None, 0

    def _require(self, done: bool) -> None:
        if not done:
            raise ModelError("; ".join(self._library.errors) or "llama.cpp gives no reason")

"""GGUF files: what transformers and llama.cpp make of them, by architecture, and what is refused before any work."""

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_cases import Chosen, Rounding, write_quantized
from gguf import GGUFReader, LlamaFileType
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from jointq_cli.errors import ConfigError, ModelError
from jointq_cli.evaluation.engines import ENGINES, opened
from jointq_cli.formats import KQuantWeight, StoredWeight
from jointq_cli.formats.export import QuantizedModel, exporter_of
from jointq_cli.formats.export.gguf import GgufExporter
from jointq_cli.formats.export.gguf_tokenizer import read_tokenizer
from jointq_cli.formats.export.verification import verified
from jointq_cli.formats.k_quant import K_GRIDS, KGrid
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.gguf_file import convert_gguf
from jointq_cli.models.sources import BUNDLED
from jointq_cli.quantization.quantizers import RTN

VOCABULARY = json.loads((BUNDLED / "config.json").read_text())["vocab_size"]
Q4_0 = RTN(bits=4, group_size=32, symmetric=True)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
MODELS = {
    "llama": {},
    "llama_tied": {},
    "llama_bias": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma3": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "phi3": {"sliding_window": None},
}


def write_model(directory: Path, family: str, rounding: Rounding | Chosen = Q4_0, **changes: object) -> QuantizedModel:
    """A tiny model with the bundled model's tokenizer, which is one that llama.cpp knows."""
    settings = {"vocab_size": VOCABULARY, "norm_spread": 0.2, **MODELS[family], **changes}
    model = write_quantized(directory, family, rounding, **settings)
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copyfile(file, directory / file.name)
    return model


def exported(tmp_path: Path, model: QuantizedModel, exporter: GgufExporter) -> Path:
    target = tmp_path / "export"
    target.mkdir()
    assert not [note for note in exporter.check(model) if "sliding" in note]
    exporter.write(model, target)
    return target


@pytest.mark.parametrize("family", MODELS)
def test_every_tensor_is_read_back_and_llama_cpp_computes_the_same(tmp_path: Path, family: str) -> None:
    model = write_model(tmp_path / "model", family)
    exporter = GgufExporter(embeddings="bf16")
    target = exported(tmp_path, model, exporter)
    record = verified(model, exporter, target)
    assert record.worst_error == 0
    assert record.bits_per_weight == 4.5
    assert all(error < 1e-6 for error in record.rounded.values())  # Gemma's norms, which are stored plus 1
    if not ENGINES["llama.cpp"].is_installed:
        pytest.skip("xllamacpp is not installed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "def f(x):\n    return [x, 12345, 'naïve', \"don't\"]  # 漢字 \U0001f980 \t end"
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    with opened("llama.cpp", target / exporter.file_name(model)) as engine:
        assert engine.tokenize(text) == ids.tolist()
        found = engine.log_probabilities(ids)
    expected = torch.log_softmax(loaded(ids[None]).logits[0], dim=-1)
    assert torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean") < 0.01


@pytest.mark.parametrize("family", ["llama_tied", "mistral", "qwen2"])
def test_transformers_reads_the_same_weights(tmp_path: Path, family: str) -> None:
    """Of the other architectures its reader drops keys or tensors."""
    model = write_model(tmp_path / "model", family)
    target = exported(tmp_path, model, GgufExporter(embeddings="bf16"))
    (tmp_path / "converted").mkdir()
    convert_gguf(target / "model.gguf", tmp_path / "converted")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "converted"))
    expected = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    ids = torch.arange(32)[None]
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("rtn", "kind", "bits"),
    [
        (RTN(bits=4, group_size=64), "Q4_1", 5.0),
        (RTN(bits=5, group_size=32, symmetric=True), "Q5_0", 5.5),
        (RTN(bits=5, group_size=None), "Q5_1", 6.0),
        (RTN(bits=8, group_size=32, symmetric=True), "Q8_0", 8.5),
        (RTN(bits=6, group_size=32), "Q8_0", 8.5),
    ],
)
def test_the_grid_chooses_the_type(tmp_path: Path, rtn: RTN, kind: str, bits: float) -> None:
    model = write_model(tmp_path / "model", "llama", rtn)
    exporter = GgufExporter()
    target = exported(tmp_path, model, exporter)
    record = verified(model, exporter, target)
    assert record.bits_per_weight == bits
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(target / exporter.file_name(model)).tensors}
    assert kinds["blk.1.ffn_up.weight"] == kind
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"


WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}


def k_mix(base: str, wider: str | None = None) -> Chosen:
    """`wider` for what computes attention's values, as llama.cpp's mixes have it; Q5_0 for one layer."""

    def chosen(name: str) -> Rounding:
        if name.endswith("down_proj") and ".0." in name:
            return RTN(bits=5, group_size=32, symmetric=True)
        return K_GRIDS[wider if wider and name.endswith(("v_proj", "qkv_proj")) else base]

    return chosen


def k_model(directory: Path, family: str, chosen: Chosen, **changes: object) -> QuantizedModel:
    return write_model(directory, family, chosen, **{**WIDE, **changes})


@pytest.mark.parametrize(
    ("base", "wider", "named"),
    [
        ("q2_k", None, "q2_k_s"),
        ("q2_k", "q4_k", "q2_k_s"),
        ("q2_k", "q3_k", "q2_k"),
        ("q3_k", None, "q3_k_s"),
        ("q3_k", "q4_k", "q3_k_m"),
        ("q3_k", "q5_k", "q3_k_l"),
        ("q4_k", None, "q4_k_s"),
        ("q4_k", "q5_k", "q4_k_s"),
        ("q4_k", "q6_k", "q4_k_m"),
        ("q5_k", None, "q5_k_s"),
        ("q5_k", "q6_k", "q5_k_m"),
        ("q6_k", None, "q6_k"),
    ],
)
def test_a_mix_is_named_as_llama_quantize_does(base: str, wider: str | None, named: str) -> None:
    names = [
        f"model.layers.{layer}.{part}_proj" for layer in range(2) for part in ("self_attn.v", "mlp.up", "mlp.down")
    ]
    chosen = {name: k_mix(base, wider)(name) for name in names}
    meta = torch.device("meta")
    forms = {name: KQuantWeight.empty(8, 256, how, meta) for name, how in chosen.items() if isinstance(how, KGrid)}
    assert len(forms) == 5
    exporter = GgufExporter()
    model = QuantizedModel(Checkpoint(BUNDLED), forms, [], forms.__getitem__)
    assert exporter.file_name(model) == f"model-{named}.gguf"
    assert exporter.file_type(model) == LlamaFileType[f"MOSTLY_{named.upper()}"]


@pytest.mark.parametrize(
    ("family", "base", "wider", "named"),
    [
        ("llama", "q4_k", "q6_k", "q4_k_m"),
        ("phi3", "q5_k", "q6_k", "q5_k_m"),
        ("mistral", "q2_k", "q3_k", "q2_k"),
    ],
)
def test_a_mix_of_k_quants_and_uniform_layers(tmp_path: Path, family: str, base: str, wider: str, named: str) -> None:
    model = k_model(tmp_path / "model", family, k_mix(base, wider))
    exporter = GgufExporter(embeddings="q8_0")
    target = exported(tmp_path, model, exporter)
    record = verified(model, exporter, target)
    file = f"model-{named}.gguf"
    assert record.worst_error == 0
    assert file in record.files
    assert file in record.commands["llama.cpp"]
    stored = sum(form.stored_bits for name, form in model.forms.items() if "layers.0.mlp.down" not in name)
    sizes = [form.shape[0] * form.shape[1] for form in model.forms.values()]
    assert record.bits_per_weight == (stored + 5.5 * 256 * 512) / sum(sizes)
    assert record.types[base.upper()] > record.types[wider.upper()] == 2
    reader = GGUFReader(target / file)
    assert sum(record.types.values()) == len(reader.tensors)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.1.ffn_up.weight"] == base.upper()
    assert kinds.get("blk.1.attn_v.weight", kinds.get("blk.1.attn_qkv.weight")) == wider.upper()
    assert kinds["blk.0.ffn_down.weight"] == "Q5_0"
    assert LlamaFileType(reader.fields["general.file_type"].contents()) == LlamaFileType[f"MOSTLY_{named.upper()}"]
    if not ENGINES["llama.cpp"].is_installed:
        pytest.skip("xllamacpp is not installed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(100, 140)
    with opened("llama.cpp", target / file) as engine:
        found = engine.log_probabilities(ids)
    expected = torch.log_softmax(loaded(ids[None]).logits[0], dim=-1)
    assert torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean") < 0.01


def test_transformers_reads_k_quants_of_permuted_rows(tmp_path: Path) -> None:
    model = k_model(tmp_path / "model", "llama", k_mix("q4_k", "q6_k"))
    target = exported(tmp_path, model, GgufExporter(embeddings="bf16"))
    (tmp_path / "converted").mkdir()
    convert_gguf(target / "model-q4_k_m.gguf", tmp_path / "converted")
    ours, theirs = (Checkpoint(tmp_path / name) for name in ("model", "converted"))
    for name in model.forms:
        assert torch.equal(theirs.read([name])[name], ours.read([name])[name]), name


@pytest.mark.parametrize(
    ("embeddings", "hidden", "found"),
    [(None, 256, "Q6_K"), ("q6_k", 320, "Q8_0"), ("q6_k", 336, "BF16"), ("f16", 256, "F16")],
)
def test_embeddings_beside_k_quants(tmp_path: Path, embeddings: str | None, hidden: int, found: str) -> None:
    def chosen(name: str) -> Rounding | None:
        return K_GRIDS["q4_k"] if name.endswith("down_proj") else None

    model = k_model(tmp_path / "model", "llama_tied", chosen, hidden_size=hidden, num_hidden_layers=1)
    exporter = GgufExporter(embeddings=embeddings)
    target = exported(tmp_path, model, exporter)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(target / "model-q4_k_s.gguf").tensors}
    assert kinds["token_embd.weight"] == found
    assert kinds["blk.0.ffn_up.weight"] == "BF16"
    rounded = verified(model, exporter, target).rounded
    assert rounded.keys() <= {"model.embed_tokens.weight"}
    assert all(error < 0.03 for error in rounded.values())


def test_a_change_of_one_code_is_found(tmp_path: Path) -> None:
    model = k_model(tmp_path / "model", "llama", k_mix("q4_k"))
    exporter = GgufExporter(embeddings="bf16")
    target = exported(tmp_path, model, exporter)
    name = "model.layers.1.mlp.up_proj.weight"

    def load(asked: str) -> StoredWeight:
        weight = model.load(asked)
        if asked != name:
            return weight
        assert isinstance(weight, KQuantWeight)
        codes = weight.codes.clone()
        codes[3, 5] ^= 1
        return replace(weight, codes=codes)

    with pytest.raises(ModelError, match=rf"{name} is read back with an error of inf steps"):
        verified(replace(model, load=load), exporter, target)


def test_other_formats_refuse_k_quants_with_a_way_out(tmp_path: Path) -> None:
    model = k_model(tmp_path / "model", "llama", k_mix("q4_k"))
    for word in ("compressed-tensors", "gptq", "mlx"):
        with pytest.raises(ConfigError, match=rf"{word}: .*_proj.weight is stored as Q4_K, .* hold; export=gguf$"):
            exporter_of(word).check(model)
    with pytest.raises(ConfigError, match=r"_proj\.weight: Q4_0 does not hold Q4_K; export=gguf without a type"):
        GgufExporter(type="q4_0").check(model)
    for word, way_out in (("q4_k", "quantizer.grid=q4_k"), ("q4_k_m", "layers.mix=q4_k_m")):
        with pytest.raises(ConfigError, match=f"type={word}: .* {way_out} export=gguf"):
            GgufExporter(type=word)


def test_each_layer_has_the_type_of_its_own_grid(tmp_path: Path) -> None:
    grids = {"q_proj": RTN(bits=5, group_size=32), "down_proj": RTN(bits=8, group_size=32, symmetric=True)}
    model = write_model(
        tmp_path / "model",
        "llama",
        lambda name: None if "layers.0" in name else grids.get(name.rpartition(".")[2], Q4_0),
    )
    exporter = GgufExporter()
    target = exported(tmp_path, model, exporter)
    assert verified(model, exporter, target).worst_error <= exporter.tolerance
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(target / exporter.file_name(model)).tensors}
    found = [types[f"blk.{name}.weight"] for name in ("0.ffn_up", "1.attn_q", "1.attn_k", "2.ffn_down")]
    assert found == ["BF16", "Q5_1", "Q4_0", "Q8_0"]


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        GgufExporter().write(model, tmp_path / name)
        files.append((tmp_path / name / "model.gguf").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "rope",
    [
        LLAMA3,
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaling_of_rotary_embeddings_is_carried_over(tmp_path: Path, rope: dict[str, object]) -> None:
    model = write_model(tmp_path / "model", "llama", rope_parameters=rope, max_position_embeddings=1024)
    target = exported(tmp_path, model, GgufExporter())
    (tmp_path / "converted").mkdir()
    convert_gguf(target / "model.gguf", tmp_path / "converted")
    found = json.loads((tmp_path / "converted" / "config.json").read_text())["rope_parameters"]
    assert {key: found[key] for key in rope} == rope


def test_what_llama_cpp_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    exporter = GgufExporter()
    for family, rule in (("olmo2", "architecture olmo2; there are llama"), ("gpt_neox", "architecture gpt_neox")):
        with pytest.raises(ConfigError, match=rule):
            exporter.check(write_quantized(tmp_path / family, family, Q4_0))
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **factors}
    for name, changes, rule in (
        ("pattern", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "no regular pattern"),
        ("scalar", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar"),
    ):
        settings = {**MODELS["gemma3"], **changes}
        with pytest.raises(ConfigError, match=rule):
            exporter.check(write_quantized(tmp_path / name, "gemma3", Q4_0, **settings))
    with pytest.raises(ConfigError, match="rope_type=longrope"):
        exporter.check(write_quantized(tmp_path / "long", "phi3", Q4_0, sliding_window=None, rope_parameters=longrope))
    words = write_quantized(tmp_path / "words", "llama", Q4_0)  # its tokenizer is a WordLevel one
    with pytest.raises(ConfigError, match="WordLevel"):
        exporter.check(words)
    model = write_model(tmp_path / "model", "llama")
    for change, rule in (
        ({"permutation": torch.arange(64)}, "act_order"),
        ({"bits": 3}, "nothing is gained"),
    ):
        forms = {name: replace(form, **change) for name, form in model.forms.items()}
        with pytest.raises(ConfigError, match=rule):
            exporter.check(replace(model, forms=forms))
    wide = {name: replace(form, scale=form.scale.float()) for name, form in model.forms.items()}
    with pytest.raises(ConfigError, match="float32 as the checkpoint is"):
        exporter.check(replace(model, forms=wide))
    with pytest.raises(ConfigError, match="type=q3_0: must be one of"):
        GgufExporter(type="q3_0")


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_sliding_window_that_llama_cpp_ignores_is_said(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "export=gguf: llama.cpp attends to all positions, the model to 8: it differs in longer contexts"
    for window, notes in ((8, [said]), (None, [])):
        monkeypatch.setitem(MODELS, family, {"sliding_window": window})
        assert GgufExporter().check(write_model(tmp_path / f"{window}", family)) == notes


def edited(**changes: object) -> PreTrainedTokenizerFast:
    """The bundled model's tokenizer with some parts of tokenizer.json replaced."""
    content = {**json.loads((BUNDLED / "tokenizer.json").read_text()), **changes}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


def test_a_tokenizer_that_splits_otherwise_is_refused() -> None:
    assert read_tokenizer(edited(), VOCABULARY).pre == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    smollm = edited(pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, levels]})
    assert read_tokenizer(smollm, VOCABULARY).pre == "smollm"
    with pytest.raises(ConfigError, match="splits text in a way of its own"):
        read_tokenizer(edited(pre_tokenizer={"type": "Sequence", "pretokenizers": [levels, digits]}), VOCABULARY)
    with pytest.raises(ConfigError, match="normalises text"):
        read_tokenizer(edited(normalizer={"type": "Lowercase"}), VOCABULARY)


def sentencepiece_like(prepend: bool) -> PreTrainedTokenizerFast:
    """BPE over characters with bytes as fallback, as converted from SentencePiece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("\u2581")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    )
    text = inspect.getsource(inspect)
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("prepend", [True, False])
def test_llama_cpp_tokenizes_as_sentencepiece_does(tmp_path: Path, prepend: bool) -> None:
    if not ENGINES["llama.cpp"].is_installed:
        pytest.skip("xllamacpp is not installed")
    tokenizer = sentencepiece_like(prepend)
    model = write_quantized(tmp_path / "model", "llama", Q4_0, vocab_size=1024)
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(tmp_path / "model")
    target = exported(tmp_path, model, GgufExporter())
    with opened("llama.cpp", target / "model.gguf") as engine:
        for text in ("def function(self, x):\n    return isinstance(x, str)", "a  b   naïve 漢字", "import re"):
            assert engine.tokenize(text) == tokenizer.encode(text, add_special_tokens=False), text

"""Made-up runs that look like real ones: 30 blocks of 7 layers, errors that grow with depth."""

import math
import random
from dataclasses import replace

import pytest

from jointq_cli.records import (
    Audit,
    BlockRecord,
    Comparison,
    Invariance,
    LayerRecord,
    Perplexity,
    Protocol,
    RotationRecord,
    RotationTraining,
    RunReport,
    Simulation,
    Site,
    StageRecord,
    TaskRecord,
    TaskScore,
    ValidationPoint,
)

SHAPES = {
    "self_attn.q_proj": (576, 576, 1.0),
    "self_attn.k_proj": (192, 576, 0.8),
    "self_attn.v_proj": (192, 576, 1.9),
    "self_attn.o_proj": (576, 576, 2.4),
    "mlp.gate_proj": (1536, 576, 1.2),
    "mlp.up_proj": (1536, 576, 1.5),
    "mlp.down_proj": (576, 1536, 3.1),
}


def make_layers(blocks: int) -> list[LayerRecord]:
    source = random.Random(0)
    return [
        LayerRecord(
            name=f"model.layers.{block}.{name}",
            block=block,
            kind=name.split(".")[-1],
            out_features=out_features,
            in_features=in_features,
            bits=4,
            group_size=64,
            bits_per_weight=4.3125,
            output_error=2e-4 * scale * math.exp(0.07 * block + source.gauss(0, 0.25)),
            weight_error=8e-3 * scale**0.2 * math.exp(source.gauss(0, 0.05)),
            damping=0.01,
            seconds=0.08 + 1e-6 * out_features * in_features * source.random(),
            verdict="ok",
            notes={"dead_columns": 0},
        )
        for block in range(blocks)
        for name, (out_features, in_features, scale) in SHAPES.items()
    ]


def make_report(layers: list[LayerRecord]) -> RunReport:
    return RunReport(
        recipe="smollm2_135m_w4g64",
        model="HuggingFaceTB/SmolLM2-135M",
        model_hash="5c1f0e7d9b3a2846",
        architecture="LlamaForCausalLM",
        parameters=134_515_008,
        quantizer="GPTQ W4 g64 asymmetric mse act_order damping=0.01",
        rotation=None,
        simulation=None,
        calibration="wikitext2/train 64 x 512 tokens concat_chunk seed 0 text=9f2c41d07be3a865",
        protocol=Protocol(
            dataset="wikitext2",
            split="test",
            text_hash="0d4b7a91c2e8f653",
            window=512,
            stride=512,
            bos="none",
            dtype="bfloat16",
            windows=40,
            scored_tokens=20_440,
        ),
        original=Perplexity(value=18.2714, standard_error=0.5121, nll=2.90534, nll_standard_error=0.02803),
        quantized=Perplexity(value=19.3382, standard_error=0.5467, nll=2.96208, nll_standard_error=0.02827),
        comparison=Comparison(
            nll_increase=0.05674,
            nll_increase_standard_error=0.00291,
            kl_divergence=0.05127,
            kl_divergence_standard_error=0.00112,
            top1_agreement=0.8871,
        ),
        reload_check="identical",
        audit=Audit(
            identical=62,
            quantized=len(layers),
            missing=[],
            unexpected=[],
            changed=[],
            source_bytes=269_060_552,
            checkpoint_bytes=269_063_144,
            packed_bytes=113_870_336,
        ),
        bits_per_weight=4.3125,
        layers=layers,
        blocks=[BlockRecord(block, 1e-3 * 1.2**block) for block in range(len({layer.block for layer in layers}))],
        stages=[
            StageRecord("tokens", 1.84, False, 412_000_000),
            StageRecord("rotate", 0.02, True, 413_000_000),
            StageRecord("quantize", 183.2, False, 838_000_000),
            StageRecord("checkpoint", 2.9, False, 838_000_000),
            StageRecord("evaluate", 74.6, False, 871_000_000),
        ],
        peak_memory=871_000_000,
        versions={"jointq": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        device="cpu (2 threads)",
        warnings=[],
    )


def make_rotation(blocks: int) -> RotationRecord:
    errors = [ValidationPoint(step, 0.0122 - 2e-5 * step) for step in range(0, 151, 10)]
    names = ["R1", *(f"R2 of block {block}" for block in range(blocks))]
    return RotationRecord(
        rotation="R1+R2 learned range2 lie from random_hadamard seed=0",
        smoothing="SmoothQuant alpha=0.5 o_proj+down_proj",
        constructions=["R1: Hadamard 576 = 36 x 16", "R2: Hadamard 64"],
        orthogonality_error=4.4e-16,
        hash="7f3b" * 16,
        online=[],
        courses=[RotationTraining(name, 150, 140, 31.1, 19.7, 0.0122, 0.0094, 0.35, errors) for name in names],
        sites=[
            Site(block, name, before, after, 2 * peak, peak, 40.0 + block, 3.1)
            for block in range(blocks)
            for name, before, after, peak in (
                ("attention", 14.0, 21.0, 2.75),
                ("mlp", 16.0, 20.0, 2.7),
                ("o_proj", 19.0, 22.0, 2.5),
                ("down_proj", 11.0, 13.0, 5.9),
            )
        ],
        invariance=Invariance(merge=8.3e-7, stored=5.1e-3, rounding=4.9e-3, dtype="bfloat16", tokens=128),
        source_bytes=269_060_552,
        rotated_bytes=325_683_656,
    )


def make_simulation(layers: list[LayerRecord]) -> Simulation:
    return Simulation("A4 asymmetric per token clip=searched down_proj=A8", {layer.name: 0.9 for layer in layers})


@pytest.fixture(scope="session")
def report() -> RunReport:
    """A clean run over 210 layers."""
    return make_report(make_layers(30))


@pytest.fixture(scope="session")
def troubled(report: RunReport) -> RunReport:
    """A run with a layer that fell back, a damped one, a perfect one, and a changed tensor in the audit."""
    layers = list(report.layers)
    layers[7] = replace(
        layers[7], verdict="fallback", damping=None, output_error=0.31, notes={"reason": "not definite"}
    )
    layers[20] = replace(layers[20], verdict="damped", damping=0.1)
    layers[33] = replace(layers[33], output_error=0.0, weight_error=0.0)
    audit = replace(report.audit, changed=["model.norm.weight"])
    return replace(report, layers=layers, audit=audit, warnings=["the calibration text was <used> twice & more"])


@pytest.fixture(scope="session")
def rotated(report: RunReport) -> RunReport:
    """A run on a smoothed and rotated model, measured with 4-bit activations."""
    return replace(report, rotation=make_rotation(30), simulation=make_simulation(report.layers))


@pytest.fixture(scope="session")
def task() -> TaskRecord:
    """A figure that is half a point below the original's."""
    return TaskRecord(
        task="arc_easy",
        metric="acc",
        samples=2376,
        fewshot=5,
        task_hash="4f0c2d9be1a73568",
        harness="lm-eval 0.4.13",
        score=TaskScore(0.62, 0.01),
        original=TaskScore(0.625, 0.01),
        change_standard_error=0.004,
    )


class Clock:
    """Time that advances by `sleep` only."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()

"""Model cards: their heads are YAML that the hub takes, and they say how the files are used."""

import math
from dataclasses import replace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from jointq_cli.records import ExportRecord, RunReport
from jointq_cli.report.pages.model_card import identity, model_card

EXPORT = ExportRecord(
    format="gguf-q4_0", files={}, weight_bytes=10**9, bits_per_weight=4.5, worst_error=0.0,
    warnings=["<none> of them"], commands={"llama.cpp": "llama-server -m a.gguf"},
)  # fmt: skip


def head(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    assert ModelCard(card).data.to_dict()["base_model"] == found["base_model"]  # as the hub reads it
    return found


def test_the_head_has_origin_protocol_and_figures(report: RunReport) -> None:
    found = head(model_card(report))
    assert found["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert (found["library_name"], found["tags"]) == ("transformers", ["jointq", "4-bit"])
    assert found["jointq"]["quantizer"] == report.quantizer
    assert found["jointq"]["protocol"] == report.protocol.line()
    assert found["jointq"]["figures"]["kl"] == 0.05127


@pytest.mark.parametrize("name", ["yes", "a: b # c", "12", "näme", "x\n---\ny", "[1]"])
def test_any_name_gives_valid_yaml(report: RunReport, name: str) -> None:
    odd = replace(report, base_model=name, recipe=name, quantizer=f"'{name}\"")
    odd = replace(odd, quantized=replace(report.quantized, value=math.nan))
    card = model_card(odd)
    found: dict[str, Any] = yaml.safe_load(card.split("---\n# ")[0].split("---\n\n#")[0].removeprefix("---\n"))
    assert (found["base_model"], found["jointq"]["recipe"]) == (name, name)
    assert math.isnan(found["jointq"]["figures"]["perplexity"])


def test_an_export_says_how_it_is_served(report: RunReport) -> None:
    card = model_card(report, EXPORT)
    found = head(card)
    assert (found["library_name"], found["tags"]) == ("gguf", ["jointq", "gguf-q4_0", "4-bit"])
    assert "```sh\n# llama.cpp\nllama-server -m a.gguf\n```" in card
    assert "- &lt;none> of them" in card
    assert "from_pretrained" not in card


def test_problems_and_the_basis_are_told(rotated: RunReport, troubled: RunReport) -> None:
    assert "> **Problem:** audit failed" in model_card(troubled)
    assert "from_pretrained" in model_card(rotated)
    assert rotated.rotation is not None
    online = model_card(replace(rotated, rotation=replace(rotated.rotation, online=["R4"])))
    assert "from_pretrained" not in online
    assert head(online)["jointq"]["rotation"] == rotated.rotation.rotation


def test_the_origin_has_no_path_of_this_machine(report: RunReport) -> None:
    local = replace(report, model="/home/someone/models/mine")
    assert identity(local)["base_model"] == "mine"
    assert "/home" not in model_card(local)

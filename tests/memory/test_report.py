"""The command memory: one row a scheme and setup, named for where its numbers come from, with provenance."""

import csv
import json

import pytest

from lora_distill.memory import report
from lora_distill.memory.schemes import INFERENCE, TRAINING
from lora_distill.settings import Settings


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "figures_dir", lambda settings: tmp_path)
    monkeypatch.setattr(report, "TRAINING", {"lora_finetune": TRAINING["lora_finetune"]})
    monkeypatch.setattr(report, "INFERENCE", {"guided_batched": INFERENCE["guided_batched"]})
    monkeypatch.setattr(report.setups, "__defaults__", ((1,),))
    report.write(Settings(pipeline="bundled"), "cpu")
    return tmp_path


def test_a_small_unet_is_measured_on_the_cpu_and_all_is_written(written):
    assert {path.name for path in written.iterdir()} == {"01_memory_measured.csv", "01_flops.csv", "01_memory.json"}
    rows = list(csv.DictReader((written / "01_memory_measured.csv").open()))
    assert [row["scheme"] for row in rows] == ["lora_finetune", "lora_finetune", "guided_batched"]
    assert all(float(row["account_to_measured"]) == pytest.approx(1, abs=0.05) and row["device"] for row in rows)
    assert {"commit", "versions", "device", "kind"} <= json.loads((written / "01_memory.json").read_text()).keys()

"""The cost model: its formulas in cases known by hand, and docs/explanation/scaling.md as it writes it."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from mae_dat.models.classifier import build_classifier
from mae_dat.models.mae import build_mae

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("cost_model", ROOT / "benchmarks" / "cost_model.py")
assert SPEC is not None and SPEC.loader is not None  # noqa: PT018 - for mypy
model = importlib.util.module_from_spec(SPEC)
sys.modules["cost_model"] = model
SPEC.loader.exec_module(model)


def test_the_document_holds_what_the_model_says() -> None:
    text = (ROOT / "docs" / "explanation" / "scaling.md").read_text()
    assert model.written(text) == text, "python benchmarks/cost_model.py --write docs/explanation/scaling.md"
    with pytest.raises(ValueError, match="marks"):
        model.written("no marks")


def test_parameters_are_those_of_our_models() -> None:
    with torch.device("meta"):
        for letter, size, patch in (("B", "base", 16), ("L", "large", 16), ("H", "huge", 14)):
            autoencoder = build_mae(f"mae_vit_{size}_patch{patch}", img_size=(224, 224), in_chans=3)
            classifier = build_classifier(f"vit_{size}_patch{patch}", 1000, (224, 224))
            for work in model.WORKS:
                if f" {letter}/" not in work.name:
                    continue
                built = autoencoder if work.name.startswith("pretrain") else classifier
                count = sum(one.numel() for one in built.parameters() if one.requires_grad)
                assert work.parameters == pytest.approx(count, rel=2e-3), work.name


def test_formulas_in_known_cases() -> None:
    machine = model.Machine("x", node_link=100e9, network=10e9, achieved=1.0, hop=0.0, flops=1e12, share=0.5)
    work = model.Work("x", gflop=1.0, backward=0.5, parameters=1e9, batch=800, blocks=0)
    assert model.compute(work, machine, 8) == pytest.approx(0.2)
    assert model.all_reduce(work, machine, 1) == 0
    assert model.all_reduce(work, machine, 8) == pytest.approx(2 * 7 / 8 * 4e9 / 100e9)
    assert model.all_reduce(work, machine, 16) == pytest.approx(2 * 15 / 16 * 4e9 / 10e9), "between nodes"
    assert model.waiting(work, machine, 8) == 0, "0.07 s behind 0.1 s"
    assert model.waiting(work, machine, 16) == pytest.approx(0.75 - 0.05)
    assert model.efficiency(work, machine, 1) == 1
    assert model.checkpoint(work) == 12e9
    stop, between = 2.0, 3600.0
    best = model.best_interval(stop, between)
    assert best == pytest.approx(math.sqrt(2 * 2 * 3600))
    shares = [model.lost(stop, between, 60, best * factor) for factor in (0.8, 1.0, 1.25)]
    assert min(shares) == shares[1], "no other interval loses less"

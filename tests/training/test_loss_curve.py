"""Twenty steps of the training loop whose losses are written down in tests/golden/loss_curve.json: a change of the
numerics shows, wherever it was made.

Weights are by rule and images drawn by torch's generator, so nothing but the numerics enters. To write the curves
anew after a change that is meant to change them: `PYTHONPATH=.:tests/support python
tests/training/test_loss_curve.py`.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import GOLDEN
from tiny_models import tiny, tiny_mae
from tiny_runs import one_thread
from torch import Tensor, nn
from torch.utils.data import Dataset
from whole_runs import setup_for, state_of

from golden_rule import fill_by_rule
from mae_dat.config.adversaries import AttackConfig
from mae_dat.config.groups import AugmentConfig, OptimConfig
from mae_dat.models.tokenizer import LightConfig, LightTokenizer
from mae_dat.runtime.blocks import choose_attention
from mae_dat.training.loop import Trainer
from mae_dat.training.objectives.base import Objective
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import WithDAT
from mae_dat.training.objectives.reconstruction import MaskedReconstruction

__all__ = ["one_thread"]

CURVES = GOLDEN / "loss_curve.json"
STEPS = 20
TOLERANCE = {"MAE": 5e-4, "DAT released": 5e-3, "DAT symbolic": 5e-3}  # relative: rounding may turn a word in DAT

BFLOAT16 = {"MAE": 5e-4, "DAT released": 1e-2, "DAT symbolic": 1e-2}  # found: 3e-5, 1.3e-3, 6e-4


class Noise(Dataset[Any]):
    """Smooth noise with a class by its mean, as an image set."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(32, 3, 8, 8, generator=generator)
        self.images = nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear").clamp(0, 1)
        self.samples = [(str(number), 0) for number in range(32)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor | int]:
        image = self.images[key[1]]
        return {"image": image, "label": int(10 * image.mean()), "index": key[1], "skipped": 0}


def by_rule(model: nn.Module, keep: tuple[str, ...] = ()) -> nn.Module:
    model.load_state_dict(fill_by_rule(model, keep))
    return model


def objectives() -> Iterator[tuple[str, nn.Module, Objective]]:
    """What each curve trains."""
    fixed = ("pos_embed", "decoder_pos_embed")
    yield "MAE", by_rule(tiny_mae(), fixed), MaskedReconstruction(0.75, norm_pix=True)
    words = LightTokenizer(LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=32))
    by_rule(words)
    for kind in ("released", "symbolic"):
        attack = AttackConfig(kind, eps=3.0, share=None if kind == "released" else 0.1)
        yield f"DAT {kind}", by_rule(tiny()), WithDAT(words.freeze(), attack, Classification(AugmentConfig(), 10))


def curve(
    model: nn.Module, objective: Objective, output: Path, precision: torch.dtype | None = None
) -> list[dict[str, float]]:
    """What each step told."""
    told: list[dict[str, float]] = []
    objective.observe = lambda facts: told.append(dict(facts))  # type: ignore[method-assign]
    state = state_of(model, objective)
    optim = OptimConfig(batch_size=8, epochs=STEPS // 4, warmup_epochs=1, lr=1e-3, clip_grad=1.0)
    setup = setup_for(Noise(), output, optim, precision=precision)  # type: ignore[arg-type]
    Trainer(state, setup).run()
    return told + [metrics for _, metrics in state.delayed_metrics]


@pytest.mark.parametrize("number", range(3))
def test_losses_are_those_written_down(number: int, tmp_path: Path) -> None:
    name, model, objective = list(objectives())[number]
    found, expected = curve(model, objective, tmp_path), json.loads(CURVES.read_text())[name]
    assert len(found) == len(expected) == STEPS
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=TOLERANCE[name])
    losses = [one["loss"] for one in found]
    assert losses[-1] < losses[0]
    assert name == "MAE" or found[0]["changed_words"] > 0


@pytest.mark.parametrize("number", range(3))
def test_losses_in_bfloat16_follow_float32(number: int, tmp_path: Path) -> None:
    name, model, objective = list(objectives())[number]
    choose_attention(model, torch.device("cpu"), torch.bfloat16)
    found = [one["loss"] for one in curve(model, objective, tmp_path, torch.bfloat16)]
    expected = [one["loss"] for one in json.loads(CURVES.read_text())[name]]
    assert found != expected
    assert found == pytest.approx(expected, rel=BFLOAT16[name])


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: curve(model, objective, Path(folder)) for name, model, objective in objectives()}
    rounded = {
        name: [{key: float(f"{value:.7g}") for key, value in one.items()} for one in steps]
        for name, steps in curves.items()
    }
    lines = [f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, steps)) + "\n]" for name, steps in rounded.items()]
    CURVES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    sys.stdout.write(f"wrote {CURVES}\n")

"""The strength of every adversary: none at first, then a linear ramp, the same after a resume."""

import signal
from pathlib import Path

import pytest
import torch
from dat_steps import CLASSES, SIDE, CountedTokenizer, batch_of, generator
from tiny_runs import (
    draw_folder,
    finetune_in,
    one_thread,  # noqa: F401 - used by itself
)
from torch import nn
from whole_runs import assert_equal_states, final_state, records, signal_in_step

from mae_dat.attacks.pixel import PixelAttack
from mae_dat.config.adversaries import NO_STRENGTH, AttackConfig, AttackKind, BaselineConfig, strength_at
from mae_dat.config.errors import ConfigError, InterruptError, UsageError
from mae_dat.config.groups import AugmentConfig
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig
from mae_dat.models.tokenizer import LightConfig
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import WithDAT
from mae_dat.training.objectives.pixel import WithPixelAdversary


def classification() -> Classification:
    return Classification(AugmentConfig(smoothing=0.0), CLASSES)


def linear_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES))


@pytest.fixture
def tokenizer() -> CountedTokenizer:
    torch.manual_seed(0)
    return CountedTokenizer(LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=32)).freeze()


def test_the_strength_is_held_then_grows_linearly() -> None:
    assert [strength_at(epoch, 2.0, 4.0) for epoch in (0, 1.9, 2, 3, 5, 6, 9)] == [
        *([NO_STRENGTH] * 3), 0.25, 0.75, 1.0, 1.0
    ]  # fmt: skip
    assert [strength_at(epoch, 2.0, 0.0) for epoch in (0, 1.9, 2)] == [NO_STRENGTH, NO_STRENGTH, 1.0]
    assert strength_at(0.0, 0.0, 0.0) == 1.0


@pytest.mark.parametrize("kind", ["released", "paper", "symbolic", "random"])
def test_discrete_adversaries_change_nothing_while_they_are_held(kind: AttackKind, tokenizer: CountedTokenizer) -> None:
    objective = WithDAT(tokenizer, AttackConfig(kind, share=0.3, hold_epochs=1.0, ramp_epochs=1.0), classification())
    model, batch = linear_model(), batch_of()
    for epoch in (0.0, 0.9):
        objective.begin(epoch)
        parts = objective.step(model, batch, generator())
        assert float(parts["changed_words"]) == 0
        assert float(parts["adversary_ramp"]) == pytest.approx(NO_STRENGTH)
        objective.observe({name: float(value.detach()) for name, value in parts.items()})
    assert objective.strength_is_known == (kind in ("symbolic", "random")), "a strength is searched when there is one"
    objective.begin(2.0)
    parts = objective.step(model, batch, generator())
    assert 0.1 < float(parts["changed_words"]) < 0.6
    assert objective.strength_is_known


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pixel_adversaries_grow_with_the_epoch(norm: str) -> None:
    attack = PixelAttack(0.1, 0.05, 3, norm=norm, random_start=True)  # type: ignore[arg-type]
    objective = WithPixelAdversary(classification(), attack, hold_epochs=1.0, ramp_epochs=2.0)
    model, batch = linear_model(), batch_of()
    image, prepared = objective.prepare(model, batch, generator())
    image = image.clamp(0.2, 0.8)  # so that no pixel is clipped
    lengths = []
    for epoch in (0.5, 2.0, 3.0):
        objective.begin(epoch)
        difference = objective.adversary(model, image, prepared, generator()) - image
        lengths.append(float(difference.abs().max() if norm == "linf" else difference.flatten(1).norm(dim=1).max()))
    assert lengths == pytest.approx([0.1 * NO_STRENGTH, 0.05, 0.1], rel=0.01, abs=1e-6)
    assert float(objective.step(model, batch, generator())["adversary_ramp"]) == 1.0
    without = WithPixelAdversary(classification(), attack).step(model, batch, generator())
    assert "adversary_ramp" not in without


def test_pixel_training_that_was_stopped_while_held_continues_as_if_it_had_not_been(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", train=16, val=10, conflict=10)
    flags = ["--at", "pgd", "--at_steps", "1", "--adversary_hold", "1", "--adversary_ramp", "1", "--epochs", "3"]
    finetune_in(tmp_path / "whole", images, *flags)
    with signal_in_step(1, signal.SIGTERM), pytest.raises(InterruptError):
        finetune_in(tmp_path / "stopped", images, *flags)
    finetune_in(tmp_path / "stopped", images, *flags)
    assert_equal_states(final_state(tmp_path / "stopped"), final_state(tmp_path / "whole"))
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    ramps = [record["train_adversary_ramp"] for record in records(tmp_path / "whole")]
    assert ramps == pytest.approx([NO_STRENGTH, 0.25, 1.0], abs=1e-6)


def test_the_old_name_is_read_from_files_and_named_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("dat: released\ndat_warmup: 3\n")
    config = load_config(FinetuneConfig, ["--config", str(tmp_path / "config.yaml")])
    assert (config.dat.hold_epochs, config.dat.ramp_epochs) == (0, 3)
    assert config.dat.attack
    assert config.dat.attack.describe().endswith("growing over 3 epochs")
    with pytest.raises(UsageError, match="no flag --dat_warmup: it is --adversary_ramp now"):
        load_config(FinetuneConfig, ["--dat", "--dat_warmup", "3"])


@pytest.mark.parametrize("flag", ["--adversary_hold", "--adversary_ramp"])
def test_a_schedule_that_cannot_be(flag: str) -> None:
    for switch in (["--dat"], ["--at", "pgd"]):
        with pytest.raises(ConfigError, match=f"{flag} must be 0 epochs or more, got -1"):
            load_config(FinetuneConfig, [*switch, f"{flag}=-1"])
    assert BaselineConfig("pgd").at == "pgd"

"""The settings of the discrete adversary: from the flags of --dat to the attack."""

from typing import Any

import pytest

from mae_dat.attacks.discrete import attack_function
from mae_dat.config.adversaries import ATTACK_KINDS, ATTACKS, AttackConfig, DatConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ([], "none"),
        (["--dat"], "released"),
        (["--dat", "--epochs", "3"], "released"),
        (["--epochs", "3", "--dat"], "released"),
        (["--dat", "paper", "--epochs", "3"], "paper"),
        (["--dat=random"], "random"),
        (["--dat", "none"], "none"),
    ],
)
def test_dat_needs_no_value_wherever_it_stands(arguments: list[str], kind: str) -> None:
    config = load_config(FinetuneConfig, arguments)
    assert config.dat.kind == kind
    assert (config.dat.attack.kind if config.dat.attack else "none") == kind


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "releasd"}, "unknown attack 'releasd': did you mean released"),
        ({"share": 3.8}, "--dat_share must lie between 0 and 1 .3.8 % is 0.038., got 3.8"),
        ({"share": 0.0}, "between 0 and 1"),
        ({"share": 1.0}, "between 0 and 1"),
        ({"eps": 0.0}, "--dat_eps must be above 0, got 0.0"),
        ({"steps": 0}, "--dat_steps must be at least 1, got 0"),
        ({"random_start": 1.1}, r"--dat_random_start must be in \[0, 1\], got 1.1"),
        ({"nearest": 0}, "--dat_nearest must be at least 1, got 0"),
    ],
)
def test_an_attack_that_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttackConfig(**settings)


def test_the_flags_of_dat_reach_the_attack() -> None:
    attack = DatConfig("released", 0.3, 0.04, 0.5, 2).attack
    assert attack == AttackConfig("released", 0.3, 0.04, 0.5, 2)
    assert [kind for kind in ATTACK_KINDS if AttackConfig(kind).clean_weight == 0] == ["paper"]
    symbolic = load_config(FinetuneConfig, ["--dat", "symbolic", "--dat_steps", "3", "--dat_nearest", "16"]).dat.attack
    assert symbolic == AttackConfig("symbolic", steps=3, nearest=16)
    assert symbolic.word_share == 0.05
    assert DatConfig().attack is None


@pytest.mark.parametrize(
    "arguments, eps, share",
    [
        (["--dat"], 0.1, 0.038),
        (["--dat", "--dat_eps", "0.2"], 0.2, None),
        (["--dat", "--dat_share", "0.2"], 0.1, 0.2),
        (["--dat", "--tokenizer", "vq-f8.ckpt"], 0.1, None),
        (["--dat", "random"], 0.1, None),
    ],
)
def test_the_published_strength_is_a_share_where_eps_does_not_carry_over(
    arguments: list[str], eps: float, share: float | None
) -> None:
    attack = load_config(FinetuneConfig, arguments).dat.attack
    assert attack is not None
    assert (attack.eps, attack.share) == (eps, share)


def test_every_kind_of_attack_has_its_function() -> None:
    assert tuple(ATTACKS) == ATTACK_KINDS
    for kind in ATTACKS:
        assert callable(attack_function(kind))

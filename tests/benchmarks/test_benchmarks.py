"""The benchmark: baselines that compute what ours does, rows that tell what was measured, the command."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny, tiny_mae
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks import __main__ as command
from benchmarks import dat, finetune, mae, operators
from benchmarks.operators import functions_of, operators_of
from benchmarks.ours import make_batch, training_step
from benchmarks.plain import (
    ReleasedVQGAN,
    Trainer,
    dat_step,
    finetuning_step,
    full_matrix_words,
    mae_step,
    torch_defaults,
)
from benchmarks.stored_rows import store_rows
from benchmarks.table import as_json, row_texts
from benchmarks.timing import NEEDS_GPU, Case, Row, Step, measure, quartiles
from mae_dat.config.adversaries import AttackConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import AugmentConfig
from mae_dat.models.mae import mask_noise
from mae_dat.models.tokenizer import VQGAN, VQGANConfig
from mae_dat.runtime.seeds import step_generator
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import WithDAT
from mae_dat.training.objectives.reconstruction import MaskedReconstruction

CPU = torch.device("cpu")
SMALL = VQGANConfig(64, 4, 4, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,))
PLAIN = Classification(AugmentConfig(smoothing=0.0), 10)


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours without bfloat16, so that losses can be compared."""
    monkeypatch.setattr("benchmarks.ours.amp_dtype", lambda precision, device: None)


def twins() -> tuple[torch.nn.Module, torch.nn.Module]:
    one, other = tiny().train(), tiny().train()
    other.load_state_dict(one.state_dict())
    return one, other


# ---- baselines compute the same ----


@pytest.mark.usefixtures("float32")
def test_the_plain_mae_step_learns_as_ours() -> None:
    batch, (ours, theirs) = make_batch(4, 64, CPU), (tiny_mae().train(), tiny_mae().train())
    theirs.load_state_dict(ours.state_dict())
    step, trainer = training_step(ours, MaskedReconstruction(0.75, False), batch, CPU), Trainer(theirs)
    for number in range(3):  # the second loss depends on the first update
        noise = mask_noise(4, theirs.num_patches, step_generator(0, number, 0, CPU), CPU)
        assert mae_step(theirs, trainer, batch["image"], noise) == pytest.approx(float(step()), rel=1e-4)


@pytest.mark.usefixtures("float32")
def test_the_plain_fine_tuning_step_learns_as_ours() -> None:
    batch, (ours, theirs) = make_batch(4, 64, CPU, classes=10), twins()
    step, trainer = training_step(ours, PLAIN, batch, CPU), Trainer(theirs)
    target = one_hot(batch["label"], 10).float()
    losses = [(finetuning_step(theirs, trainer, batch["image"], target), float(step())) for _ in range(3)]
    assert losses[0][0] != losses[2][0]
    for plain, our in losses:
        assert plain == pytest.approx(our, rel=1e-3)


def small_vqgans() -> tuple[VQGAN, ReleasedVQGAN]:
    """Ours and taming's with the same weights, and codes at the scale of what the encoder says."""
    ours, theirs = VQGAN(SMALL).freeze(), ReleasedVQGAN(SMALL)
    with torch.no_grad():
        ours.codebook.copy_(ours.latent(torch.rand(1, 3, 64, 64)).flatten(2)[0].T[torch.randperm(1024)[:64]])
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_the_plain_reconstruction_is_ours() -> None:
    ours, theirs = small_vqgans()
    image = torch.rand(2, 3, 32, 32)
    assert len(ours.encode(image).unique()) > 8
    assert (theirs(image) - ours.reconstruct(image)).abs().max() < 1e-4
    latent = ours.latent(image)
    assert torch.equal(full_matrix_words(latent, ours.codebook), ours.words_of(latent))


@pytest.mark.usefixtures("float32")
def test_the_plain_dat_step_learns_as_ours() -> None:
    batch, (ours, theirs), (tokenizer, plain_tokenizer) = make_batch(2, 64, CPU, classes=10), twins(), small_vqgans()
    attack = AttackConfig("released", eps=1.0, random_start=1.0)
    step, trainer = training_step(ours, WithDAT(tokenizer, attack, PLAIN), batch, CPU), Trainer(theirs)
    target, image = one_hot(batch["label"], 10).float(), batch["image"]
    for number in range(2):
        source = step_generator(0, number, 0, CPU)
        torch.rand((), generator=source)  # ours draws whether to start at random
        noise = torch.randn(image.shape, generator=source)
        plain = dat_step(theirs, trainer, plain_tokenizer, image, target, noise, eps=1.0)
        assert plain == pytest.approx(float(step()), rel=1e-3)


def test_the_plain_attack_wastes_what_ours_does_not() -> None:
    model, (_, tokenizer) = tiny().train(), small_vqgans()
    image, seen = torch.rand(2, 3, 64, 64), []
    model.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    head = model.net.get_classifier().weight
    filled: list[Tensor | None] = []

    def watched(view: Tensor) -> Tensor:
        filled.append(head.grad)
        return tokenizer(view)

    dat_step(model, Trainer(model), watched, image, one_hot(torch.tensor([0, 1]), 10).float(), torch.randn_like(image))
    assert len(seen) == 4, "clean, attack, thrown away, adversarial"
    assert filled[0] is None, "before the attack"
    assert filled[1] is not None, "after it"


def test_settings_of_torch_come_back() -> None:
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [one.allow_tf32 for one in settings], torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError, match="stop"), torch_defaults():
        assert torch.backends.cudnn.benchmark
        assert [one.allow_tf32 for one in settings] == [False, True]
        raise RuntimeError("stop")
    assert ([one.allow_tf32 for one in settings], torch.backends.cudnn.benchmark) == before


# ---- rows ----


@pytest.fixture
def short_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.GROUP", 0.0)


def work(seconds: float, megabytes: int = 1, sleep: float = 0.0) -> Callable[[], Step]:
    """Builds a step that takes memory and returns `seconds`, whether or not it takes them."""

    def step() -> float:
        torch.ones(megabytes, 250_000)
        time.sleep(sleep)
        return seconds

    return lambda: step


@pytest.mark.usefixtures("short_groups")
def test_a_row_tells_ratio_share_memory_and_goal() -> None:
    case = Case("x", work(0.01, 32), work(0.03, 128), batch=2, at_least=2.0, gflop=1e-3, returns_seconds=True)
    row = measure(case, 3, CPU, rate=1e9)
    assert (row.ratio, row.ours, row.baseline) == pytest.approx((3, 2 / 0.01, 2 / 0.03))
    assert row.spread == pytest.approx((3, 3))
    assert row.share == pytest.approx(0.2), "200 images/s of 1 MFLOP, at 1 GFLOP/s"
    assert row.memory == pytest.approx(0.032, abs=0.015)
    assert row.memory_baseline == pytest.approx(0.128, abs=0.015)
    assert row.met
    assert dataclasses.replace(row, ratio=1.9).met is False
    assert dataclasses.replace(row, share_at_least=0.3).met is False
    cost = measure(Case("x", work(0.03), work(0.01), at_most=2.0, is_cost=True, returns_seconds=True), 2, CPU)
    assert cost.ratio == pytest.approx(3)
    assert cost.met is False
    assert quartiles([5.0, 1.0, 2.0, 3.0, 4.0, 9.0, 7.0]) == (2.0, 7.0)


@pytest.mark.usefixtures("short_groups")
def test_the_wall_clock_and_the_time_that_is_waited() -> None:
    row = measure(Case("x", work(0, sleep=0.001), work(0, sleep=0.1)), 3, CPU)
    assert row.ratio is not None
    assert row.ratio > 5
    waits = measure(Case("x", work(0.02, sleep=0.02), returns_waiting=True, waiting_at_most=0.03), 2, CPU)
    assert waits.waiting is not None
    assert 0.1 < waits.waiting <= 1
    assert waits.met is False
    assert dataclasses.replace(waits, waiting=0.02).met


def test_what_does_not_run_is_told() -> None:
    row = measure(Case("x", work(0), at_least=1.0, skip_reason=NEEDS_GPU), 2, CPU)
    assert row.met is None
    assert NEEDS_GPU in row_texts(row)
    config = command.BenchmarkConfig(rounds=1)
    failed = command.measure_case(Case("broken", lambda: lambda: 1 / 0), config, CPU, 1.0)  # type: ignore[arg-type]
    assert failed.failed
    assert "division by zero" in failed.note
    assert as_json(Row("x", memory=math.nan))["memory"] is None, "JSON knows no nan"


def test_every_case_of_the_table_of_goals_has_a_row() -> None:
    for device in (CPU, torch.device("cuda")):
        cases = command.select_cases(command.BenchmarkConfig(), device)
        names = [f"{case.name} {case.against}" for case in cases]
        assert len(names) == len(set(names))
        assert {case.goal for case in cases} == {None, 1, *range(3, 12)}
    gpu = {case.name: case for case in mae.cases(True, torch.device("cuda"))}
    assert not any(case.skip_reason for case in gpu.values())
    assert gpu["mae_vit_huge_patch14 step"].at_least == 1.5
    assert gpu["mae_vit_huge_patch14 step"].share_at_least == 0.65
    assert [case.at_least for case in dat.cases(True, CPU) if case.name == "vit_base_patch16 DAT step"] == [4.0]
    assert all(case.skip_reason for case in finetune.cases(False, CPU) if "large" in case.name)


# ---- the command ----


@pytest.mark.usefixtures("short_groups")
def test_the_command_measures_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "performance.md"
    document.write_text("before\n\n<!-- table: cpu -->\nold\n<!-- end of table: cpu -->\n\nafter\n")
    monkeypatch.setattr(command, "store_rows", partial(store_rows, document=document, numbers=tmp_path))
    output = tmp_path / "found.json"
    flags = ["--quick", "--only", "mae_vit_demo", "large", "--rounds", "2", "--markdown", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["python -m benchmarks", *flags])
    command.main()
    found = json.loads(output.read_text())
    assert {"machine", "versions", "device", "load", "busy", "matrix_rates", "precision"} <= found.keys()
    assert set(found["matrix_rates"]) == {"bf16", "fp32"}
    demo = found["rows"][0]
    assert demo["name"] == "mae_vit_demo_patch8 step"
    assert demo["rounds"] == 2
    assert min(demo[name] for name in ("ours", "baseline", "ratio", "first", "memory", "memory_baseline")) > 0
    large = [row for row in found["rows"] if row["name"] == "vit_large_patch16 DAT step"]
    assert [row["note"] for row in large] == [NEEDS_GPU]
    printed, written = capsys.readouterr().out, document.read_text()
    assert "mae_vit_demo_patch8" in printed
    assert "TFLOP/s" in printed
    assert written.startswith("before\n\n<!--")
    assert written.endswith("after\n")
    assert "| mae_vit_demo_patch8 step" in written
    assert "old" not in written


def test_a_later_run_replaces_its_rows_alone(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text("<!-- table: cpu -->\n<!-- end of table: cpu -->\n")
    cases = [Case(name, lambda: lambda: None, batch=2) for name in ("one", "two", "three")]
    rows = [Row(case.name, batch=2, ours=1.0, rounds=3) for case in cases]
    facts: dict[str, Any] = {"machine": {"cores": 2}, "versions": {"torch": "2"}, "precision": "bf16", "load": 0.0}
    facts |= {"device": "cpu", "matrix_rates": {"bf16": 4e11}}

    def kept(time: str, *found: Row, **changed: Any) -> list[tuple[str, float, str]]:
        told = json.loads(
            store_rows({**facts, "time": time, **changed}, list(found), cases, document, tmp_path).read_text()
        )
        assert {row["run"] for row in told["rows"]} == set(told["runs"])
        return [(row["name"], row["ours"], row["run"]) for row in told["rows"]]

    assert kept("monday", rows[2], rows[0]) == [("one", 1, "monday"), ("three", 1, "monday")]
    newer = dataclasses.replace(rows[0], ours=2.0)
    after = kept("tuesday", newer, rows[1])
    assert after == [("one", 2, "tuesday"), ("two", 1, "tuesday"), ("three", 1, "monday")]
    text = document.read_text()
    assert "run of monday: 1 rows; matrix rates bf16 0.4 TFLOP/s" in text
    assert text.index("| one |") < text.index("| two |") < text.index("| three |")
    cases.pop(1)
    assert [name for name, *_ in kept("wednesday", newer)] == ["one", "three"]
    assert kept("friday", rows[0], versions={"torch": "3"}) == [("one", 1, "friday")]
    document.write_text("no place")
    with pytest.raises(ValueError, match="no place for a table"):
        kept("sunday", *rows)


def test_no_case_is_begun_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    flags = ["--only", "mae_vit_demo", "--minutes", "1e-9", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["python -m benchmarks", *flags])
    command.main()
    assert [row["note"] for row in json.loads(output.read_text())["rows"]] == [command.OUT_OF_TIME]
    with pytest.raises(ConfigError, match="minutes 0: give more"):
        command.BenchmarkConfig(minutes=0)


def test_a_mistyped_case_is_answered() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*checkpoint"):
        command.select_cases(command.BenchmarkConfig(only=("checkpiont",)), CPU)
    with pytest.raises(ConfigError, match="rounds"):
        command.BenchmarkConfig(rounds=0)


# ---- where the time goes ----


def test_the_operators_of_a_step_add_up_to_its_work() -> None:
    one = torch.rand(256, 256)
    shares = operators_of(lambda: one @ one @ one + 1, 2, CPU)
    assert shares[0][:2] == ("aten::mm", 2)
    assert "aten::add" in [name for name, _, _ in shares]
    assert all(earlier[2] >= later[2] for earlier, later in itertools.pairwise(shares))


def test_the_functions_of_a_step_are_named_with_their_file() -> None:
    def slow() -> int:
        return sum(number * number for number in range(20_000))

    shares = functions_of(slow, 2)
    assert "test_benchmarks.py: <genexpr>" in [name for name, _, _ in shares]
    assert ("test_benchmarks.py: slow", 1) in [one[:2] for one in shares]


def test_a_profile_is_told_of_the_case_that_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["operators", "--only", "vit_demo_patch8 fine-tuning", "--steps", "1", "--top", "3"]
    )
    operators.main()
    told = capsys.readouterr().out
    assert "vit_demo_patch8 fine-tuning step" in told
    assert "aten::" in told
    assert "everything else" in told
    monkeypatch.setattr("sys.argv", ["operators"])
    with pytest.raises(ConfigError, match="at least one case"):
        operators.main()

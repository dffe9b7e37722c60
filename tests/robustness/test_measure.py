"""Counting cells: memory that does not grow with them, batches made as they are asked for, attacks that are heard, and
bfloat16 held against float32."""

import dataclasses
import gc
import itertools
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from built_suites import open_sources, suite_from
from evaluated_models import Linear, dataset  # noqa: F401 - dataset is a fixture
from quiet_evaluation import evaluate
from torch import Tensor, nn

from mae_dat.attacks.checks import CHECK_PASSES
from mae_dat.config.errors import ConfigError, NumericsError
from mae_dat.robustness.checks import check_attacks
from mae_dat.robustness.evaluation import print_headline, run_evaluation
from mae_dat.robustness.evaluation_plan import open_evaluation_plan
from mae_dat.robustness.examples import write_examples
from mae_dat.robustness.measure import ImagePass, PassSampler, measure_passes
from mae_dat.robustness.network import EvalOptions
from mae_dat.robustness.open_networks import open_callable
from mae_dat.robustness.report.tables import precision_text
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.robustness.suites.base import SuiteSettings
from mae_dat.runtime import watchdog as watch
from mae_dat.runtime.console import Console
from mae_dat.runtime.world import World

CPU = torch.device("cpu")


def tensor_bytes() -> int:
    """Of all tensors that are alive."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) is Tensor and one.layout == torch.strided]
    return sum({one.untyped_storage().data_ptr(): one.nbytes for one in tensors}.values())


def clean(root: Path) -> ImagePass:
    """The images of a folder as one cell."""
    return suite_from(open_sources(root), "clean").passes[0]


def test_memory_does_not_grow_with_the_cells(dataset: Path) -> None:  # noqa: F811
    """Twelve cells, whose images take 3 MB as floats."""
    network, image_pass = Linear().eval(), clean(dataset)
    held = {}
    for at, _ in enumerate(measure_passes({"net": network}, [(image_pass, ["net"])] * 12, batch_size=8, device=CPU)):
        if at in (1, 11):
            held[at] = tensor_bytes()
    assert held[11] <= held[1] + 100_000


def test_batches_are_made_as_they_are_asked_for(dataset: Path) -> None:  # noqa: F811
    """Every key once over ranks and batches, and no list of the millions that ImageNet-C has."""
    image_pass = clean(dataset)
    for size, batch in ((1, 7), (3, 4), (23, 5)):
        shares = [PassSampler([image_pass, image_pass], World(rank, size), batch) for rank in range(size)]
        keys = [key for one in shares for key in itertools.chain.from_iterable(one)]
        assert sorted(keys) == [(at, index) for at in range(2) for index in range(20)]
        assert all(len(list(one)) == len(one) == 2 * len(one.batches(0)) for one in shares)
        assert all(len(one) <= batch for own_ in shares for one in own_)
    many = PassSampler([image_pass] * 100_000, World(), 1)
    tracemalloc.start()
    try:
        assert next(iter(many)) == [(0, 0)]
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert len(many) == 2_000_000


def test_images_that_share_their_chance_meet_in_the_same_batches_on_any_number_of_ranks(dataset: Path) -> None:  # noqa: F811
    image_pass = dataclasses.replace(clean(dataset), fixed_batches=True)
    every = list(PassSampler([image_pass], World(), 6))
    assert [len(batch) for batch in every] == [6, 6, 6, 2]
    for size in (2, 3, 7):
        found = [list(PassSampler([image_pass], World(rank, size), 6)) for rank in range(size)]
        assert sorted(itertools.chain.from_iterable(found)) == every
    pytest.importorskip("torchattacks")
    assert all(one.fixed_batches for one in suite_from(open_sources(dataset), "autoattack-4/255").passes)


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A watchdog's pipe: its one element is the end to read beats from."""
    heard, told = os.pipe()
    os.set_blocking(heard, False)
    os.set_blocking(told, False)
    monkeypatch.setattr(watch, "_heartbeat_pipe", told)
    return [heard]


def count_of(pipe: list[int]) -> int:
    try:
        return len(os.read(pipe[0], 1 << 16))
    except BlockingIOError:
        return 0


def test_every_pass_of_an_attack_and_of_its_checks_beats(dataset: Path, beats: list[int]) -> None:  # noqa: F811
    """One batch of an attack, or the checks on a large network, may take longer than the watchdog waits."""
    network = Linear()
    evaluate(network, "clean", dataset, input_size=32)
    assert count_of(beats) == 1
    evaluate(network, "pgd-20-l2-0.5", dataset, input_size=32)
    assert count_of(beats) == 20 + 1 + 1 + CHECK_PASSES  # gradients, the answer, the batch, the checks
    sources = open_sources(dataset)
    for name, least in (("words-symbolic", 9), ("words-random", 5)):
        (image_pass,) = suite_from(sources, name).passes
        for _ in measure_passes({"net": network}, [(image_pass, ["net"])], batch_size=64, device=CPU):
            assert count_of(beats) > least


def test_a_look_for_examples_beats_on_every_rank(dataset: Path, beats: list[int], tmp_path: Path) -> None:  # noqa: F811
    """A batch for each network after reading an image, also where nothing is written."""
    networks = {"one": Linear(), "other": Linear(seed=1)}
    evaluate(networks, "clean", dataset, input_size=32)
    without = count_of(beats)
    evaluate(networks, "clean", dataset, input_size=32, output_dir=tmp_path)
    assert count_of(beats) == without + 20 + 2 * 2
    view = EvalOptions(CPU, size=(32, 32))
    plan = open_evaluation_plan(
        [open_callable(one, name, view) for name, one in networks.items()], SuiteSettings(dataset), ["clean"]
    )
    files = sorted(tmp_path.rglob("*"))
    assert write_examples(plan, ("one", "other"), None) == write_examples(plan, ("one", "other"), tmp_path) != []
    assert sorted(tmp_path.rglob("*")) == files
    assert count_of(beats) == 2 * (20 + 2 * 2)


def test_autoattacks_gradients_are_checked_too(dataset: Path) -> None:  # noqa: F811
    pytest.importorskip("torchattacks")
    view = EvalOptions(CPU, size=(32, 32))
    plan = open_evaluation_plan([open_callable(Linear(), "net", view)], SuiteSettings(dataset), ["autoattack-4/255"])
    (found,) = check_attacks(plan, {}, EvaluationSetup(view, None, Console(quiet=True)))["net"].values()
    assert {check["name"] for check in found} >= {"gradients", "PGD beats FGSM"}


def test_progress_tells_of_passes_before_the_first_batch_is_done(
    dataset: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    console = Console(interval=0.0)
    console.live = False
    with caplog.at_level("INFO"):
        view = EvalOptions(CPU, size=(32, 32))
        setup, networks = EvaluationSetup(view, None, console), [open_callable(Linear(), "net", view)]
        run_evaluation(networks, SuiteSettings(dataset), ["pgd-5-1/255"], setup, title="")
    lines = [one for one in caplog.messages if one.startswith("pgd-5-1/255: image")]
    assert lines[0].split() == ["pgd-5-1/255:", "image", "0/20", "1", "passes"]
    assert "20/20  6 passes  0:00 left" in lines[-1]
    assert any("pass 99/99" in one for one in caplog.messages)


class Close(nn.Module):
    """Answers 0 where its linear layer keeps the first pixel's value, 1 where that was rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, image: Tensor) -> Tensor:
        exact = image[:, :, 0, 0]
        kept = nn.functional.linear(exact, self.weight).float()
        logits = torch.zeros(len(image), 10) - 1
        logits[:, 0], logits[:, 1] = 1e-6, (kept - exact).abs().amax(1)
        return logits


def test_what_bfloat16_changes_is_counted_and_told(dataset: Path) -> None:  # noqa: F811
    network, images = Close(), clean(dataset).images
    pixels = torch.stack([images[index]["image"][:, 0, 0] for index in range(20)])
    changed = int((pixels.bfloat16().float() != pixels).any(1).sum())
    assert changed > 0
    results = evaluate(network, "clean", dataset, input_size=32, precision="bf16")
    count = results["agreement"]["Close"]
    assert (count["correct"], count["total"]) == (20 - changed, 20)
    assert list(results["cells"]["Close"]) == ["clean"]
    message = precision_text(results["models"]["Close"], results["agreement"]["Close"])
    verb = "differs" if changed == 1 else "differ"
    assert message == f"bf16; {changed} of 20 predictions {verb} from fp32 ({5 * changed}.00 %), above 0.02 %"
    exact = evaluate(network, "clean", dataset, input_size=32)
    assert exact["agreement"] == {}
    assert precision_text(exact["models"]["Close"], exact["agreement"].get("Close")) == "fp32"


def test_a_limit_is_said_before_the_numbers(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    for limit, message in ((8, "Not the whole benchmarks: 8 of 20 images (seed 0)"), (None, "")):
        print_headline(evaluate(Linear(), "clean", dataset, input_size=32, limit=limit))
        lines = capsys.readouterr().out.splitlines()
        first = next(line for line in lines if not line.startswith("Caution: Linear (collapsed)"))
        assert first.startswith(message)
        assert ("Not the whole" in first) == (limit is not None)


def test_what_cannot_work_is_said_before_anything_is_read(dataset: Path) -> None:  # noqa: F811
    wrong: list[dict[str, Any]] = [{"batch_size": 0}, {"num_workers": -1}]
    for setting in wrong:
        with pytest.raises(ConfigError, match="give at least 1 image, and 0 or more workers"):
            evaluate(Linear(), "clean", dataset, input_size=32, **setting)
    damaged = Linear()
    damaged[2].weight.data.fill_(torch.nan)
    with pytest.raises(NumericsError, match="gives NaN or infinite logits for a blank image"):
        evaluate(damaged, "clean", dataset, input_size=32)

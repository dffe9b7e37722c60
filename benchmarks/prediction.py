"""Predicting new images against evaluating them: the same images, network, batches and workers.

A prediction also writes its rows to files, and keeps the probabilities instead of counts. What a loader needs until the
first batch is left out on both sides, as in benchmarks/evaluation.py.
"""

import atexit
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from benchmarks.evaluation import Timed, Work
from benchmarks.timing import Case, Step, wait_for
from mae_dat.config.commands.predict import PredictConfig
from mae_dat.data.generated.draw import draw_image
from mae_dat.data.inputs import open_inputs
from mae_dat.models.classifier import build_classifier
from mae_dat.prediction.predictors import ClassPredictor
from mae_dat.prediction.run import PredictionRun
from mae_dat.robustness.measure import measure_passes
from mae_dat.robustness.network import EvalOptions, EvaluatedNetwork
from mae_dat.robustness.open_networks import open_callable
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.robustness.suites.base import CLEAN, NetworkInput, SuiteSettings
from mae_dat.robustness.suites.sources import SuiteSources
from mae_dat.robustness.suites.specs import build_suite
from mae_dat.runtime.console import Console
from mae_dat.runtime.device import amp_dtype

AGAINST = "mae-dat evaluate, clean images"
AT_LEAST = 0.9
CLASSES = 10
SIDE = 320  # of the stored images, in pixels


@functools.cache
def stored_images(count: int) -> Path:
    """Write so many images as val/CLASS/*.jpg into a folder that is deleted when the process ends."""
    root = tempfile.TemporaryDirectory(prefix="predicted-")
    atexit.register(root.cleanup)
    for index in range(count):
        path = Path(root.name, "val", f"{index % CLASSES}", f"{index:05d}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_image(0, "val", index, size=SIDE).image).save(path, quality=90)
    return Path(root.name)


@dataclasses.dataclass(frozen=True)
class Setting:
    """An opened network that notes when it was first called, and how images are passed through it."""

    work: Work
    network: EvaluatedNetwork
    timed: Timed
    setup: EvaluationSetup


def build(work: Work) -> Setting:
    """Open the network."""
    torch.manual_seed(0)
    options = EvalOptions(work.device, amp_dtype(work.precision, work.device))
    network = open_callable(build_classifier(work.model, CLASSES, 224), "net", options)
    timed = Timed(network.model)  # type: ignore[arg-type]
    folder = Path(tempfile.mkdtemp(dir=stored_images(work.images)))
    setup = EvaluationSetup(options, folder, Console(quiet=True), batch_size=work.batch, num_workers=work.workers)
    return Setting(work, dataclasses.replace(network, model=timed), timed, setup)


def predict(setting: Setting) -> None:
    """Predict the images and write the files."""
    names = tuple(map(str, range(CLASSES)))
    predictor = ClassPredictor(setting.network, names, "given", names_are_known=True)
    inputs = open_inputs(stored_images(setting.work.images) / "val")
    PredictionRun(predictor, inputs, setting.setup, PredictConfig(images=()), temperature=1.0).predict()


def evaluate(setting: Setting) -> None:
    """Count the correct predictions."""
    network, setup = setting.network, setting.setup
    sources = SuiteSources(SuiteSettings(stored_images(setting.work.images)), CLASSES)
    suite = build_suite(CLEAN, sources, NetworkInput(network.size, network.facts["interpolation"]))
    measured = measure_passes(
        {"net": network.model},
        [(image_pass, ["net"]) for image_pass in suite.passes],
        batch_size=setup.batch_size,
        num_workers=setup.num_workers,
        device=setup.options.device,
        precision=setup.options.precision,
    )
    for _, counts in measured:
        assert counts["net"].counts[""]["total"] == setting.work.images


def cases(quick: bool, device: torch.device) -> list[Case]:
    """A small network, where everything but the network weighs most."""
    if device.type == "cuda":
        return [_case(Work("vit_tiny_patch16_224", 1, 512 if quick else 4096, 256, device))]
    return [_case(Work("vit_tiny_patch16_224", 1, 64 if quick else 256, 32, device))]


def _case(work: Work) -> Case:
    def version(act: Callable[[Setting], None]) -> Callable[[], Step]:
        def built() -> Step:
            setting = build(work)

            def seconds() -> float:
                setting.timed.first = 0.0
                act(setting)
                wait_for(work.device)
                return time.perf_counter() - setting.timed.first

            return seconds

        return built

    name = f"prediction, {work.model}"
    settings = {"against": AGAINST, "batch": work.total, "goal": 11, "at_least": AT_LEAST, "returns_seconds": True}
    return Case(name, version(predict), version(evaluate), **settings)  # type: ignore[arg-type]

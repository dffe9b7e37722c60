"""Fixtures for every test: no network, one thread, fixed seeds, recorded reference outputs; tiny images and models."""

import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports huggingface_hub: a forgotten `pretrained=True` must fail at once, not after a network timeout.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from noise_images import MakeFolder, write_images
from paths import GOLDEN

torch.set_num_threads(1)

# A shell starts its background commands deaf to Ctrl-C, and they hand that on: the commands under test must hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same global random state, so that its outcome depends on no other test."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Return a loader: `golden("mae_tiny")["images"]` is an array of tests/golden/mae_tiny.npz."""

    def load(name: str) -> dict[str, np.ndarray]:
        path = GOLDEN / f"{name}.npz"
        assert path.exists(), f"{path} is missing: reference outputs belong to the repository"
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return load


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands run in this process point the log at the standard error of their test, which is closed afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def make(tmp_path: Path) -> MakeFolder:
    """Return a function that writes noise images of the given names to a folder, and returns the folder."""
    return lambda names: write_images(tmp_path, names)


# ---- tiny images and models; what they need is imported when they are used ----


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 24 training, 20 validation and 20 conflicting images of ten classes, 32 px."""
    from tiny_runs import draw_folder

    return draw_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def pretrained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a pretraining on `images`."""
    from tiny_runs import pretrain_in

    return pretrain_in(tmp_path_factory.mktemp("pretrained"), images)


@pytest.fixture(scope="module")
def classifier(images: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a fine-tuning on `images`, which began with the weights of `pretrained`."""
    from tiny_runs import finetune_in

    output = tmp_path_factory.mktemp("classifier")
    finetune_in(output, images, "--finetune", str(pretrained))
    return output

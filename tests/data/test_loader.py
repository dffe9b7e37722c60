"""Loaders: the same samples from any number of workers, and errors as they are."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from noise_images import MakeFolder
from paths import ROOT
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from mae_dat.config.errors import DataError
from mae_dat.data.image_set import Batch, ImageFolder
from mae_dat.data.loader import eval_loader, train_loader
from mae_dat.data.sampler import TrainSampler
from mae_dat.data.transforms import EvalTransform, PretrainTransform, finetune_transform


def random_states() -> tuple[object, bytes, bytes]:
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


def batches(root: Path, num_workers: int, start_step: int = 0) -> list[Batch]:
    folder = ImageFolder(root, finetune_transform((16, 16), reprob=1.0, aa="rand-m9-mstd0.5-inc1"), seed=1)
    sampler = TrainSampler(len(folder), 3, 0, 1, seed=1, start_step=start_step, total_steps=5)
    return list(train_loader(folder, sampler, num_workers))


def same(left: list[Batch], right: list[Batch]) -> bool:
    keys = ("image", "label", "index", "skipped")
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in keys)  # type: ignore[literal-required]


def test_samples_do_not_depend_on_workers_or_on_global_randomness(make: MakeFolder) -> None:
    root = make("a/1.png a/2.png a/3.png b/4.png b/5.png b/6.png b/7.png")
    before = random_states()
    first = batches(root, num_workers=0)
    assert random_states() == before, "the global generators are left as they were"
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    before = random_states()
    assert same(first, batches(root, num_workers=2))
    assert random_states() == before
    assert same(first[3:], batches(root, num_workers=0, start_step=3))
    assert first[0]["image"].shape == (3, 3, 16, 16)
    assert first[0]["label"].dtype == torch.int64


LONG_FOLDER = """
import sys, torch
from mae_dat.data.loader import map_in_workers
found = list(map_in_workers(lambda number: torch.full((3,), number), range(4), 1))
print([int(one.sum()) for one in found])
"""


def test_workers_start_where_the_temporary_folder_is_too_long_for_sockets(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * (120 - len(str(tmp_path))))
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LONG_FOLDER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("[0, 3, 6, 9]\n", "", 0)
    assert not list(folder.iterdir())


def test_augmentation_differs_by_epoch_and_index(make: MakeFolder) -> None:
    root = make("a/1.png")
    (root / "a" / "2.png").write_bytes((root / "a" / "1.png").read_bytes())
    folder = ImageFolder(root, PretrainTransform((16, 16)))
    assert torch.equal(folder[(0, 0)]["image"], folder[(0, 0)]["image"])
    assert torch.equal(folder[0]["image"], folder[(0, 0)]["image"])
    assert not torch.equal(folder[(0, 0)]["image"], folder[(1, 0)]["image"])
    assert not torch.equal(folder[(0, 0)]["image"], folder[(0, 1)]["image"])
    other = ImageFolder(root, PretrainTransform((16, 16)), seed=1)
    assert not torch.equal(folder[(0, 0)]["image"], other[(0, 0)]["image"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_reaches_the_main_process_as_a_plain_message(num_workers: int, make: MakeFolder) -> None:
    root = make("a/1.png a/2.png a/3.png")
    (root / "a" / "2.png").write_bytes(b"<html>")
    folder = ImageFolder(root, to_tensor)
    with pytest.raises(DataError, match=r"2\.png: it is a web page") as caught:
        list(eval_loader(folder, 3, 0, 1, num_workers))
    assert "Traceback" not in str(caught.value)


LEAVES_A_LOADER = """
import multiprocessing, os, signal, sys
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.loader import eval_loader
from mae_dat.data.transforms import EvalTransform
loader = eval_loader(ImageFolder(sys.argv[1], EvalTransform((16, 16))), 1, 0, 1, num_workers=1)
batches = iter(loader)
next(batches)
(worker,) = multiprocessing.active_children()
os.kill(worker.pid, signal.SIGTERM)
next(batches)
print("read on")
"""


def test_a_workers_sigterm_is_ignored_while_the_run_lasts_and_ends_it_at_exit(make: MakeFolder) -> None:
    # The loader is still alive when Python exits, which ends its workers by SIGTERM and waits for them without limit.
    command = [sys.executable, "-c", LEAVES_A_LOADER, str(make("a/1.png a/2.png a/3.png"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (0, "read on\n"), done.stderr


def test_an_error_of_ours_is_not_swallowed(make: MakeFolder) -> None:
    def broken(image: Image.Image) -> Tensor:
        raise RuntimeError("a fault in the transform")

    folder = ImageFolder(make("a/1.png"), broken)
    with pytest.raises(RuntimeError, match="a fault in the transform"):
        list(eval_loader(folder, 1, 0, 1, num_workers=0))


def test_exact_evaluation_over_ranks(make: MakeFolder) -> None:
    root = make("a/1.png a/2.png a/3.png b/4.png b/5.png")
    folder = ImageFolder(root, EvalTransform((16, 16)))
    shares = [list(eval_loader(folder, 2, rank, 2, num_workers=0)) for rank in (0, 1)]
    indices = [torch.cat([batch["index"] for batch in share]).tolist() for share in shares]
    assert indices == [[0, 2, 4], [1, 3]]
    assert [len(batch["label"]) for batch in shares[0]] == [2, 1]

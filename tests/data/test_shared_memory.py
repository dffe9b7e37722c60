"""Batches through a full /dev/shm: a real, tiny one in a mount namespace of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import ROOT, draw_folder, environment
from torch.utils.data import default_collate

from mae_dat.data.shared_memory import PipedBatch, is_shared_memory_error

READ = """
import sys, torch
from torchvision.transforms.functional import to_tensor
from mae_dat.data import loader
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.loader import eval_loader
loader.available_cores = lambda: 2
images = ImageFolder(sys.argv[1], to_tensor)
piped, plain = (list(eval_loader(images, 24, 0, 1, workers)) for workers in (2, 0))
assert len(piped) == 1
for one, other in zip(piped, plain, strict=True):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
print("equal")
"""


@pytest.mark.parametrize(
    ("size", "message"), [("2m", "/dev/shm has 2 of 2 MB free"), ("64k", "/dev/shm is full: images are decoded in the")]
)
def test_batches_that_do_not_fit_are_the_same_through_pipes(size: str, message: str, tmp_path: Path) -> None:
    data = draw_folder(tmp_path, val=0, conflict=0, size=160)  # a batch of 7 MB
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    command += [sys.executable, "-c", READ, str(data / "train")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout == "equal\n", done.stderr
    assert message in done.stderr
    assert "docker run --shm-size=8g" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_piped_batch_is_an_ordinary_one() -> None:
    samples = [
        {"image": torch.full((3, 2, 2), index, dtype=torch.uint8), "label": index, "pair": (1.5, True), "name": "x"}
        for index in range(3)
    ]
    expected, piped = default_collate(samples), PipedBatch(samples).tensors()
    assert piped.keys() == expected.keys()
    assert piped["name"] == expected["name"]
    for key in ("image", "label"):
        assert torch.equal(piped[key], expected[key])
        assert piped[key].dtype == expected[key].dtype
    for one, other in zip(piped["pair"], expected["pair"], strict=True):
        assert torch.equal(one, other)


def test_other_errors_are_no_lack_of_shared_memory() -> None:
    assert not is_shared_memory_error(RuntimeError("stack expects each tensor to be equal size"))
    assert is_shared_memory_error(
        RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")
    )

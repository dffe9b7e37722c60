"""Without an optional package every command raises an error that names the extra, before any work."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from paths import ROOT

from mae_dat.analysis.explore import build_application
from mae_dat.attacks.auto_attack import require_auto_attack
from mae_dat.config.errors import MissingInputError
from mae_dat.config.extras import EXTRAS, require_extra
from mae_dat.data.shards.cache import _stream
from mae_dat.data.shards.pack import PackConfig, pack
from mae_dat.detection.measure import coco_scores
from mae_dat.detection.train import DetectConfig, detect, measure_detector
from mae_dat.models.weights.converters import to_onnx
from mae_dat.robustness.network import EvalOptions
from mae_dat.robustness.onnx_network import open_onnx
from mae_dat.runtime.console import Console

USES: list[tuple[str, Callable[[], object]]] = [
    ("onnx", lambda: open_onnx(Path("model.onnx"), "model", EvalOptions(torch.device("cpu")))),
    ("onnxscript", lambda: to_onnx(None, Path("model.onnx"), "model.onnx")),  # type: ignore[arg-type]
    ("webdataset", lambda: pack(PackConfig("images", "shards"), Console(quiet=True))),
    ("webdataset", lambda: _stream("gs://bucket/shard.tar", Path("shard.tar"), 1)),
    ("torchattacks", lambda: require_auto_attack(10)),
    ("torchmetrics", lambda: coco_scores([])),
    ("pycocotools", lambda: detect(DetectConfig(), Console(quiet=True))),
    ("pycocotools", lambda: measure_detector(DetectConfig(), Console(quiet=True))),
    ("nicegui", lambda: build_application([], [], "token")),
]


@pytest.mark.parametrize(("package", "use"), USES, ids=[f"{package}-{n}" for n, (package, _) in enumerate(USES)])
def test_a_missing_package_names_its_extra(
    package: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(MissingInputError, match=rf"needs .*{package}.*: pip install .*{package}"):
        use()


def packages_of(extra: str) -> set[str]:
    """The packages that an extra adds, by the name of their distribution."""
    requirements = map(Requirement, importlib.metadata.requires("mae-dat") or ())
    return {one.name for one in requirements if one.marker and one.marker.evaluate({"extra": extra})}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_has_the_packages_of_the_table(extra: str) -> None:
    """These distributions have the names of their imports."""
    assert packages_of(extra) == set(EXTRAS[extra])
    if extra != "autoattack":  # which is installed without its dependencies
        require_extra(extra, "a test")


def test_all_holds_the_extras_that_fit_together() -> None:
    """torchattacks requires versions of requests and idna that exclude current ones of NiceGUI."""
    fitting = [packages for extra, packages in EXTRAS.items() if extra != "autoattack"]
    assert packages_of("all") == set().union(*fitting)


def test_without_libgl_the_message_names_the_other_build(tmp_path: Path) -> None:
    """In a process whose OpenCV fails as opencv-python does on a server without libGL."""
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file: No such file')\n")
    code = """
import numpy
from mae_dat.config.parse import run_command

def main():
    from mae_dat.robustness.corruptions import corrupt_image
    corrupt_image(numpy.zeros((32, 32, 3), numpy.uint8), "fog", 1, seed=0)

run_command(main)
"""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == MissingInputError.exit_code, done.stderr
    assert done.stderr.startswith("error: OpenCV needs libGL")
    assert 'pip install "opencv-python-headless' in done.stderr


def test_the_required_opencv_links_no_graphics() -> None:
    """Its libraries are its own and those of every Linux."""
    import cv2

    if not cv2.version.headless:
        pytest.skip("opencv-python is installed; make setup installs opencv-python-headless")
    (library,) = Path(cv2.__file__).parent.glob("cv2*.so")
    linked = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    outside = {line.split()[0] for line in linked.splitlines() if " => /lib" in line or " => /usr" in line}
    assert not [name for name in outside if name.startswith(("libGL", "libX", "libxcb", "libglib", "libgthread"))]

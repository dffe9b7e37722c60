"""The wheel is complete: from an empty folder, without the checkout, verbs, recipes, data files and a training work."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from paths import ROOT
from tiny_runs import SMALL, draw_folder

from mae_dat.config.recipes import recipe_names
from mae_dat.verbs import VERBS


def build(out: Path, *what: str) -> Path:
    """Builds what is named, by default the source distribution and from it the wheel; returns the wheel."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *what, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def environment_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which sees the packages installed here, but no editable installation."""
    folder = tmp_path_factory.mktemp("environment")
    # uv makes environments without pip. find_spec("pip") would make setuptools' import hook give this process the
    # distutils of the standard library, with which setuptools, and so torch.compile, fail in later tests.
    has_pip = any(distributions(name="pip"))
    venv.create(folder, symlinks=True, with_pip=not has_pip)
    program = sys.executable if has_pip else str(folder / "bin" / "python")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # Python does not read the .pth files, such as those of editable installations, in folders named by a .pth file.
    (packages / "dependencies.pth").write_text("\n".join({sysconfig.get_path(kind) for kind in ("purelib", "platlib")}))
    install = ["-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([program, *install, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def run(environment: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of the environment in a folder, as a user would."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "MAE_DAT_HOME": str(cwd / "home")}
    program, *arguments = words
    command = [str(environment / "bin" / program), *arguments]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=900)


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    direct = build(tmp_path, "--wheel")
    assert direct.name == wheel.name
    with zipfile.ZipFile(direct) as one, zipfile.ZipFile(wheel) as other:
        assert one.namelist() == other.namelist()
        for name in one.namelist():
            assert one.read(name) == other.read(name), name


def test_the_wheel_holds_all_files_of_the_package_and_the_recipes(wheel: Path) -> None:
    package = [path for path in (ROOT / "mae_dat").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {str(path.relative_to(ROOT)) for path in package}
    expected |= {f"mae_dat/configs/{name}.yaml" for name in recipe_names()}
    found = names_in(wheel)
    assert {name for name in found if ".dist-info/" not in name} == expected
    licenses = {name.partition(".dist-info/licenses/")[2] for name in found} - {""}
    assert licenses == {
        "LICENSE",
        *(f"mae_dat/robustness/{name}/NOTICE" for name in ("corruptions/frost", "report/vega")),
    }


def test_the_source_distribution_holds_tests_and_documentation(wheel: Path) -> None:
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in ("Makefile", "constraints.txt", "main_finetune.py", "configs/small_finetune.yaml", "tests/test_cli.py"):
        assert path in names
    assert any(name.startswith("docs/") for name in names)


def test_every_verb_has_its_help_without_the_checkout(environment_folder: Path, tmp_path: Path) -> None:
    code = (
        "import contextlib, io, sys\n"
        "import mae_dat\n"
        "from mae_dat.cli import run\n"
        "from mae_dat.verbs import VERBS\n"
        f"assert mae_dat.__file__.startswith({str(environment_folder)!r}), mae_dat.__file__\n"
        f"assert {str(ROOT)!r} not in sys.path, sys.path\n"
        "for name in ('', *VERBS, 'submit'):\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(io.StringIO()):\n"
        "            run([*name.split(), '--help'])\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, name\n"
        "    print(name)\n"
    )
    done = run(environment_folder, tmp_path, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[1:-1] == [*VERBS, "submit"]


def test_recipes_are_listed_and_found(environment_folder: Path, tmp_path: Path) -> None:
    done = run(environment_folder, tmp_path, "mae-dat", "recipes")
    assert [line.split()[0] for line in done.stdout.splitlines()] == recipe_names()
    (tmp_path / "data").mkdir()
    words = ["submit", "--dry_run", "finetune", "--config", "small_finetune", "--data_path", "data"]
    done = run(environment_folder, tmp_path, "mae-dat", *words)
    assert done.returncode == 0, done.stderr
    assert "--config small_finetune" in done.stdout


@pytest.mark.slow
def test_a_classifier_is_fine_tuned_with_dat_and_evaluated(environment_folder: Path, tmp_path: Path) -> None:
    """By a recipe, with the tokenizer that the wheel holds."""
    draw_folder(tmp_path / "data", train=16, val=16)
    words = ["--config", "small_finetune", "--dat", "--data_path", "data", "--output_dir", "out", *SMALL]
    done = run(environment_folder, tmp_path, "mae-dat", "finetune", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    words = ["--checkpoint", "out", "--data_path", "data", "--suite", "clean", "generated", "--limit", "1"]
    done = run(
        environment_folder, tmp_path, "mae-dat", "evaluate", *words, "--output_dir", "report", "--num_workers", "0"
    )
    assert done.returncode == 0, done.stderr
    (cells,) = json.loads((tmp_path / "report" / "results.json").read_text())["cells"].values()
    assert set(cells) == {"clean", "generated"}
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.slow
def test_the_demo_runs(environment_folder: Path, tmp_path: Path) -> None:
    """All of it, with fewer and smaller images and one epoch."""
    draw_folder(tmp_path / "data")
    tiny = "--input_size 32 --batch_size 8 --epochs 1 --warmup_epochs 0 --num_workers 0"
    words = ["--data_path", "data", "--limit", "2", f"--pretrain_flags={tiny}", f"--finetune_flags={tiny}"]
    done = run(environment_folder, tmp_path, "mae-dat", "demo", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output" / "demo" / "report.html").is_file()

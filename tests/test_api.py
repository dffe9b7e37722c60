"""The Python API: every name of `mae_dat.__all__` imports, is documented with an example that runs, is listed in the
reference, and is seen by `dir`, `help`, tab completion and mypy."""

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jedi
import pytest
import torch
from tiny_runs import ROOT, environment

import mae_dat
from mae_dat.data.generated.folder import FolderSettings, write_image_folder

NAMES = [
    "AttackConfig", "Classifier", "FinetuneConfig", "MaskedAutoencoder", "PretrainConfig", "VisualTokenizer", "WithDAT",
    "convert", "corrupt", "create_model", "discrete_adversary", "evaluate", "extract_features", "finetune",
    "list_models", "load_model", "load_tokenizer", "predict", "pretrain",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images `photos`, in which the examples run."""
    root = tmp_path_factory.mktemp("examples")
    drawn = write_image_folder(root / "drawn", FolderSettings(train=8, val=20, conflict=0, silhouette=0, size=40))
    for split, count in (("train", 4), ("val", 3)):
        for old, new in (("disc", "cat"), ("ring", "dog")):
            (root / "photos" / split / new).mkdir(parents=True)
            files = sorted((drawn / "val" / old).iterdir())[:1] * count
            for number, file in enumerate(files):
                (root / "photos" / split / new / f"{number}.png").write_bytes(file.read_bytes())
    return root


def test_the_names_are_listed_once_and_exist() -> None:
    assert sorted(mae_dat.__all__) == sorted(NAMES) == sorted(mae_dat._MODULES)
    assert dir(mae_dat) == sorted([*NAMES, "__version__"])
    for name in NAMES:
        value = getattr(mae_dat, name)
        assert value is getattr(importlib.import_module(f"mae_dat.{mae_dat._MODULES[name]}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'finetun'"):
        mae_dat.finetun  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_has_an_example_that_runs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example imports mae_dat and what else it needs, and runs in a folder with photos/{train,val}/{cat,dog}."""
    value = getattr(mae_dat, name)
    text = inspect.getdoc(value) or ""
    assert len(text.split("\n\n")) > 1, "one sentence alone explains nothing"
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert example.examples, "no example"
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(example)
    assert results.failed == 0


def test_the_reference_lists_every_name() -> None:
    text = (ROOT / "docs" / "reference" / "api.md").read_text()
    assert sorted(re.findall(r"^::: mae_dat\.(\w+)$", text, re.MULTILINE)) == sorted(NAMES)


def test_completion_lists_the_names_and_the_flags() -> None:
    names = [completion.name for completion in jedi.Interpreter("mae_dat.", [{"mae_dat": mae_dat}]).complete()]
    assert {*NAMES} <= {*names}
    assert "models" not in names
    script = jedi.Script("import mae_dat\nmae_dat.", project=jedi.Project(ROOT))
    assert {*NAMES} <= {completion.name for completion in script.complete()}
    call = jedi.Interpreter("mae_dat.finetune(data_", [{"mae_dat": mae_dat}]).complete()
    assert "data_path=" in [completion.name_with_symbols for completion in call]


def test_importing_the_package_and_its_configurations_needs_no_torch() -> None:
    code = (
        "import mae_dat, sys; mae_dat.FinetuneConfig(); dir(mae_dat); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


CLIENT = """
from pathlib import Path

import mae_dat
import torch


def train(folder: Path) -> float:
    config = mae_dat.FinetuneConfig.from_yaml("small_finetune", data_path=folder, dat="released")
    result = mae_dat.finetune(config, epochs=3)
    print(config.command(), result.output_dir, result.weights)
    return result.scores["test_acc1"]


def use(folder: Path) -> None:
    model = mae_dat.load_model("out", device="cpu")
    names: tuple[str, ...] | None = model.classes
    evaluation = mae_dat.evaluate({"mine": model, "other": "resnet50"}, ["clean"], folder, limit=10)
    clean: float = evaluation.scores["mine: clean"]
    page: Path = evaluation.report("report")
    predictions = mae_dat.predict(model, ["photo.jpg"], top_k=3)
    labels: list[str | None] = predictions.labels()
    foggy: torch.Tensor = mae_dat.corrupt(torch.rand(1, 3, 64, 64), "fog")
    features = mae_dat.extract_features(model, folder)
    print(names, clean, page, labels, foggy, features.values.shape, mae_dat.list_models("vit"))
    print(mae_dat.convert("out", "my.safetensors", to="timm").path)


def own_loop(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    tokenizer: mae_dat.VisualTokenizer = mae_dat.load_tokenizer()
    dat = mae_dat.WithDAT(tokenizer=tokenizer, attack=mae_dat.AttackConfig(share=0.04))
    loss: torch.Tensor = dat(model, images, labels)
    adversary = mae_dat.discrete_adversary(images, lambda image: model(image).mean(), tokenizer)
    return loss + adversary.adversarial.mean()
"""


@pytest.mark.slow
def test_mypy_checks_a_client(tmp_path: Path) -> None:
    """In strict mode; and finds a wrong type and a name that does not exist."""
    wrong = 'import mae_dat\nx: int = mae_dat.list_models()\nmae_dat.corrupt(3, "fog")\nmae_dat.finetun()\n'
    (tmp_path / "client.py").write_text(CLIENT)
    (tmp_path / "wrong.py").write_text(wrong)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "client.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(MYPYPATH=str(ROOT)), capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[:2] for line in errors] == [["wrong.py", str(number)] for number in (2, 3, 4)], done.stdout

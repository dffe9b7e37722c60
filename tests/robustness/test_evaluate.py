"""`mae_dat.evaluate`: the models that it takes, and what it returns."""

import html
import inspect
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from evaluated_models import Linear, dataset  # noqa: F401
from tiny_runs import verb
from torch import nn

from mae_dat.config.commands.evaluate import EvaluateConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.flags import flags_of
from mae_dat.models.classifier import Classifier, build_classifier
from mae_dat.models.weights.named_models import load_model
from mae_dat.robustness.evaluate import evaluate
from mae_dat.robustness.scores.results import read_results
from mae_dat.robustness.suites.base import SuiteSettings
from mae_dat.robustness.suites.choose import choose_suites
from mae_dat.robustness.suites.sources import SuiteSources

QUIET: dict[str, Any] = {"progress": False, "num_workers": 0, "precision": "fp32", "device": "cpu"}


def tiny_timm(path: Path | None = None) -> nn.Module:
    """A small timm model of 32 px; with `path` also saved for `local-dir:PATH`."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=10)
    net.pretrained_cfg |= {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    if path:
        timm.models.save_for_hf(net, path, model_config={"num_classes": 10})
    return net


def test_it_prints_what_the_command_prints(
    dataset: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--checkpoint", "mae_dat_demo", "--data_path", str(dataset), "--suite", "clean", "generated"]
    flags += ["--limit", "4", "--output_dir", str(tmp_path / "command"), "--num_workers", "0", "--device", "cpu"]
    verb("evaluate")([*flags, "--precision", "fp32"])
    printed = capsys.readouterr().out
    evaluation = evaluate(
        "mae_dat_demo", ["clean", "generated"], dataset, limit=4, output_dir=tmp_path / "api", **QUIET
    )
    assert f"{evaluation}\n" == printed
    assert repr(evaluation) == str(evaluation)
    assert evaluation.output_dir == tmp_path / "api"
    stored = read_results(tmp_path / "api" / "results.json")
    assert (
        stored["cells"] == evaluation.results["cells"] == read_results(tmp_path / "command" / "results.json")["cells"]
    )
    assert stored["command"].startswith(f"mae_dat.evaluate(['mae_dat_demo'], data_path='{dataset}', suite=('clean', 'g")
    (clean,) = stored["cells"]["mae_dat_demo"]["clean"].values()
    assert evaluation.scores["clean"] == 100 * clean["correct"] / clean["total"]
    assert "generated/mean" in evaluation.scores


class Cells(HTMLParser):
    """The texts of a table's cells, and the tags that were opened and not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "table" in self.open:
            self.texts.append(data)


def test_several_models_stand_side_by_side(dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    models = {"a <b>": Linear(), "other": Linear(seed=1)}
    evaluation = evaluate(models, "clean", dataset, input_size=32, baseline="other", **QUIET)
    assert list(evaluation.results["models"]) == ["other", "a <b>"]
    assert set(evaluation.scores) == {"other: clean", "other: clean/ece", "a <b>: clean", "a <b>: clean/ece"}
    cells = Cells()
    cells.feed(evaluation._repr_html_())
    assert cells.open == []
    warning, *lines = str(evaluation).splitlines()  # a random network of few images predicts one class
    assert warning.startswith("Caution: a <b> (collapsed) predicts triangle for 100.0 % of the images of clean.")
    assert html.escape(warning) in evaluation._repr_html_()
    shown = [[*re.split(r"  +", line.strip())] for line in lines]
    assert cells.texts == [text for row in shown for text in row]
    page = evaluation.report(tmp_path / "report")
    assert page == tmp_path / "report" / "report.html"
    assert read_results(tmp_path / "report" / "results.json")["cells"] == evaluation.results["cells"]


def test_models_of_timm_are_given_by_name_or_as_modules(dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    net = tiny_timm(tmp_path / "net")
    models = {
        "name": f"local-dir:{tmp_path / 'net'}",
        "module": net,
        "ours": Classifier(net, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
    }
    evaluation = evaluate(models, "clean", dataset, input_size=32, **QUIET)
    name, module, ours = evaluation.results["cells"].values()
    assert name == module == ours
    facts = evaluation.results["models"]
    assert facts["name"]["normalization"] == facts["module"]["normalization"] == facts["ours"]["normalization"]
    assert facts["module"].get("crop") == facts["name"].get("crop")
    assert list(evaluate(net, "clean", dataset, **QUIET).results["models"]) == ["ResNet"]


def test_models_of_transformers_are_given_as_modules_or_folders(dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))
    processor = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(str(processor).replace("'", '"'))

    def by_hand(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(pixel_values=2 * images - 1).logits
        return logits

    models = {"pair": (model.eval(), processor), "folder": tmp_path, "by hand": by_hand}
    evaluation = evaluate(models, ["clean", "fgsm-1/255"], dataset, input_size=32, **QUIET)
    pair, folder, own = evaluation.results["cells"].values()
    assert pair == folder == own
    assert evaluation.results["models"]["folder"]["size"] == [32, 32]


def test_a_loaded_model_brings_its_classes(dataset: Path) -> None:  # noqa: F811
    by_name = evaluate("mae_dat_demo", "clean", dataset, **QUIET)
    loaded = evaluate(load_model("mae_dat_demo"), "clean", dataset, **QUIET)
    assert [*loaded.results["cells"].values()] == [*by_name.results["cells"].values()]
    assert loaded.results["models"]["Classifier"]["size"] == [64, 64]


def test_models_may_be_a_list(dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    evaluation = evaluate(["mae_dat_demo", Linear()], "clean", dataset, input_size=64, **QUIET)
    assert list(evaluation.results["models"]) == ["mae_dat_demo", "Linear"]
    with pytest.raises(ConfigError, match="two models have the same title"):
        evaluate([Linear(), Linear()], "clean", dataset, input_size=32, **QUIET)
    with pytest.raises(ConfigError, match="no models to evaluate"):
        evaluate({}, "clean", dataset, **QUIET)


@pytest.mark.parametrize(
    ("protocol", "interpolation", "preprocessing"),
    [
        ("native", "bicubic", "if not 32 x 32: resized to cover 36 x 36 (bicubic)"),
        ("dat", "bicubic", "protocol dat: resized to cover 36 x 36 (bicubic)"),
        ("imagenet-c", "bilinear", "protocol imagenet-c: if not 32 x 32: resized to cover 36 x 36 (bilinear)"),
        ("timm", "bicubic", "protocol timm: resized to cover 36 x 36 (bicubic)"),
    ],
)
def test_the_protocol_is_part_of_the_key_and_of_the_report(
    protocol: str,
    interpolation: str,
    preprocessing: str,
    dataset: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    evaluation = evaluate(Linear(), "clean", dataset, input_size=32, protocol=protocol, output_dir=tmp_path, **QUIET)
    facts = evaluation.results["models"]["Linear"]
    assert facts.get("protocol", "native") == protocol
    assert facts["interpolation"] == interpolation
    assert evaluation.results["suites"]["Linear"]["clean"]["protocol"]["preprocessing"].startswith(preprocessing)
    report = (tmp_path / "report.md").read_text()
    is_named = protocol != "native"
    assert (f"{protocol}: " in report) == str(evaluation).startswith(f"Protocol {protocol}: ") == is_named


def test_symbolic_words_compute_a_hundred_losses_by_default(dataset: Path) -> None:  # noqa: F811
    """Their number is part of the key, because it makes another adversary."""
    assert EvaluateConfig().suites.rescore == SuiteSettings(Path()).rescore == 100
    for rescore in (0, 5):
        flags = {"input_size": 32, "limit": 6, "rescore": rescore}
        results = evaluate(Linear(), "words-symbolic", dataset, **flags, **QUIET).results
        assert results["suites"]["Linear"]["words-symbolic"]["protocol"]["exact losses"] == str(rescore)
    with pytest.raises(ConfigError, match="--rescore -1: give a number of candidates, or 0 for none"):
        evaluate(Linear(), "words-symbolic", dataset, rescore=-1, **QUIET)


def test_timms_protocol_takes_the_crop_of_timms_configuration(dataset: Path) -> None:  # noqa: F811
    """Also for weights of ours in a timm model, which native evaluates with the usual crop."""
    net = tiny_timm()
    net.pretrained_cfg |= {"crop_pct": 0.9}
    model = Classifier(net, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    for protocol, crop in (("native", None), ("timm", 0.9)):
        results = evaluate(model, "clean", dataset, protocol=protocol, input_size=32, limit=4, **QUIET).results
        (facts,) = results["models"].values()
        assert facts.get("crop") == crop


@pytest.mark.parametrize("flags", [{"crop": 0.9}, {"interpolation": "bilinear"}])
def test_a_protocol_has_its_own_crop_and_interpolation(dataset: Path, flags: dict[str, Any]) -> None:  # noqa: F811
    (name,) = flags
    with pytest.raises(ConfigError, match=f"--protocol dat has its own crop and interpolation: leave out --{name}"):
        evaluate(Linear(), "clean", dataset, protocol="dat", **flags)


def test_the_signature_lists_the_flags_of_the_command() -> None:
    parameters = inspect.signature(evaluate).parameters
    assert list(parameters)[:3] == ["models", "suite", "data_path"]
    names = {flag.name for flag in flags_of(EvaluateConfig)}
    assert set(parameters) == (names - {"checkpoint", "model", "pretrained", "names", "hang_minutes"}) | {
        "models",
        "suites",
        "classes",
        "progress",
    }
    assert parameters["batch_size"].default == 64
    (limit,) = [flag for flag in flags_of(EvaluateConfig) if flag.name == "limit"]
    assert f"  limit = None: {limit.help[:50]}" in (evaluate.__doc__ or "")


def test_an_unknown_flag_raises_an_error_with_a_suggestion(dataset: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"evaluate has no argument 'batchsize': did you mean batch_size\?"):
        evaluate(Linear(), "clean", dataset, batchsize=3)
    with pytest.raises(ConfigError, match="no argument 'checkpoint'"):
        evaluate(Linear(), "clean", dataset, checkpoint="OUT")
    with pytest.raises(ConfigError, match="limit must be a whole number, or None, got 'few'"):
        evaluate(Linear(), "clean", dataset, limit="few")


def test_without_progress_nothing_is_printed(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    evaluate(build_classifier("vit_demo_patch8", 10, 32), "clean", dataset, **QUIET)
    assert capsys.readouterr() == ("", "")


def test_all_includes_the_symbolic_adversary_only_without_exact_losses(
    dataset: Path,  # noqa: F811
) -> None:
    for rescore in (0, 100):
        chosen, skipped = choose_suites(("all",), SuiteSources(SuiteSettings(dataset, rescore=rescore), 10))
        assert ("words-symbolic" in chosen) == (rescore == 0)
    assert skipped["words-symbolic"].startswith("takes up to 1,000 passes per image: name it")
    assert "words-symbolic" in choose_suites(("all", "words-symbolic"), SuiteSources(SuiteSettings(dataset), 10))[0]

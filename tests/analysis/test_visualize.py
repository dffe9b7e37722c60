"""Images from checkpoints as a user asks for them: files, pages, TensorBoard, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm import create_model
from tiny_runs import (
    Outcome,
    draw_folder,
    one_thread,  # noqa: F401 - used by itself
    outcome_of,
    save_tokenizer,
    verb,
)
from torch import nn

from mae_dat.analysis import visualize
from mae_dat.data.generated.draw import SHAPES
from mae_dat.models.classifier import build_classifier
from mae_dat.models.mae import build_mae
from mae_dat.storage.weight_files import write_weights

SIZE = 32
Draw = Callable[..., Outcome]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data") / "images", train=1, val=10, conflict=0) / "val"


def save(net: nn.Module, folder: Path, **facts: object) -> Path:
    """An output folder with these weights."""
    folder.mkdir()
    told = {"input_size": [SIZE, SIZE], "in_chans": 3, **facts}
    write_weights(folder / "model.safetensors", net.state_dict(), {"mae_dat": json.dumps(told)})
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = build_mae("mae_vit_demo_patch8", img_size=SIZE)
    folder = tmp_path_factory.mktemp("autoencoder") / "pre"
    return save(model, folder, kind="mae", model="mae_vit_demo_patch8", norm_pix_loss=True)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = build_classifier("vit_demo_patch8", 10, SIZE).net
    nn.init.normal_(net.head.weight, std=0.1)  # answers that differ from image to image
    folder = tmp_path_factory.mktemp("classifier") / "fine"
    facts = {"global_pool": True, "classes": list(SHAPES), "nb_classes": 10}
    return save(net, folder, kind="classifier", model="vit_demo_patch8", **facts)


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, images: Path) -> Draw:
    """Calls the command; its images are the generated ones unless others are named, and go into tmp_path/drawn."""

    def call(what: str, *arguments: object) -> Outcome:
        given = list(map(str, arguments))
        given += [] if "--images" in given else ["--images", str(images)]
        given += ["--output_dir", str(tmp_path / "drawn"), "--device", "cpu"]
        return outcome_of(verb("visualize"), [what, *given], monkeypatch, capsys)

    return call


def drawn(folder: Path) -> dict[str, np.ndarray]:
    """The images in a folder by name."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found[path.stem] = np.asarray(image)
    return found


def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All texts of the galleries drawn from now on: titles, captions and headings."""
    told: list[str] = []
    gallery = visualize.draw_gallery

    def listening(columns: list[tuple[str, torch.Tensor]], captions: object = (), heading: str = "", **more: int):  # type: ignore[no-untyped-def]
        told.extend([heading, *(title for title, _ in columns), *(text for row in captions for text in row)])  # type: ignore[attr-defined]
        return gallery(columns, captions, heading, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(visualize, "draw_gallery", listening)
    return told


def test_every_kind_goes_to_png_and_tensorboard(
    draw: Draw, autoencoder: Path, classifier: Path, tmp_path: Path
) -> None:
    for what, source in [
        ("reconstruction", ["--checkpoint", autoencoder]),
        ("attention", ["--checkpoint", classifier]),
        ("words", ["--input_size", SIZE]),
        ("adversary", ["--checkpoint", classifier, "--dat_share", 0.1]),
    ]:
        outcome = draw(what, *source, "--limit", 3)
        assert outcome.code == 0, outcome.stderr
        assert "wrote" in outcome.stderr
    pictures = drawn(tmp_path / "drawn")
    names = {"reconstruction", "attention", "words", "most_used_words", "codebook", "adversary", "changed_words"}
    assert pictures.keys() == names
    tags: dict[str, tuple[int, int]] = {}
    for path in (tmp_path / "drawn").glob("events*"):
        events = EventAccumulator(str(path), size_guidance={"images": 0}).Reload()
        for tag in events.Tags()["images"]:
            (event,) = events.Images(tag)
            tags[tag] = (event.height, event.width)
    assert tags == {f"visualize/{name}": picture.shape[:2] for name, picture in pictures.items()}


def test_pages_hold_what_was_asked_for(
    draw: Draw, autoencoder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = texts(monkeypatch)
    paged = draw("reconstruction", "--checkpoint", autoencoder, "--limit", "None", "--per_page", 4)
    assert paged.code == 0, paged.stderr
    assert drawn(tmp_path / "drawn").keys() == {f"reconstruction-{page}" for page in (1, 2, 3)}
    files = sorted("/".join(path.parts[-2:]) for path in images.rglob("*.png"))
    assert [text for text in told if text in files] == files, "each once, in the folder's order"
    one = next(images.rglob("*.png"))
    assert draw("reconstruction", "--checkpoint", autoencoder, "--images", one).code == 0
    assert "reconstruction" in drawn(tmp_path / "drawn")


def test_the_seed_draws_the_mask(draw: Draw, autoencoder: Path, tmp_path: Path) -> None:
    first = (draw("reconstruction", "--checkpoint", autoencoder), drawn(tmp_path / "drawn"))[1]
    again = (draw("reconstruction", "--checkpoint", autoencoder), drawn(tmp_path / "drawn"))[1]
    other = (draw("reconstruction", "--checkpoint", autoencoder, "--seed", 1), drawn(tmp_path / "drawn"))[1]
    assert np.array_equal(first["reconstruction"], again["reconstruction"])
    assert not np.array_equal(first["reconstruction"], other["reconstruction"])


@pytest.mark.parametrize("flags", [(), ("--no_norm_pix_loss",)])
def test_normalized_predictions_are_labeled(
    flags: tuple[str, ...], draw: Draw, autoencoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = texts(monkeypatch)
    assert draw("reconstruction", "--checkpoint", autoencoder, *flags, "--mask_ratio", 0.5).code == 0
    assert ("reconstruction\n(true patch statistics)" in told) == (not flags)
    assert "masked 50%" in told


def test_foreign_files_are_read(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = texts(monkeypatch)
    autoencoder = build_mae("mae_vit_demo_patch8")
    whole = {"model": autoencoder.state_dict()}
    encoder = {key: value for key, value in whole["model"].items() if not key.startswith(("decoder", "mask_token"))}
    torch.save(whole, tmp_path / "visualize.pth")
    torch.save({"model": encoder}, tmp_path / "pretrain.pth")
    torch.save(create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "resnet.pth")
    outcome = draw("reconstruction", "--checkpoint", tmp_path / "visualize.pth", "--limit", 1)
    assert outcome.code == 0, outcome.stderr
    assert "does not record whether it was trained with --norm_pix_loss" in outcome.stderr
    assert draw("attention", "--checkpoint", tmp_path / "pretrain.pth", "--limit", 1, "--block", 2).code == 0
    assert "pretrain.pth (mae_vit_demo_patch8): attention of the class token, block 2 of 5" in told
    given = ["--checkpoint", tmp_path / "resnet.pth", "--model", "resnet10t", "--input_size", SIZE, "--limit", 2]
    outcome = draw("adversary", *given, "--dat", "random")
    assert outcome.code == 0, outcome.stderr
    assert any(text.startswith("class ") for text in told)
    assert told[told.index("adversarial") - 3] == "resnet.pth (resnet10t), attacked by --dat random"


def test_an_attack_tells_what_it_changed(draw: Draw, classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = texts(monkeypatch)
    strong = ["--dat_eps", 8, "--dat_random_start", 0, "--amplify", 2]
    assert draw("adversary", "--checkpoint", classifier, "--limit", 1, *strong).code == 0
    heading, *titles = told[:6]
    assert heading == "fine (vit_demo_patch8), attacked by --dat released, eps 8"
    assert titles[3] == "difference × 2\n(to the decoded)"
    clean, decoded, adversarial, nothing, count = told[6:11]
    share = float(titles[4].removeprefix("changed words (").removesuffix("%)"))
    assert share > 5
    assert count == f"{round(share / 100 * 64)} of 64"
    assert clean.endswith("\narrow/00008.png")
    assert nothing == ""
    chances = [target_share(answer, "arrow") for answer in (clean, decoded, adversarial)]
    assert chances[2] < chances[1], "the attack lowers the probability of the image's class"


def target_share(caption: str, target: str) -> float:
    """The probability of the target in a caption, in percent."""
    (line,) = [line for line in caption.split("\n") if line.removeprefix("target ").startswith(f"{target} ")]
    return float(line.rpartition(" ")[2].removesuffix("%"))


def test_an_autoencoder_is_attacked_at_its_loss(draw: Draw, autoencoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = texts(monkeypatch)
    strong = ["--dat_eps", 8, "--dat_random_start", 0]
    assert draw("adversary", "--checkpoint", autoencoder, "--limit", 1, *strong).code == 0
    _, decoded, adversarial = (float(text.split()[1]) for text in told[6:9])
    assert adversarial > decoded


def test_other_sizes_and_tokenizers_fit(draw: Draw, classifier: Path, tmp_path: Path) -> None:
    wide = ["--input_size", 32, 48, "--rollout", "--query", "class", "--limit", 2]
    assert draw("attention", "--checkpoint", classifier, *wide).code == 0
    width = drawn(tmp_path / "drawn")["attention"].shape[1]
    assert width == 2 * 4 * 48 + 3 * 8, "two columns of images enlarged four times, and three gaps"
    tokenizer = save_tokenizer(tmp_path / "coarse.safetensors", factor=8)
    assert draw("words", "--tokenizer", tokenizer, "--input_size", 40, "--limit", 1).code == 0


def test_help_needs_no_checkpoint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        verb("visualize")(arguments)
        told = capsys.readouterr().out
        assert all(what in told for what in ("reconstruction", "attention", "words", "adversary"))
    with pytest.raises(SystemExit):
        verb("visualize")(["attention", "--help"])
    assert "--rollout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "arguments", "words"),
    [
        ("atention", [], ["visualize has no kind 'atention'", "did you mean attention"]),
        ("reconstruction", [], ["--checkpoint is missing"]),
        ("reconstruction", ["--checkpoint", "nowhere"], ["nowhere"]),
        ("reconstruction", ["--checkpoint", "{fine}"], ["fine (vit_demo_patch8) is a classifier"]),
        ("reconstruction", ["--checkpoint", "{encoder}"], ["encoder.pth (mae_vit_demo_patch8) has no decoder"]),
        ("adversary", ["--checkpoint", "{encoder}"], ["encoder.pth (mae_vit_demo_patch8) has no decoder"]),
        ("attention", ["--checkpoint", "{resnet}"], ["resnet.pth", "--model"]),
        ("attention", ["--checkpoint", "{resnet}", "--model", "resnet10t"], ["ResNet has no self-attention"]),
        (
            "attention",
            ["--checkpoint", "{resnet}", "--model", "vit_demo_patch8"],
            ["no classification head (head.weight)"],
        ),
        ("attention", ["--checkpoint", "{resnet}", "--model", "resnet10x"], ["resnet10x", "resnet10t"]),
        ("attention", ["--checkpoint", "{fine}", "--block", "9"], ["--block 9", "blocks 1 to 5"]),
        ("attention", ["--checkpoint", "{fine}", "--input_size", "36"], ["36 is not divisible", "32 or 40"]),
        ("attention", ["--checkpoint", "{broken}"], ["broken.pth"]),
        ("words", ["--input_size", "30"], ["not divisible", "--input_size 28 28"]),
        ("words", ["--tokenizer", "{fine}/model.safetensors"], ["model.safetensors", "not a VQGAN"]),
        ("words", ["--images", "nothing.jpg"], ["nothing.jpg does not exist"]),
        ("words", ["--images", "{empty}"], ["empty", "no images"]),
        ("words", ["--images", "{broken}"], ["broken.pth", "not an image"]),
        ("words", ["--limit", "0"], ["--limit must be at least 1"]),
        ("adversary", ["--checkpoint", "{fine}", "--dat", "none"], ["--dat none"]),
        ("reconstruction", ["--checkpoint", "{pre}", "--mask_ratio", "1"], ["mask ratio 1"]),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    what: str, arguments: list[str], words: list[str], draw: Draw, autoencoder: Path, classifier: Path, tmp_path: Path
) -> None:
    places = {name: tmp_path / name for name in ("empty", "broken.pth", "resnet.pth", "encoder.pth")}
    places["empty"].mkdir()
    places["broken.pth"].write_bytes(b"not a checkpoint")
    torch.save(create_model("resnet10t", num_classes=3).state_dict(), places["resnet.pth"])
    encoder = build_mae("mae_vit_demo_patch8").state_dict()
    torch.save(
        {key: value for key, value in encoder.items() if not key.startswith(("deco", "mask"))}, places["encoder.pth"]
    )
    named = {name.removesuffix(".pth"): str(place) for name, place in places.items()}
    named |= {"pre": str(autoencoder), "fine": str(classifier)}
    outcome = draw(what, *(argument.format(**named) for argument in arguments))
    assert outcome.code not in (0, 1), outcome.stderr
    assert "Traceback" not in outcome.stderr
    message = outcome.stderr.partition("error: ")[2]
    assert all(word in message for word in words), outcome.stderr
    assert not drawn(tmp_path / "drawn")

"""Networks rebuilt from their files alone, and conversions: what comes out gives the same outputs elsewhere."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from tiny_models import equal_states, tiny, tiny_mae
from tiny_runs import verb
from torch import Tensor

from golden_rule import fill_by_rule
from mae_dat.config.errors import CheckpointError, ConfigError, OutputError, UserError
from mae_dat.models.classifier import Classifier, build_classifier, build_vit
from mae_dat.models.mae import IMAGENET_STD, VIT_SIZES, MaskedAutoencoder, build_mae
from mae_dat.models.weights.convert import TOLERANCE, convert
from mae_dat.models.weights.converters import TIMM_NAMES, timm_arguments
from mae_dat.models.weights.formats import ModelFile
from mae_dat.models.weights.huggingface import HubClassifier, HubMaskedAutoencoder
from mae_dat.models.weights.load import load_autoencoder
from mae_dat.models.weights.open import ModelPlan, OpenedModel, open_model
from mae_dat.storage.weight_files import read_weights, write_weights

CLASSES = 7


def demo_classifier(pool: bool = True, size: Any = None) -> Classifier:
    model = build_classifier("vit_demo_patch8", CLASSES, size, global_pool=pool)
    model.net.load_state_dict(fill_by_rule(model.net))
    return model.eval()


def demo_mae(size: Any = 64) -> MaskedAutoencoder:
    model = build_mae("mae_vit_demo_patch8", img_size=size)
    model.load_state_dict(fill_by_rule(model))
    return model.eval()


def encoder_of(model: MaskedAutoencoder) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if not k.startswith("decoder_") and k != "mask_token"}


@pytest.fixture
def image() -> Tensor:
    return torch.rand(3, 3, 64, 64)


@pytest.fixture
def fine_tuned(tmp_path: Path) -> tuple[Classifier, str]:
    """A classifier as MAE's fine-tuning writes it, and its file."""
    model = demo_classifier()
    torch.save({"model": model.net.state_dict(), "epoch": 99}, tmp_path / "ft.pth")
    return model, str(tmp_path / "ft.pth")


@pytest.fixture
def pretrained(tmp_path: Path) -> tuple[MaskedAutoencoder, str]:
    """A masked autoencoder with decoder, and its file."""
    model = demo_mae()
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    return model, str(tmp_path / "mae.pth")


# ---- a network from its file alone ----


def test_a_fine_tuned_file_is_enough_for_its_classifier(fine_tuned: tuple[Classifier, str], image: Tensor) -> None:
    model, path = fine_tuned
    opened = open_model(path).model
    assert isinstance(opened, Classifier)
    assert not opened.training
    assert torch.equal(opened(image), model(image))


def test_easyrobust_statistics_become_the_networks(image: Tensor) -> None:
    model = demo_classifier(pool=False)
    state = {f"1.{key}": value for key, value in model.net.state_dict().items()}
    state |= {"0.mean": torch.tensor([0.1, 0.2, 0.3]), "0.std": torch.tensor(IMAGENET_STD)}
    opened = open_model({"state_dict": state}).model
    assert isinstance(opened, Classifier)
    assert opened.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert torch.equal(opened(image), model.net((image - opened.mean) / opened.std))


def test_a_pretraining_is_opened_with_or_without_its_decoder(image: Tensor) -> None:
    model = demo_mae()
    full, encoder = open_model(model.state_dict()).model, open_model(encoder_of(model)).model
    assert isinstance(full, MaskedAutoencoder)
    assert isinstance(encoder, MaskedAutoencoder)
    assert equal_states(full.state_dict(), model.state_dict())
    assert torch.equal(encoder.features(image), model.features(image))


def test_names_open_what_shapes_leave_open(image: Tensor) -> None:
    token = demo_classifier(pool=False)
    with pytest.raises(CheckpointError, match=r"may be from MAE or timm.*--model vit_demo_patch8"):
        open_model(token.net.state_dict())
    opened = open_model(token.net.state_dict(), "vit_demo_patch8").model
    assert torch.equal(opened(image), token(image))
    with pytest.raises(CheckpointError, match=r"does not record its architecture.*vit_base_patch16.*--model"):
        open_model(tiny().net.state_dict())
    with pytest.raises(CheckpointError, match="does not record its architecture"):
        open_model(timm.create_model("test_resnet", num_classes=5).state_dict())
    network = timm.create_model("test_resnet", num_classes=5).eval()
    resnet = open_model(network.state_dict(), "test_resnet").model
    assert torch.equal(resnet(image), network((image - resnet.mean) / resnet.std))


@pytest.mark.parametrize("name", ["test_vit", "vit_wee_patch16_reg1_gap_256", "test_resnet", "test_convnext"])
def test_timm_networks_of_every_shape_open_by_their_name(name: str) -> None:
    """A vision transformer with a class token, one with a register in its place, and others."""
    network = timm.create_model(name, num_classes=5).eval()
    opened = open_model(network.state_dict(), name).model
    image = torch.rand(1, *network.pretrained_cfg["input_size"])
    assert torch.equal(opened(image), network((image - opened.mean) / opened.std))


def test_a_linear_probes_normalization_becomes_part_of_its_head(image: Tensor) -> None:
    model = demo_classifier(pool=False)
    model.make_linear_probe()
    model.net.load_state_dict(fill_by_rule(model.net))
    opened = open_model({"model": model.eval().state_dict()}, "vit_demo_patch8").model
    torch.testing.assert_close(opened(image), model(image), rtol=1e-5, atol=1e-5)


def test_a_pretraining_is_no_classifier_and_the_reverse() -> None:
    with pytest.raises(CheckpointError, match="a pretraining without classes"):
        open_model(demo_mae().state_dict(), "test_vit")
    with pytest.raises(CheckpointError, match="is a classifier"):
        open_model(demo_classifier().state_dict(), "mae_vit_demo_patch8")
    with pytest.raises(ConfigError, match="did you mean vit_demo_patch8"):
        open_model(demo_classifier().state_dict(), "vit_demo_patch9")
    with pytest.raises(CheckpointError, match=r"no classification head \(fc\.weight\)"):
        open_model({"conv1.weight": torch.ones(2)}, "test_resnet")


def test_images_that_are_not_square(tmp_path: Path) -> None:
    model = demo_classifier(size=(32, 128))
    with pytest.raises(CheckpointError) as error:  # 4 x 16 patches: taken for 8 x 8 unless the file says better
        open_model({**model.net.state_dict(), "pos_embed": torch.ones(1, 1 + 40, 128)})
    assert "not square (40 patches)" in str(error.value)
    path, facts = tmp_path / "wide.safetensors", {"model": "vit_demo_patch8", "input_size": [32, 128]}
    write_weights(path, model.net.state_dict(), {"mae_dat": json.dumps(facts)})
    image = torch.rand(2, 3, 32, 128)
    assert torch.equal(open_model(path).model(image), model(image))
    convert(str(path), str(tmp_path / "again.safetensors"), "mae")
    assert torch.equal(open_model(tmp_path / "again.safetensors").model(image), model(image))


# ---- conversions ----


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_loads_the_classifier_with_the_same_logits(
    fine_tuned: tuple[Classifier, str], tmp_path: Path, image: Tensor, suffix: str
) -> None:
    model, path = fine_tuned
    said = str(convert(path, str(tmp_path / f"timm{suffix}"), "timm"))
    call = said[said.index("timm.create_model(") : said.index("\n)\n") + 2]
    network = eval(call, {"timm": timm}).eval()  # what a reader of the output would type
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(network((image - mean) / std), model(image), rtol=1e-6, atol=1e-6)
    assert "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)" in said


@pytest.mark.parametrize("name", ["vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"])
def test_timm_has_the_published_sizes_under_their_names(name: str) -> None:
    with torch.device("meta"):
        ours = build_vit(VIT_SIZES[name], 1000).state_dict()
        theirs = timm.create_model(TIMM_NAMES[name], num_classes=1000, global_pool="avg").state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_timm_models_keep_their_name() -> None:
    plan = ModelPlan("classifier", "test_vit", 5, (160, 160))
    opened = OpenedModel(build_classifier("test_vit", 5), plan, ModelFile({}, "classifier"), "test_vit")
    name, options = timm_arguments(opened)
    assert (name, options["num_classes"], options["pretrained_cfg_overlay"]["mean"]) == ("test_vit", 5, (0.5, 0.5, 0.5))
    assert "img_size" not in options


def test_timm_takes_the_encoder_of_a_pretraining(
    pretrained: tuple[MaskedAutoencoder, str], tmp_path: Path, image: Tensor
) -> None:
    model, path = pretrained
    said = str(convert(path, str(tmp_path / "encoder.safetensors"), "timm"))
    assert read_weights(tmp_path / "encoder.safetensors").tensors.keys() == encoder_of(model).keys()
    assert "num_classes=0" in said


def test_mae_layout_and_back(pretrained: tuple[MaskedAutoencoder, str], tmp_path: Path) -> None:
    model, path = pretrained
    convert(path, str(tmp_path / "a.safetensors"), "mae")
    convert(str(tmp_path / "a.safetensors"), str(tmp_path / "b.pth"), "mae")
    saved = torch.load(tmp_path / "b.pth", weights_only=True)
    assert equal_states(saved["model"], model.state_dict())
    resnet = timm.create_model("test_resnet", num_classes=5)
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ConfigError, match="no test_resnet: use --to timm"):
        convert(str(tmp_path / "resnet.pth"), str(tmp_path / "c.pth"), "mae", model="test_resnet")


def test_a_hub_folder_of_a_classifier(fine_tuned: tuple[Classifier, str], tmp_path: Path, image: Tensor) -> None:
    model, path = fine_tuned
    said = str(convert(path, str(tmp_path / "hub"), "hf", license="cc-by-nc-4.0"))
    again = HubClassifier.from_pretrained(tmp_path / "hub")
    assert torch.equal(again(image), model(image))
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert "ft.pth (MAE fine-tuned" in card
    assert "HubClassifier.from_pretrained" in said
    again.save_pretrained(tmp_path / "copy")  # what push_to_hub uploads
    assert torch.equal(HubClassifier.from_pretrained(tmp_path / "copy")(image), model(image))
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_a_hub_folder_of_a_pretraining(pretrained: tuple[MaskedAutoencoder, str], tmp_path: Path) -> None:
    model, path = pretrained
    convert(path, str(tmp_path / "full"), "hf")
    assert equal_states(HubMaskedAutoencoder.from_pretrained(tmp_path / "full").state_dict(), model.state_dict())
    torch.save(encoder_of(model), tmp_path / "encoder.pth")
    convert(str(tmp_path / "encoder.pth"), str(tmp_path / "encoder"), "hf")
    assert read_weights(tmp_path / "encoder" / "model.safetensors").tensors.keys() == encoder_of(model).keys()


def test_a_damaged_hub_folder_is_refused(fine_tuned: tuple[Classifier, str], tmp_path: Path) -> None:
    convert(fine_tuned[1], str(tmp_path / "hub"), "hf")
    file = tmp_path / "hub" / "model.safetensors"
    tensors = read_weights(file).tensors
    del tensors["blocks.1.attn.qkv.weight"]
    write_weights(file, tensors, {})
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.qkv\.weight .*missing"):
        HubClassifier.from_pretrained(tmp_path / "hub")
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        HubClassifier.from_pretrained(tmp_path / "hub")


@pytest.mark.slow
def test_onnx_gives_the_same_logits_for_any_batch(
    fine_tuned: tuple[Classifier, str], tmp_path: Path, image: Tensor
) -> None:
    model, path = fine_tuned
    convert(path, str(tmp_path / "ft.onnx"), "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "ft.onnx", providers=["CPUExecutionProvider"])
    for batch in (image[:1], image, image.repeat(3, 1, 1, 1)):
        found = torch.from_numpy(session.run(None, {"image": batch.numpy()})[0])
        torch.testing.assert_close(found, model(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11's own loader
def test_exported_programs_give_the_same_tokens_for_any_batch(
    pretrained: tuple[MaskedAutoencoder, str], tmp_path: Path, image: Tensor
) -> None:
    model, path = pretrained
    convert(path, str(tmp_path / "mae.pt2"), "export")
    program = torch.export.load(tmp_path / "mae.pt2").module()
    for batch in (image[:1], image):
        torch.testing.assert_close(program(batch), model.features(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", [0.5, float("nan")])
def test_outputs_that_differ_fail_the_conversion_and_leave_nothing(
    fine_tuned: tuple[Classifier, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: float
) -> None:
    dest = tmp_path / "timm.pth"
    dest.write_bytes(b"old")
    save = torch.save

    def damaged(tensors: dict[str, Tensor], file: Any) -> None:
        save({**tensors, "head.bias": tensors["head.bias"] + fault}, file)

    monkeypatch.setattr(torch, "save", damaged)
    with pytest.raises(CheckpointError, match=r"outputs differ by .* more than 1e-04"):
        convert(fine_tuned[1], str(dest), "timm")
    assert dest.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ft.pth", "timm.pth"]


@pytest.mark.parametrize(
    "to, dest, raised, message",
    [
        ("timm", "x.onnx", ConfigError, r"--to timm writes \.safetensors or \.pth"),
        ("onnx", "x.pth", ConfigError, r"--to onnx writes \.onnx"),
        ("timm", "ft.pth", OutputError, "the source itself"),
        ("hf", "", OutputError, "folder with other files"),
        ("hf", "ft.pth", OutputError, "the source itself"),
        ("timm", "none/x.pth", OutputError, "no folder"),
        ("timm", "/proc/v.pth", OutputError, r"cannot write to the output folder /proc: .*another destination"),
    ],
)
def test_destinations_that_cannot_be(
    fine_tuned: tuple[Classifier, str], tmp_path: Path, to: Any, dest: str, raised: type[UserError], message: str
) -> None:
    with pytest.raises(raised, match=message):
        convert(fine_tuned[1], str(tmp_path / dest), to)


def test_the_command(
    fine_tuned: tuple[Classifier, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    dest = str(tmp_path / "out.safetensors")
    verb("convert")([fine_tuned[1], dest, "--to", "timm"])
    said = capsys.readouterr()
    assert "MAE fine-tuned, mean pooling; vit_demo_patch8, 64 x 64 px, 7 classes" in said.out
    assert f"checkpoint_path={dest!r}" in said.out
    assert said.err.count("tensors from") == 1, "the second loading is no news"


def test_a_decoder_of_another_size_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"decoder_embed\.weight +32 x 48"):
        load_autoencoder(tiny_mae(decoder_embed_dim=64), tiny_mae().state_dict())


def test_what_was_converted_prints_as_the_command_does(fine_tuned: tuple[Classifier, str], tmp_path: Path) -> None:
    converted = convert(Path(fine_tuned[1]), tmp_path / "x.safetensors", to="timm")
    assert converted.path == tmp_path / "x.safetensors"
    assert converted.difference <= TOLERANCE
    assert converted.usage in repr(converted)
    assert "its outputs differ by" in repr(converted)
    with pytest.raises(ConfigError, match=r"convert\(to='tim'\): did you mean timm\?"):
        convert(fine_tuned[1], tmp_path / "y.safetensors", to="tim")

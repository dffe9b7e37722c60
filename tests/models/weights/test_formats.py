"""Everyone's checkpoints at tiny size, published keys and weights by rule: recognized, and right to the last logit."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_models import equal_states, tiny, tiny_mae
from torch import Tensor

from golden_rule import fill_by_rule, rule_tensor
from mae_dat.config.errors import CheckpointError
from mae_dat.models.classifier import Classifier, build_classifier
from mae_dat.models.mae import IMAGENET_MEAN, IMAGENET_STD, MaskedAutoencoder, build_mae, masked_mse
from mae_dat.models.tokenizer import embedded_path
from mae_dat.models.weights.formats import from_hugging_face, recognize
from mae_dat.models.weights.load import load_autoencoder, load_classifier, load_pretrained
from mae_dat.storage.weight_files import extract_weights, read_weights, write_weights

Golden = Callable[[str], dict[str, np.ndarray]]
KEYS = Path(__file__).parents[2] / "golden" / "hf_tiny_keys.json"


def hugging_face(which: str) -> dict[str, Tensor]:
    """A state dict with the keys that transformers writes."""
    return {key: rule_tensor(key, shape) for key, shape in json.loads(KEYS.read_text())[which].items()}


def reference_images(golden: Golden) -> Tensor:
    return torch.from_numpy(golden("mae_tiny")["images_u8"]).permute(0, 3, 1, 2).float() / 255


def fine_tuned(pool: bool = True) -> dict[str, Tensor]:
    return fill_by_rule(tiny(pool=pool).net)


def imagenet(pool: bool = True) -> Classifier:
    return Classifier(tiny(pool=pool).net, IMAGENET_MEAN, IMAGENET_STD).eval()


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def easyrobust(state: dict[str, Tensor], mean: Any = IMAGENET_MEAN) -> dict[str, Tensor]:
    statistics = {"0.mean": torch.tensor(mean).view(1, 3, 1, 1), "0.std": torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)}
    return {**statistics, **prefixed("1.", state)}


# ---- the fine-tuned form: the reference logits, however it is wrapped ----


@pytest.mark.parametrize(
    "name, wrap, told",
    [
        ("mae.pth", lambda state: {"model": state, "epoch": 99, "args": argparse.Namespace(lr=0.1)}, "MAE fine-tuned"),
        ("dat.pth", lambda state: {"state_dict": easyrobust(state)}, "easyrobust, MAE fine-tuned"),
        ("dat_ddp.pth", lambda state: {"state_dict": prefixed("module.", easyrobust(state))}, "easyrobust, MAE"),
        ("ddp.pth", lambda state: {"model": prefixed("module.", state)}, "DDP (module.)"),
        ("compiled.pt", lambda state: prefixed("_orig_mod.", state), "torch.compile (_orig_mod.)"),
        ("timm.pth.tar", lambda state: {"state_dict": {}, "state_dict_ema": state}, "the average (state_dict_ema)"),
        ("deit.pth", lambda state: {"model": fine_tuned(False), "model_ema": state}, "the average (model_ema)"),
        ("ours.safetensors", lambda state: state, "mae_dat, MAE fine-tuned"),
    ],
)
def test_every_wrapping_of_the_fine_tuned_weights_gives_the_reference_logits(
    tmp_path: Path, golden: Golden, name: str, wrap: Callable[[dict[str, Tensor]], Any], told: str
) -> None:
    path, content = tmp_path / name, wrap(fine_tuned())
    if path.suffix == ".safetensors":
        write_weights(path, content, {"mae_dat": '{"kind": "classifier"}'})
    else:
        torch.save(content, path)
    model = imagenet()
    report = load_classifier(model, path)
    logits = model(reference_images(golden))
    torch.testing.assert_close(logits, torch.from_numpy(golden("vit_tiny")["logits"]), rtol=1e-5, atol=1e-5)
    assert told in str(report)
    assert str(path) in str(report)


def test_statistics_that_differ_are_refused_and_named() -> None:
    model = imagenet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for load in (load_classifier, load_pretrained):
        with pytest.raises(CheckpointError, match=r"mean \(0\.5, 0\.5, 0\.5\).*normalizes differently.*--model"):
            load(model, easyrobust(fine_tuned(), (0.5, 0.5, 0.5)))
    assert equal_states(model.state_dict(), before)
    load_classifier(tiny(mean=0.5), {**easyrobust(fine_tuned(), (0.5, 0.5, 0.5)), "0.std": torch.full((3,), 0.5)})


# ---- MAE's pretraining ----


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_autoencoder_with_decoder_gives_the_reference_prediction(
    tmp_path: Path, golden: Golden, suffix: str
) -> None:
    source, path = tiny_mae(depth=2), tmp_path / f"mae{suffix}"
    state = fill_by_rule(source, skip=["pos_embed", "decoder_pos_embed"])
    if suffix == ".pth":
        torch.save({"model": state, "optimizer": {}, "epoch": 1, "args": argparse.Namespace(mask_ratio=0.75)}, path)
    else:
        save_file(state, path)
    model = tiny_mae(depth=2)
    report = load_autoencoder(model, path)
    assert report.format == "MAE with decoder"
    reference = golden("mae_tiny")
    prediction, _ = model(reference_images(golden), 0.75, torch.from_numpy(reference["noise"]))
    torch.testing.assert_close(prediction, torch.from_numpy(reference["pred"]), rtol=1e-5, atol=1e-5)


def test_a_file_without_decoder_is_told_or_fills_the_encoder_alone() -> None:
    full, model = tiny_mae(), tiny_mae()
    encoder = {k: v for k, v in full.state_dict().items() if not k.startswith("decoder_") and k != "mask_token"}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"no decoder.*mae_visualize.*decoder=False"):
        load_autoencoder(model, encoder)
    assert equal_states(model.state_dict(), before)
    for source in (encoder, full.state_dict()):
        model = tiny_mae()
        decoder = model.decoder_pred.weight.clone()
        report = load_autoencoder(model, source, decoder=False)
        assert report.loaded == len(encoder)
        assert torch.equal(model.blocks[3].mlp.fc2.weight, full.blocks[3].mlp.fc2.weight)
        assert torch.equal(model.decoder_pred.weight, decoder)


@pytest.mark.parametrize("size, grid", [(96, (12, 12)), ((32, 80), (4, 10))])
def test_both_position_embeddings_follow_the_image_size(size: Any, grid: tuple[int, int]) -> None:
    source = tiny_mae()
    bigger, back = tiny_mae(size), tiny_mae()
    assert load_autoencoder(bigger, source.state_dict()).resized == ((8, 8), grid)
    assert (bigger.decoder_pos_embed[0, 0] == source.decoder_pos_embed[0, 0]).all()
    assert load_autoencoder(back, bigger.state_dict(), source_grid=grid).resized == (grid, (8, 8))
    assert (back.decoder_pos_embed - source.decoder_pos_embed).abs().mean() < 0.15


# ---- Hugging Face ----


def test_hugging_face_vitmae_gives_its_own_outputs(golden: Golden) -> None:
    reference = {key: torch.from_numpy(value) for key, value in golden("hf_tiny").items()}
    model, image = tiny_mae(depth=2), reference_images(golden)[:1]
    report = load_autoencoder(model, hugging_face("vitmae"))
    assert report.format == "Hugging Face, MAE with decoder"
    latent, mask, _ = model.encode(image, 0.75, reference["noise"])
    prediction, _ = model(image, 0.75, reference["noise"])
    assert torch.equal(mask, reference["mask"])
    torch.testing.assert_close(latent, reference["latent"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prediction, reference["prediction"], rtol=1e-5, atol=1e-5)
    loss = masked_mse(prediction, model.target(image, norm_pix=True), mask)
    torch.testing.assert_close(loss, reference["loss"].squeeze(), rtol=1e-5, atol=1e-5)


def test_hugging_face_classifier_gives_its_own_logits(golden: Golden) -> None:
    model = imagenet(pool=False)
    report = load_classifier(model, hugging_face("vit"))
    assert report.format == "Hugging Face, vision transformer with class token, timm's keys"
    logits = model(reference_images(golden)[:1])
    torch.testing.assert_close(logits, torch.from_numpy(golden("hf_tiny")["logits"]), rtol=1e-5, atol=1e-5)


def test_hugging_face_files_of_other_classes_and_versions() -> None:
    """ViTMAEModel has no `vit.`, ViTModel a pooler, and transformers 5 another name for the decoder's layers."""
    state = hugging_face("vitmae")
    expected = from_hugging_face(state)
    newer = {key.replace("decoder_layers.", "decoder_encoder.layer."): value for key, value in state.items()}
    assert equal_states(from_hugging_face(newer), expected)
    bare = {key.removeprefix("vit."): value for key, value in state.items() if key.startswith("vit.")}
    bare["pooler.dense.weight"] = torch.ones(48, 48)
    found = recognize(extract_weights(bare, "here"))
    assert (found.kind, found.format) == ("encoder", "Hugging Face, MAE encoder")
    assert found.tensors.keys() == {k for k in expected if not k.startswith("decoder_") and k != "mask_token"}


def test_an_incomplete_attention_of_hugging_face_is_named() -> None:
    state = hugging_face("vitmae")
    del state["vit.encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.qkv\.weight +- +144 x 48 +missing"):
        load_autoencoder(tiny_mae(depth=2), state)


# ---- timm and DeiT ----


def test_timm_weights_by_their_model_name() -> None:
    source, model = timm.create_model("test_vit", num_classes=5).eval(), build_classifier("test_vit", 5).eval()
    report = load_classifier(model, {"state_dict": source.state_dict()})
    assert report.format == "vision transformer with class token, timm's keys"
    image = torch.rand(1, 3, 160, 160)
    assert torch.equal(model(image), source((image - model.mean) / model.std))
    network = timm.create_model("test_resnet", num_classes=5)
    assert load_classifier(build_classifier("test_resnet", 5), network.state_dict()).loaded == len(network.state_dict())


def test_a_distilled_deit_fits_timms_model_of_that_name_and_no_other() -> None:
    source = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, depth=1).eval()
    model = Classifier(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, depth=1), (0.5,), (0.5,))
    assert load_classifier(model, {"model": source.state_dict()}).format == "distilled DeiT"
    assert equal_states(model.net.state_dict(), source.state_dict())
    plain = Classifier(timm.create_model("deit_tiny_patch16_224", num_classes=5, depth=1), (0.5,), (0.5,))
    with pytest.raises(CheckpointError, match=r"distilled DeiT.*--model deit_tiny_distilled_patch16_224"):
        load_pretrained(plain, source.state_dict())


# ---- what does not belong ----


class Hostile:
    """Pickles into a call that would create a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.canary,)


def vqgan() -> dict[str, Tensor]:
    shapes = json.loads((KEYS.parent / "vqgan_tiny_keys.json").read_text())
    return {key: torch.zeros(shape) for key, shape in shapes["keys"].items()}


def bad_file(kind: str, folder: Path) -> Path:
    """A file that no network here can use."""
    path, mae = folder / f"{kind}.pth", tiny_mae().state_dict()
    contents = {
        "hostile": {"model": mae, "args": Hostile(folder / "canary")},
        "larger": {"model": tiny_mae(depth=6, embed_dim=64).state_dict()},
        "resnet": timm.create_model("test_resnet").state_dict(),
        "vqgan": {"state_dict": vqgan()},
    }
    if kind == "page":
        path.write_bytes(b"<!DOCTYPE html><html>404</html>")
    elif kind == "light":
        return embedded_path()
    else:
        torch.save(contents.get(kind, {"model": mae}), path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    return path


@pytest.mark.parametrize(
    "kind, message",
    [
        ("page", "web page"),
        ("truncated", "cannot be read"),
        ("hostile", "cannot be read"),
        ("larger", "does not fit"),
        ("resnet", "does not fit"),
        ("vqgan", r"is a tokenizer \(VQGAN\): use it with --tokenizer"),
        ("light", r"is a tokenizer \(light tokenizer\)"),
    ],
)
@pytest.mark.parametrize("target", ["autoencoder", "encoder", "pretrained", "classifier"])
def test_a_refused_file_runs_nothing_and_changes_nothing(tmp_path: Path, kind: str, message: str, target: str) -> None:
    path = bad_file(kind, tmp_path)
    model: MaskedAutoencoder | Classifier = tiny_mae() if target in ("autoencoder", "encoder") else tiny()
    loads: dict[str, Callable[[Any], Any]] = {
        "autoencoder": lambda model: load_autoencoder(model, path),
        "encoder": lambda model: load_autoencoder(model, path, decoder=False),
        "pretrained": lambda model: load_pretrained(model, path),
        "classifier": lambda model: load_classifier(model, path),
    }
    if target == "classifier" and kind in ("larger", "resnet"):
        message = "no classification head"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as error:
        loads[target](model)
    assert str(path) in str(error.value)
    assert equal_states(model.state_dict(), before)
    assert not (tmp_path / "canary").exists()


def test_a_classifier_is_no_pretraining() -> None:
    with pytest.raises(CheckpointError, match=r"is a classifier \(MAE fine-tuned.*not a masked autoencoder"):
        load_autoencoder(tiny_mae(), tiny().net.state_dict(), decoder=False)


def test_a_file_of_another_published_size_is_named(tmp_path: Path) -> None:
    write_weights(tmp_path / "demo.safetensors", build_mae("mae_vit_demo_patch8").state_dict(), {})
    with pytest.raises(CheckpointError, match=r"its shapes are those of vit_demo_patch8"):
        load_pretrained(tiny(), tmp_path / "demo.safetensors")
    assert recognize(read_weights(tmp_path / "demo.safetensors")).kind == "autoencoder"

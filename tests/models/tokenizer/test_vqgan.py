"""Visual words: reference outputs, checkpoints good and bad, the nearest-code search, and the embedded tokenizer."""

import dataclasses
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tokenizers import KEYS, SMALL_LIGHT, golden_image, golden_tensors, golden_vqgan, pictures
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mae_dat.config.errors import CheckpointError, ConfigError, MissingInputError
from mae_dat.models.tokenizer import (
    VQGAN,
    VQGAN_PRESETS,
    LightTokenizer,
    VisualTokenizer,
    VQGANConfig,
    embedded_path,
    load_tokenizer,
    quantize,
    share_changed,
)
from mae_dat.models.tokenizer.quantize import look_up, nearest_words, straight_through, vq_loss
from mae_dat.models.tokenizer.vqgan import read_config

Golden = Callable[[str], dict[str, np.ndarray]]


@pytest.fixture
def small_light(tmp_path: Path) -> tuple[LightTokenizer, Path]:
    tokenizer, path = LightTokenizer(SMALL_LIGHT).freeze(), tmp_path / "light.safetensors"
    tokenizer.save(path)
    return tokenizer, path


# ---- against the reference ----


def test_vqgan_reproduces_the_reference(golden: Golden) -> None:
    arrays, tokenizer = golden("vqgan_tiny"), golden_vqgan()
    image = golden_image(arrays)
    latent, words = tokenizer.latent(image), tokenizer.encode(image)
    torch.testing.assert_close(latent, torch.from_numpy(arrays["prequant"]), rtol=1e-5, atol=1e-5)
    assert torch.equal(words, torch.from_numpy(arrays["indices"]))
    reference = torch.from_numpy(arrays["recon"])  # as taming's decoder gives it, around [-1, 1]
    pixels = tokenizer.pixels(look_up(words, tokenizer.codebook))
    torch.testing.assert_close(2 * pixels - 1, reference, rtol=1e-4, atol=1e-4)
    reference01 = (reference.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(tokenizer.decode(words), reference01, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokenizer.reconstruct(image), tokenizer.decode(words))
    assert (tokenizer.num_words, tokenizer.factor) == (64, 8)


def test_configuration_is_read_off_the_tensors() -> None:
    expected, found = json.loads(KEYS.read_text()), read_config("golden", golden_tensors())
    reference = expected["ddconfig"]
    for name in ("z_channels", "ch", "num_res_blocks"):
        assert getattr(found, name) == reference[name]
    assert list(found.ch_mult) == reference["ch_mult"]
    assert (found.num_words, found.word_dim, found.in_chans) == (64, 4, 3)
    # Tensors show the level that has attention; the resolution is told for 256 px.
    assert [side * reference["resolution"] // 256 for side in found.attn_resolutions] == reference["attn_resolutions"]
    assert not found.gumbel


@pytest.mark.parametrize("legacy, name", [(False, "legacy0"), (True, "legacy1")])
def test_vq_gradients_reproduce_the_reference(golden: Golden, legacy: bool, name: str) -> None:
    gradients, arrays = golden("vq_grads"), golden("vqgan_tiny")
    latent = torch.from_numpy(arrays["prequant"]).requires_grad_()
    codebook = torch.from_numpy(gradients["codebook"]).requires_grad_()
    quantized = look_up(torch.from_numpy(arrays["indices"]), codebook)
    loss = vq_loss(latent, quantized, beta=0.25, legacy=legacy)
    by_latent, by_codebook = torch.autograd.grad(loss, (latent, codebook))
    torch.testing.assert_close(by_latent, torch.from_numpy(gradients[f"dloss_dz_{name}"]), rtol=1e-5, atol=1e-9)
    expected = torch.from_numpy(gradients[f"dloss_dcodebook_{name}"])
    torch.testing.assert_close(by_codebook, expected, rtol=1e-5, atol=1e-9)
    recorded = arrays["codebook_loss_legacy" if legacy else "codebook_loss_fixed"]
    assert loss.item() == pytest.approx(float(recorded), rel=1e-5)


def test_straight_through_reproduces_the_reference(golden: Golden) -> None:
    arrays, tokenizer = golden("vqgan_tiny"), golden_vqgan()
    latent = torch.from_numpy(arrays["prequant"]).requires_grad_()
    quantized = look_up(tokenizer.words_of(latent.detach()), tokenizer.codebook)
    passed = straight_through(latent, quantized)
    torch.testing.assert_close(passed, quantized, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(passed.sum(), latent)
    assert torch.equal(gradient, torch.from_numpy(golden("vq_grads")["dsumzq_dz"]))


@pytest.mark.parametrize(
    "name, millions",
    [
        ("vq-f8", 67.7),
        ("vq-f8-n256", 67.7),
        ("imagenet-f16-1024", 72.1),
        ("imagenet-f16-16384", 76.1),
        ("vq-f16", 69.6),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        tokenizer = VQGAN(VQGAN_PRESETS[name])
    assert sum(weight.numel() for weight in tokenizer.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert 224 // tokenizer.factor == {"8": 28, "1": 14}[name.split("f")[-1][0]]


# ---- checkpoints ----


def lightning_checkpoint(tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """A checkpoint as Lightning writes it: the class of a callback, not its name, is a key."""
    module_name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": module_name})
    module = types.ModuleType(module_name)
    monkeypatch.setattr(module, "ModelCheckpoint", callback, raising=False)
    monkeypatch.setitem(sys.modules, module_name, module)
    return {"epoch": 3, "state_dict": tensors, "callbacks": {callback: {"monitor": "val/rec_loss", "best": None}}}


def test_a_lightning_checkpoint_loads_without_its_losses_and_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    left_out = {"loss.discriminator.main.0.weight": torch.ones(3), "model_ema.decay": torch.tensor(0.999)}
    path = tmp_path / "model.ckpt"
    with monkeypatch.context() as patch:
        torch.save(lightning_checkpoint({**golden_tensors(), **left_out}, patch), path)
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, VQGAN)
    arrays = golden("vqgan_tiny")
    assert torch.equal(tokenizer.encode(golden_image(arrays)), torch.from_numpy(arrays["indices"]))
    assert not tokenizer.training
    assert not any(weight.requires_grad for weight in tokenizer.parameters())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("decoder.mid.attn_1.q.weight"), r"decoder\.mid\.attn_1\.q\.weight .* missing"),
        (lambda state: state.update({"encoder.extra.bias": torch.ones(2)}), r"encoder\.extra\.bias .* unexpected"),
        (
            lambda state: state.update({"quant_conv.weight": torch.ones(5, 4, 1, 1)}),
            r"quant_conv\.weight +5 x 4 x 1 x 1 +4 x 4 x 1 x 1 +of another shape",
        ),
        (lambda state: state.pop("quantize.embedding.weight"), r"not a VQGAN.*quantize\.embedding\.weight"),
        (lambda state: state.pop("encoder.down.2.block.0.conv1.weight"), "levels are incomplete"),
    ],
)
def test_every_difference_of_the_keys_is_listed(change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    state = golden_tensors()
    change(state)
    with pytest.raises(CheckpointError, match=message) as error:
        VQGAN.from_state_dict("somewhere/model.ckpt", state)
    assert "somewhere/model.ckpt" in str(error.value)


def test_other_files_are_no_tokenizers(tmp_path: Path) -> None:
    path = tmp_path / "linear.pth"
    torch.save(nn.Linear(2, 3).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"linear\.pth is not a VQGAN.*contains weight, bias"):
        load_tokenizer(path)
    with pytest.raises(MissingInputError, match=r"--tokenizer embedded.*nothing\.ckpt"):
        load_tokenizer(tmp_path / "nothing.ckpt")


def test_gumbel_models_take_the_best_score_and_never_sample() -> None:
    config = VQGANConfig(32, 5, 8, 32, (1, 2), 1, (128,), gumbel=True)
    source = VQGAN(config)
    tokenizer = VQGAN.from_state_dict("gumbel", source.state_dict()).freeze()
    assert tokenizer.config == config
    image = torch.rand(3, 3, 16, 24)
    words = tokenizer.encode(image)
    assert torch.equal(words, tokenizer.get_submodule("quantize.proj")(tokenizer.latent(image)).argmax(1))
    assert torch.equal(words, tokenizer.encode(image))
    assert words.unique().numel() > 1
    assert tokenizer.decode(words).shape == image.shape


# ---- one interface ----


@pytest.mark.parametrize(
    "make, height, width", [(lambda: LightTokenizer(SMALL_LIGHT).freeze(), 6, 10), (golden_vqgan, 16, 40)]
)
def test_any_size_that_the_factor_divides(make: Callable[[], VisualTokenizer], height: int, width: int) -> None:
    tokenizer, image = make(), torch.rand(2, 3, height, width)
    words = tokenizer.encode(image)
    assert words.shape == (2, height // tokenizer.factor, width // tokenizer.factor)
    assert words.dtype == torch.int64
    rebuilt = tokenizer.reconstruct(image)
    assert rebuilt.shape == image.shape
    assert rebuilt.min() >= 0
    assert rebuilt.max() <= 1
    with pytest.raises(ConfigError, match=f"{height} x {width + 1} is not divisible by the tokenizer's factor"):
        tokenizer.encode(torch.rand(1, 3, height, width + 1))
    with pytest.raises(ConfigError, match=r"\(B, 3, H, W\), got \(2, 1, 16, 16\)"):
        tokenizer.encode(torch.rand(2, 1, 16, 16))


def test_share_of_changed_words() -> None:
    words = torch.arange(8).view(2, 2, 2)
    other = words.clone()
    other[1, 0, 1] = 7
    assert share_changed(words, other).item() == 1 / 8


# ---- nearest codes ----


def test_nearest_words_equal_brute_force() -> None:
    latent, codebook = torch.randn(2000, 5), torch.randn(300, 5)
    distance = torch.cdist(latent.double(), codebook.double())
    assert torch.equal(nearest_words(latent, codebook), distance.argmin(1))
    assert nearest_words(latent[:0], codebook).shape == (0,)


def test_chunks_do_not_change_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    # Multiples of 1/16 are exact in float32, so that no rounding hides behind the order of summation.
    latent, codebook = (torch.randint(-64, 64, (rows, 6)).float() / 16 for rows in (200, 50))
    whole = nearest_words(latent, codebook)
    for scores in (50, 7 * 50, 199 * 50):
        monkeypatch.setattr(quantize, "SCORES_AT_ONCE", scores)
        assert torch.equal(nearest_words(latent, codebook), whole)


PEAK = """
import sys, torch
from mae_dat.models.tokenizer.quantize import nearest_words
def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
torch.set_num_threads(1)
latent, codebook = torch.randn(int(sys.argv[1]) * 784, 4), torch.randn(16384, 4)
nearest_words(latent[:64], codebook)
before = resident("VmRSS")
nearest_words(latent, codebook)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("batch, bound", [(16, 0.4e9), pytest.param(128, 1e9, marks=pytest.mark.slow)])
def test_peak_memory_of_the_search(batch: int, bound: float) -> None:
    """Its matrix of scores would be 0.8 GB for 16 images of 784 words and 16,384 codes, and 6.6 GB for 128."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(batch)], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < bound


# ---- the light tokenizer ----


def test_light_round_trip_is_bitwise(small_light: tuple[LightTokenizer, Path]) -> None:
    tokenizer, path = small_light
    loaded = load_tokenizer(path)
    assert isinstance(loaded, LightTokenizer)
    assert loaded.config == SMALL_LIGHT
    state, other = tokenizer.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    image = torch.rand(2, 3, 8, 12)
    assert torch.equal(tokenizer.reconstruct(image), loaded.reconstruct(image))
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_a_light_file_whose_settings_and_weights_disagree(tmp_path: Path) -> None:
    tokenizer, path = LightTokenizer(SMALL_LIGHT), tmp_path / "light.safetensors"
    tokenizer.config = dataclasses.replace(SMALL_LIGHT, num_words=32)
    tokenizer.save(path)
    with pytest.raises(CheckpointError, match=r"light\.safetensors(.|\n)*codes +16 x 3 +32 x 3"):
        load_tokenizer(path)


def test_a_light_reconstruction_costs_at_most_0_3_gflop() -> None:
    tokenizer = LightTokenizer().freeze()
    with FlopCounterMode(display=False) as counter:
        tokenizer.reconstruct(torch.rand(1, 3, 64, 64))
    assert 0.1e9 < counter.get_total_flops() <= 0.3e9


@pytest.mark.parametrize(
    "card, message",
    [
        ({"sha256": "0" * 64}, r"light\.safetensors is damaged.*light\.json"),
        ("{", r"card of .* is damaged: .*light\.json is not a card"),
    ],
)
def test_a_card_that_does_not_fit(small_light: tuple[LightTokenizer, Path], card: Any, message: str) -> None:
    path = small_light[1]
    path.with_suffix(".json").write_text(card if isinstance(card, str) else json.dumps(card))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(path)


# ---- the embedded tokenizer ----


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return json.loads(embedded_path().with_suffix(".json").read_text())


def test_the_embedded_tokenizer_reconstructs_what_its_card_says(card: dict[str, Any]) -> None:
    tokenizer, image = load_tokenizer(), pictures(200)
    rebuilt = torch.cat([tokenizer.reconstruct(part) for part in image.split(50)])
    psnr = -10 * (rebuilt - image).square().mean((1, 2, 3)).log10()
    assert psnr.mean().item() > card["held_out"]["demo"]["psnr_db"] - 1


def test_the_embedded_tokenizer_meets_its_targets(card: dict[str, Any]) -> None:
    assert embedded_path().stat().st_size < 4e6
    assert max(facts["codebook_in_use"] for facts in card["held_out"].values()) >= 0.95
    photos = [facts["psnr_db"] for name, facts in card["held_out"].items() if name != "demo"]
    assert photos
    assert max(photos) >= 28.5


def test_a_flipped_byte_of_the_embedded_tokenizer_is_seen(tmp_path: Path) -> None:
    path = tmp_path / embedded_path().name
    shutil.copy(embedded_path(), path)
    shutil.copy(embedded_path().with_suffix(".json"), path.with_suffix(".json"))
    load_tokenizer(path)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: its sha256"):
        load_tokenizer(path)


@pytest.mark.parametrize("beside", ["transformer.pos_emb", "model.diffusion_model.time_embed.0.weight"])
def test_a_vqgan_within_the_checkpoint_of_another_model_is_used(tmp_path: Path, beside: str) -> None:
    state = golden_vqgan().state_dict()
    content = {f"first_stage_model.{key}": value for key, value in state.items()} | {beside: torch.zeros(2)}
    torch.save({"state_dict": content}, tmp_path / "net2net.ckpt")
    loaded = load_tokenizer(tmp_path / "net2net.ckpt").state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_the_colors_of_a_vqgan_for_segmentations_are_ignored(tmp_path: Path) -> None:
    state = golden_vqgan().state_dict()
    torch.save({"state_dict": state | {"colorize": torch.zeros(3, 3, 1, 1)}}, tmp_path / "seg.ckpt")
    assert load_tokenizer(tmp_path / "seg.ckpt").num_words == 64

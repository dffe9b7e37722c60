"""What pretraining predicts, and how its adversary warms up: words of removed patches, one mask for all views, a
strength that is a function of the step, weights that anything loads."""

import dataclasses
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from dat_steps import CountedTokenizer, batch_of, generator, gradients
from ranks import exit_codes, start_ranks
from tiny_runs import (
    finetune_in,
    one_thread,  # noqa: F401 - used by itself
    pretrain_in,
    save_tokenizer,
)
from torch import Tensor
from whole_runs import assert_equal_states, final_state, records, signal_in_step

from mae_dat.attacks.discrete import discrete_adversary
from mae_dat.config.adversaries import AttackConfig, DatConfig
from mae_dat.config.commands.compare import CompareConfig
from mae_dat.config.errors import ConfigError, InterruptError
from mae_dat.config.groups import AugmentConfig, MaskConfig
from mae_dat.config.variants import group_label
from mae_dat.experiments.compare import compare, groups_to_train, pretrain_config
from mae_dat.models.classifier import build_classifier
from mae_dat.models.mae import MaskedAutoencoder, build_mae, masked_mse
from mae_dat.models.tokenizer import LightConfig, VisualTokenizer
from mae_dat.models.weights.load import load_autoencoder, load_pretrained
from mae_dat.models.weights.open import open_model
from mae_dat.models.word_head import WordHead
from mae_dat.runtime.console import Console
from mae_dat.runtime.run_log import read_log
from mae_dat.storage.weight_files import read_weights
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import WithDAT
from mae_dat.training.objectives.reconstruction import MaskedReconstruction

SIDE, PATCH, WORDS = 16, 8, 32


@pytest.fixture
def tokenizer() -> CountedTokenizer:
    torch.manual_seed(0)
    return CountedTokenizer(LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=WORDS)).freeze()


class RecordingMae(MaskedAutoencoder):
    """Keeps the arguments of every forward pass."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(SIDE, PATCH, 3, 16, 1, 2, 16, 1, 2)
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        self.seen.append(arguments)
        return super().forward(*arguments)


def with_words(tokenizer: VisualTokenizer, pixels: bool = True) -> RecordingMae:
    model = RecordingMae()
    model.add_word_head(tokenizer.factor, tokenizer.num_words, pixels)
    return model


@torch.no_grad()
def naive_words_loss(model: MaskedAutoencoder, view: Tensor, words: Tensor, noise: Tensor) -> tuple[float, float]:
    """Word by word from all scores at once: nats of the words at removed patches, and how many are the best."""
    latent, mask, ids_restore = model.encode(view, 0.5, noise)
    head, side = model.decoder_words, model.patch_size // 4
    assert head is not None
    embeddings = head.embed(model.decode(latent, ids_restore)).view(len(view), model.num_patches, side**2, -1)
    probabilities = head.score(embeddings).softmax(-1)
    nats, hits = [], []
    for image, patch in mask.nonzero().tolist():
        row, column = divmod(patch, model.grid[1])
        for place in range(side**2):
            word = words[image, side * row + place // side, side * column + place % side]
            nats.append(-float(probabilities[image, patch, place, word].log()))
            hits.append(float(probabilities[image, patch, place].argmax() == word))
    return sum(nats) / len(nats), sum(hits) / len(hits)


# ---- words as a target ----


def test_the_loss_of_words_is_the_naive_one(tokenizer: CountedTokenizer) -> None:
    model, batch = with_words(tokenizer), batch_of()
    with torch.no_grad():
        model.decoder_words.score.bias[tokenizer.encode(batch["image"]).flatten().mode().values] = 2.0
    parts = MaskedReconstruction(0.5, True, tokenizer, 0.3).step(model, batch, generator())
    noise, words = model.seen[0][2], tokenizer.encode(batch["image"])
    nats, hits = naive_words_loss(model, batch["image"], words, noise)
    assert parts["loss_words"].item() == pytest.approx(nats, rel=1e-5)
    assert float(parts["word_accuracy"]) == pytest.approx(hits)
    prediction, mask = model(batch["image"], 0.5, noise)
    pixels = masked_mse(prediction, model.target(batch["image"], True), mask)
    torch.testing.assert_close(parts["loss_pixels"], pixels)
    torch.testing.assert_close(parts["loss"], pixels + 0.3 * parts["loss_words"])
    assert 0 < hits < 1
    alone = MaskedReconstruction(0.5, True, tokenizer).step(model, batch, generator())
    assert alone.keys() == {"loss", "loss_words", "word_accuracy"}
    assert torch.equal(alone["loss"], parts["loss_words"])


def test_only_words_of_removed_patches_count(tokenizer: CountedTokenizer) -> None:
    model, batch = with_words(tokenizer), batch_of()
    objective = MaskedReconstruction(0.5, True, tokenizer)
    image, (target, noise, words) = objective.prepare(model, batch, generator())
    before = objective.loss(model, image, (target, noise, words))
    removed = model.encode(image, 0.5, noise)[1].view(-1, *model.grid)
    removed = removed.repeat_interleave(2, 1).repeat_interleave(2, 2).bool()
    others = (words + 1) % WORDS
    at_kept, at_removed = torch.where(removed, words, others), torch.where(removed, others, words)
    assert torch.equal(objective.loss(model, image, (target, noise, at_kept)), before)
    assert objective.loss(model, image, (target, noise, at_removed)) != before


def test_chunks_and_all_scores_at_once_are_the_same(tokenizer: CountedTokenizer, monkeypatch: Any) -> None:
    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model = with_words(tokenizer)
        loss = MaskedReconstruction(0.5, True, tokenizer).step(model, batch_of(), generator())["loss"]
        loss.backward()
        return loss.detach(), gradients(model)

    (whole, gradient), most = step(), []
    score_words = WordHead._score_words
    monkeypatch.setattr(
        WordHead, "_score_words", lambda self, *chunk: most.append(len(chunk[0])) or score_words(self, *chunk)
    )
    monkeypatch.setattr(WordHead, "SCORES_AT_ONCE", 20 * WORDS)
    chunked, of_chunks = step()
    assert max(most) == 20
    assert sum(most) == 2 * 16 * 2 * 4, "each score twice: 16 images, 2 removed patches, 4 words"
    torch.testing.assert_close(chunked, whole)
    for name, value in gradient.items():
        torch.testing.assert_close(of_chunks[name], value)


def test_words_alone_leave_the_prediction_of_pixels_as_it_is(tokenizer: CountedTokenizer) -> None:
    for pixels, weight in ((True, 0.1), (False, None)):
        model = with_words(tokenizer, pixels)
        MaskedReconstruction(0.5, True, tokenizer, weight).step(model, batch_of(), generator())["loss"].backward()
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        assert trained == {name for name, value in gradients(model).items() if value.any()}
        assert ("decoder_pred.weight" in trained) == pixels


def test_a_word_head_does_not_change_how_the_rest_starts(tokenizer: CountedTokenizer) -> None:
    plain, other = RecordingMae().state_dict(), with_words(tokenizer).state_dict()
    assert all(torch.equal(value, other.pop(name)) for name, value in plain.items())
    assert {name.split(".")[0] for name in other} == {"decoder_words"}


@pytest.mark.parametrize(("patch", "factor"), [(14, 8), (4, 8)])
def test_a_patch_must_hold_whole_words(patch: int, factor: int) -> None:
    model = MaskedAutoencoder(56, patch, 3, 16, 1, 2, 16, 1, 2)
    with pytest.raises(ConfigError, match=rf"{patch} pixels .* words of {factor} pixels: use .*--target pixels"):
        model.add_word_head(factor, WORDS)


# ---- with an adversary ----


@pytest.mark.parametrize("attack", [AttackConfig(eps=3.0), AttackConfig(eps=3.0, free=True), AttackConfig("symbolic")])
def test_all_views_have_the_mask_and_the_words_of_the_clean_image(
    attack: AttackConfig, tokenizer: CountedTokenizer
) -> None:
    model, batch = with_words(tokenizer, pixels=False), batch_of()
    attack = dataclasses.replace(attack, batch_share=0.5)
    parts = WithDAT(tokenizer, attack, MaskedReconstruction(0.5, True, tokenizer)).step(model, batch, generator())
    words, noise = tokenizer.encode(batch["image"]), model.seen[0][2]
    for view, ratio, seen, by_patch in model.seen:
        assert ratio == 0.5
        assert torch.equal(seen, noise[: len(view)])
        assert torch.equal(by_patch, model.patch_words(words)[: len(view)])
    clean, adversarial = model.seen[0][0], model.seen[-1][0]
    assert torch.equal(clean, batch["image"])
    assert len(adversarial) == 8
    assert not torch.equal(adversarial, clean[:8])
    expected = [naive_words_loss(model, view, words, noise[: len(view)])[0] for view in (clean, adversarial)]
    assert [parts[name].item() for name in ("loss_clean", "loss_adversarial")] == pytest.approx(expected, rel=1e-5)
    assert parts["loss"].item() == pytest.approx(sum(expected), rel=1e-5)
    assert parts["loss_words"].item() == pytest.approx(expected[0], rel=1e-5)


# Encodings of the batch beside the count of changed words, without words as a target and with them.
ENCODED = {"released": (2, 2), "paper": (2, 2), "symbolic": (1, 1), "random": (1, 1), "reconstruction": (1, 1)}


@pytest.mark.parametrize("kind", ENCODED)
def test_known_words_cost_no_other_encoding_and_change_nothing(kind: str, tokenizer: CountedTokenizer) -> None:
    attack, batch = AttackConfig(kind, eps=3.0), batch_of()  # type: ignore[arg-type]
    counted = []
    for target in (None, tokenizer):
        model, tokenizer.encoded = with_words(tokenizer), 0
        WithDAT(tokenizer, attack, MaskedReconstruction(0.5, True, target)).step(model, batch, generator())
        counted.append(tokenizer.encoded // len(batch["image"]))
    assert tuple(counted) == ENCODED[kind]
    model, words = RecordingMae(), tokenizer.encode(batch["image"])
    noise = torch.rand(16, model.num_patches, generator=generator())

    def loss_fn(view: Tensor) -> Tensor:
        return model(view, 0.5, noise)[0].square().mean()

    for given in (attack, dataclasses.replace(attack, at="image" if kind == "released" else attack.at)):
        one = discrete_adversary(batch["image"], loss_fn, tokenizer, given, generator())
        other = discrete_adversary(batch["image"], loss_fn, tokenizer, given, generator(), words=words)
        assert torch.equal(one.adversarial, other.adversarial)
        assert torch.equal(one.words, other.words)


def test_words_of_another_tokenizer_are_a_target_alone(tokenizer: CountedTokenizer) -> None:
    other = CountedTokenizer(LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=8)).freeze()
    objective = WithDAT(tokenizer, AttackConfig("random"), MaskedReconstruction(0.5, True, other))
    parts = objective.step(with_words(other), batch_of(), generator())
    assert (tokenizer.encoded, other.encoded) == (16, 16)
    assert parts["changed_words"] > 0


# ---- the warm-up ----


def test_the_strength_grows_linearly_to_what_was_asked_for() -> None:
    attack = AttackConfig(eps=0.4, ramp_epochs=2.0)
    assert [attack.ramp(epoch) for epoch in (0.5, 1.0, 1.5, 2.0, 9.0)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert 0 < attack.ramp(0.0) < 1e-5
    assert AttackConfig().ramp(0.0) == 1.0
    assert attack.scaled(0.25) == dataclasses.replace(attack, eps=0.1)
    assert AttackConfig("random", share=0.2).scaled(0.5).word_share == 0.1
    assert AttackConfig("symbolic").scaled(0.5).word_share == 0.025
    assert AttackConfig("paper", share=0.1).scaled(0.5).share == 0.1, "the controller's target is warmed up by itself"
    assert DatConfig("random", ramp_epochs=3.0).attack == AttackConfig("random", ramp_epochs=3.0)


@pytest.mark.parametrize("kind", ["released", "paper", "symbolic", "random"])
def test_an_attack_that_warms_up_begins_with_nothing(
    kind: str, tokenizer: CountedTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    share = 0.25 if kind in ("symbolic", "random") else None
    attack = AttackConfig(kind, eps=40.0 if kind == "paper" else 3.0, share=share, ramp_epochs=2.0)  # type: ignore[arg-type]
    objective = WithDAT(tokenizer, attack, Classification(AugmentConfig(), 5))
    torch.manual_seed(0)
    model, changed = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIDE * SIDE, 5)), []
    with caplog.at_level(logging.WARNING):
        for epoch in (0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0):
            objective.begin(epoch)
            parts = objective.step(model, batch_of(), generator())
            objective.observe({name: float(value.detach()) for name, value in parts.items()})
            changed.append(float(parts["changed_words"]))
            assert float(parts["adversary_ramp"]) == pytest.approx(min(epoch / 2, 1.0), abs=1e-5)
    assert changed[:4] == [0.0] * 4
    assert 0 < changed[4] < changed[5] == changed[6]
    if share:
        assert changed[4:] == [0.125, 0.25, 0.25]
    assert not caplog.records, "a strength that is meant to do nothing yet is no fault"


def test_a_target_share_is_warmed_up(tokenizer: CountedTokenizer) -> None:
    attack = AttackConfig(eps=0.1, share=0.25, random_start=0.0, ramp_epochs=10.0)
    objective = WithDAT(tokenizer, attack, MaskedReconstruction(0.5, True))
    model, shares = RecordingMae(), []
    for step in range(60):
        objective.begin(step / 4)
        parts = objective.step(model, batch_of(seed=step), generator(step))
        objective.observe({name: float(value.detach()) for name, value in parts.items()})
        shares.append(float(parts["changed_words"]))
    means = [sum(shares[first : first + 10]) / 10 for first in range(0, 60, 10)]
    wanted = [0.25 * min((10 * part + 4.5) / 40, 1) for part in range(6)]
    assert means == pytest.approx(wanted, abs=0.06)


def test_few_words_do_not_tell_that_a_strength_is_too_small(tokenizer: CountedTokenizer) -> None:
    objective = WithDAT(tokenizer, AttackConfig(share=0.04, ramp_epochs=10.0), MaskedReconstruction(0.5, True))
    controller = objective.controller
    assert controller is not None
    objective.observe({"changed_words": 0.0, "adversary_ramp": 0.05})
    assert controller.eps == 0.1
    objective.observe({"changed_words": 0.5, "adversary_ramp": 0.05})
    weaker = controller.eps
    assert weaker < 0.1, "too strong it is at any time"
    objective.observe({"changed_words": 0.004, "adversary_ramp": 0.5})
    assert controller.eps > weaker


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="--adversary_ramp must be 0 epochs or more, got -1"):
        AttackConfig(ramp_epochs=-1)
    with pytest.raises(ConfigError, match="--words_weight must be above 0, got 0; for no words, give --target pixels"):
        MaskConfig(words_weight=0)


# ---- whole runs ----


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "light.safetensors")


@pytest.fixture(scope="module")
def pretrained(images: Path, light: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pixels and words, without DAT."""
    flags = ["--target", "both", "--tokenizer", str(light), "--images_every", "1"]
    return pretrain_in(tmp_path_factory.mktemp("both"), images, *flags)


def test_words_are_a_target_without_dat_too(pretrained: Path) -> None:
    (record,) = read_log(pretrained / "log.txt")
    assert record["train_loss"] == pytest.approx(record["train_loss_pixels"] + 0.1 * record["train_loss_words"])
    assert 3 < record["train_loss_words"] < 6  # 64 words are 4.2 nats
    assert 0 <= record["train_word_accuracy"] < 0.5
    assert (pretrained / "images" / "reconstruction.png").is_file()


def test_what_is_exported_loads_as_ever(pretrained: Path, images: Path, tmp_path: Path) -> None:
    plain = pretrain_in(tmp_path / "plain", images)
    files = [read_weights(folder / "model.safetensors").tensors for folder in (plain, pretrained)]
    assert {name.split(".")[0] for name in files[1].keys() - files[0].keys()} == {"decoder_words"}
    assert files[0].keys() < files[1].keys()
    checkpoint = next(pretrained.glob("checkpoint-*.pth"))
    for source in (pretrained / "model.safetensors", checkpoint):
        model = build_mae("mae_vit_demo_patch8", img_size=32)
        load_autoencoder(model, source)
        assert torch.equal(model.decoder_pred.weight, files[1]["decoder_pred.weight"])
        classifier = build_classifier("vit_demo_patch8", 10, (32, 32))
        load_pretrained(classifier, source)
        assert torch.equal(classifier.net.blocks[4].mlp.fc2.weight, files[1]["blocks.4.mlp.fc2.weight"])
    assert isinstance(open_model(pretrained / "model.safetensors").model, MaskedAutoencoder)
    assert finetune_in(tmp_path / "tuned", images, "--finetune", str(pretrained))["test_acc1"] >= 0
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4, "num_classes": 0}
    net = timm.create_model("vit_base_patch16_224", global_pool="token", **size)
    missing, left = net.load_state_dict(files[1], strict=False)
    assert not missing
    assert all(name.startswith(("decoder_", "mask_token")) for name in left)


def test_words_alone_with_dat_train_and_draw(images: Path, light: Path, tmp_path: Path) -> None:
    flags = ["--target", "words", "--dat", "--dat_eps", "3", "--tokenizer", str(light), "--images_every", "1"]
    output = pretrain_in(tmp_path / "out", images, *flags)
    (record,) = read_log(output / "log.txt")
    assert record["train_loss_clean"] == record["train_loss_words"] > 0
    assert record["train_loss_adversarial"] > 0
    assert [path.name for path in (output / "images").iterdir()] == ["adversary.png"]


def test_a_factor_that_does_not_fit_is_told_before_the_training(images: Path, tmp_path: Path) -> None:
    coarse = save_tokenizer(tmp_path / "coarse.safetensors", factor=16)
    with pytest.raises(ConfigError, match=r"8 pixels .* words of 16"):
        pretrain_in(tmp_path / "out", images, "--target", "words", "--tokenizer", str(coarse))


@pytest.mark.parametrize("strength", [["--dat_share", "0.1"], ["--dat_eps", "2"]])
def test_a_run_stopped_in_its_warm_up_goes_on_as_if_it_had_not_been(
    strength: list[str], images: Path, light: Path, tmp_path: Path
) -> None:
    flags = ["--target", "both", "--dat", *strength, "--adversary_ramp", "1.5", "--epochs", "2"]
    flags += ["--tokenizer", str(light)]
    whole = pretrain_in(tmp_path / "whole", images, *flags)
    with signal_in_step(3, signal.SIGTERM), pytest.raises(InterruptError):
        pretrain_in(tmp_path / "stopped", images, *flags)
    assert final_state(tmp_path / "stopped")["step"] == 4
    stopped = pretrain_in(tmp_path / "stopped", images, *flags)
    assert_equal_states(final_state(stopped), final_state(whole))
    assert records(stopped) == records(whole)
    assert [record["train_adversary_ramp"] for record in records(whole)] == pytest.approx([2 / 9, 23 / 27], abs=1e-4)


def test_fine_tuning_warms_up_too(images: Path, light: Path, tmp_path: Path) -> None:
    flags = ["--dat", "random", "--dat_share", "0.5", "--adversary_ramp", "1", "--epochs", "2"]
    flags += ["--tokenizer", str(light)]
    finetune_in(tmp_path / "out", images, *flags)
    first, second = (record["train_changed_words"] for record in read_log(tmp_path / "out" / "log.txt"))
    assert first == pytest.approx(0.5 * 1 / 3, abs=0.02)
    assert second == pytest.approx(0.5)


def one_of_two(rank: int, images: Path, light: Path, output: Path, shards: bool) -> None:
    """Shards have to gather the head, and copies must not wait for what has no gradient."""
    flags = ["--target", "words", "--dat", "random", "--tokenizer", str(light), "--batch_size", "4"]
    pretrain_in(output, images, *flags, *(["--fsdp"] if shards else []))


@pytest.mark.slow
def test_two_ranks_learn_the_same_words_in_copies_and_in_shards(images: Path, light: Path, tmp_path: Path) -> None:
    losses = []
    for shards in (False, True):
        output = tmp_path / f"shards-{shards}"
        assert exit_codes(start_ranks(2, one_of_two, images, light, output, shards), 120) == [0, 0]
        losses.append(read_log(output / "log.txt")[-1]["train_loss_words"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- pretrainings side by side ----


def test_pretrainings_are_compared_for_the_same_steps_and_the_same_time(
    images: Path, light: Path, tmp_path: Path
) -> None:
    small = f"--input_size 32 --batch_size 8 --num_workers 0 --images_every 0 --tokenizer {light}"
    config = CompareConfig(
        data_path=str(images),
        output_dir=str(tmp_path),
        arms=("plain",),
        pretrainings=("plain", "released_words", "released_words_in_time"),
        seeds=(0,),
        pretrain_flags=f"{small} --epochs 4 --warmup_epochs 1",
        finetune_flags=f"{small} --epochs 1 --warmup_epochs 0",
        measure=False,
    )
    assert compare(config, Console(quiet=True)) is None
    folders = [tmp_path / name for name in ("pretrain", "pretrain-released_words", "pretrain-released_words_in_time")]
    plain, dat, in_time = ([record["seconds"] for record in read_log(folder / "log.txt")] for folder in folders)
    assert len(plain) == len(dat) == 4
    assert len(in_time) == max(1, round(4 * sum(plain) / sum(dat))) < 4
    settings = pretrain_config(config, "released_words_in_time")
    assert settings.optim.warmup_epochs == len(in_time) / 4
    assert (settings.dat.kind, settings.mae.target) == ("released", "both")
    starts = [read_weights(tmp_path / name / "model.safetensors").tensors for name in runs_of(config)]
    assert not torch.equal(starts[0]["pos_embed"], starts[1]["pos_embed"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoint-*.pth")}
    assert compare(config, Console(quiet=True)) is None
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoint-*.pth")}


def runs_of(config: CompareConfig) -> list[str]:
    return [f"{arm}-seed0" for arm in groups_to_train(config)]


def test_pretrainings_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ConfigError, match="--pretrainings: unknown variant 'releasd': did you mean released"):
        CompareConfig(pretrainings=("plain", "releasd"))
    with pytest.raises(ConfigError, match="must start with plain"):
        CompareConfig(pretrainings=("released",))
    with pytest.raises(ConfigError, match="released_in_time needs plain and released before it"):
        CompareConfig(pretrainings=("plain", "released_in_time"))
    assert group_label("released_in_time-random") == "random words, pretrained with DAT in the plain one's time"
    assert group_label("random") == "random words"

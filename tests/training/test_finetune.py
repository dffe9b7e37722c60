"""The linear probe: LARS against the reference, what is frozen and what is trained, and its weights afterwards."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import GOLDEN
from tiny_runs import (
    SMALL,
    finetune_in,
    one_thread,  # noqa: F401 - used by itself
    outcome_of,
    verb,
)

from mae_dat.config.errors import ConfigError
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig
from mae_dat.models.classifier import Classifier, build_classifier, build_vit, fused_head
from mae_dat.models.mae import ViTSize
from mae_dat.storage.weight_files import read_weights
from mae_dat.training.finetune import warn_of_slow_lars
from mae_dat.training.optim import Lars, build_optimizer

finetune_main = verb("finetune")

TINY = ViTSize(64, 8, 48, 2, 4)
PROBE = ["--linear_probe", "--model", "vit_demo_patch8", *SMALL]


def random_tensor(seed: int, *shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32)))


def probe(name: str = "vit_demo_patch8", classes: int = 5) -> Classifier:
    model = build_classifier(name, classes, global_pool=False)
    model.make_linear_probe()
    return model


def test_lars_reproduces_the_reference() -> None:
    """Three steps at rate 0.1 with weight decay 0.01; the reference's inputs are numpy's normal numbers by seed."""
    expected = np.load(GOLDEN / "lars.npz")
    matrix, vector = random_tensor(1, 5, 7), random_tensor(2, 5)
    optimizer = Lars([matrix, vector], lr=0.1, weight_decay=0.01)
    for step in range(3):
        matrix.grad, vector.grad = random_tensor(10 + step, 5, 7).data, random_tensor(20 + step, 5).data
        optimizer.step()
        assert np.array_equal(matrix.detach().numpy(), expected["p"][step])
        np.testing.assert_allclose(vector.detach().numpy(), expected["b"][step], rtol=1e-6)


def test_lars_moves_a_tensor_of_zeros_and_leaves_one_without_gradient() -> None:
    zero, still, other = (torch.nn.Parameter(torch.full((2, 2), value)) for value in (0.0, 1.0, 2.0))
    zero.grad, other.grad = torch.ones(2, 2), torch.zeros(2, 2)
    Lars([zero, still, other], lr=0.5).step()
    assert zero.tolist() == [[-0.5, -0.5]] * 2
    assert still.tolist() == [[1.0, 1.0]] * 2
    assert other.tolist() == [[2.0, 2.0]] * 2


def test_a_probe_trains_its_head_alone_and_keeps_the_network_in_evaluation() -> None:
    model = probe()
    before = {key: value.clone() for key, value in model.net.state_dict().items()}
    model.train()
    assert not model.net.blocks.training
    assert not model.net.training
    assert model.net.head.training
    optimizer = build_optimizer(model, 0.1, 0.0, 1.0, opt="lars")
    model(torch.rand(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    changed = {key for key, value in model.net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked"} | {
        "head.1.weight",
        "head.1.bias",
    }
    assert not model.eval().net.head.training


def test_a_probes_head_is_the_published_one() -> None:
    norm, linear = probe("vit_demo_patch8", 100).net.head
    assert (norm.eps, norm.affine) == (1e-6, False)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not linear.bias.any()


@pytest.mark.parametrize("name", ["vit_demo_patch8", "test_resnet", "test_convnext"])
def test_a_fused_probe_is_an_ordinary_classifier_of_equal_logits(name: str) -> None:
    model = probe(name)
    image = torch.rand(16, 3, 64, 64)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.rand_like(image))
        plain = build_classifier(name, 5, global_pool=False).eval()
        plain.net.load_state_dict(fused_head(model.net.state_dict()))
        expected = model.eval()(image)
        assert expected.std() > 1e-3
        torch.testing.assert_close(plain(image), expected, rtol=1e-4, atol=1e-5)


def test_other_weights_are_not_fused() -> None:
    for name in ("test_resnet", "vit_demo_patch8"):
        state = build_classifier(name, 5).state_dict()
        assert fused_head(state).keys() == state.keys()


def test_a_network_without_linear_head_is_refused() -> None:
    model = Classifier(build_vit(TINY, 5), (0.5,) * 3, (0.5,) * 3)
    model.net.head = torch.nn.Identity()
    with pytest.raises(ConfigError, match="linear head"):
        model.make_linear_probe()


def test_the_probe_has_defaults_of_its_own_and_flags_win(tmp_path: Path) -> None:
    config = load_config(FinetuneConfig, ["--linear_probe", "--epochs", "50"])
    assert (config.optim.epochs, config.optim.batch_size, config.optim.blr) == (50, 512, 0.1)
    assert (config.classifier.opt, config.classifier.mean_pool, config.augment.aa) == ("lars", False, None)
    assert load_config(FinetuneConfig, []).optim.blr == 1e-3
    (tmp_path / "probe.yaml").write_text("linear_probe: true\nwarmup_epochs: 3\n")
    config = load_config(FinetuneConfig, ["--config", str(tmp_path / "probe.yaml"), "--no_cls_token"])
    assert (config.optim.warmup_epochs, config.optim.blr, config.classifier.mean_pool) == (3, 0.1, True)


def test_a_probe_is_trained_exported_and_evaluated(
    images: Path,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    given = ["--data_path", str(images), "--finetune", str(pretrained), "--output_dir", str(output)]
    trained = outcome_of(finetune_main, [*PROBE, *given, "--opt", "sgd"], monkeypatch, capsys)
    assert trained.code == 0, trained.stderr
    assert "hardly moves" not in trained.stderr
    accuracy = trained.stderr.rpartition("acc1 ")[2].split()[0]
    assert "confusion matrix of the validation images:\nlabel \\ predicted" in trained.stderr
    validation = json.loads((output / "validation.json").read_text())
    hits = sum(row.get(name, 0) for name, row in validation["confusion"].items())
    images_seen = sum(sum(row.values()) for row in validation["confusion"].values())
    assert f"{100 * hits / images_seen:.2f}" == accuracy == f"{validation['test_acc1']:.2f}"
    means = [recall["percent"] for recall in validation["recall"].values()]
    last = json.loads((output / "log.txt").read_text().splitlines()[-1])
    assert last["test_balanced_acc"] == validation["test_balanced_acc"] == pytest.approx(sum(means) / len(means))
    exported, start = read_weights(output / "model.safetensors").tensors, read_weights(pretrained / "model.safetensors")
    assert "head.weight" in exported
    assert torch.equal(exported["blocks.0.attn.qkv.weight"], start.tensors["blocks.0.attn.qkv.weight"])
    evaluate = ["--data_path", str(images), "--eval", "--num_workers", "0", "--resume", str(output)]
    for case in ("export", "checkpoint"):
        found = outcome_of(finetune_main, [*evaluate, "--output_dir", str(tmp_path / case)], monkeypatch, capsys)
        assert f"acc1 {accuracy} %" in found.stderr, case
        assert "confusion matrix" in found.stderr, case
        (output / "model.safetensors").unlink(missing_ok=True)


def test_a_rate_at_which_lars_stands_still_is_told(caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--linear_probe", "--accum_iter", "4"]

    def warn(flags: list[str], ranks: int) -> None:
        config = load_config(FinetuneConfig, flags)
        warn_of_slow_lars(config.classifier.opt, config.optim, ranks)

    warn(flags, ranks=8)
    warn([*flags, "--opt", "sgd", "--batch_size", "8"], ranks=1)
    assert not caplog.messages
    warn([*flags, "--batch_size", "8"], ranks=1)
    assert "0.0125 hardly moves" in caplog.text


def test_a_probe_resumes_where_it_was(images: Path, pretrained: Path, tmp_path: Path) -> None:
    flags = [*PROBE[:3], "--opt", "lars", "--finetune", str(pretrained), "--cls_token"]
    finetune_in(tmp_path / "whole", images, *flags, "--epochs", "2")
    finetune_in(tmp_path / "parts", images, *flags, "--epochs", "1", "--cooldown_epochs", "1", "--keep", "5")
    whole, parts = (read_weights(tmp_path / name / "model.safetensors").tensors for name in ("whole", "parts"))
    assert not torch.equal(whole["head.weight"], parts["head.weight"])
    for path in (tmp_path / "whole").glob("checkpoint-6.*"):
        path.unlink()
    (tmp_path / "whole" / "model.safetensors").unlink()
    finetune_in(tmp_path / "whole", images, *flags, "--epochs", "2")
    again = read_weights(tmp_path / "whole" / "model.safetensors").tensors
    assert all(torch.equal(again[key], whole[key]) for key in whole)

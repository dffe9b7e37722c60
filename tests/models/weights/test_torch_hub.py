"""torch.hub and the names of released weights: what is listed, what loads without a network, what a name stands for."""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from tiny_runs import ROOT, verb

from golden_rule import fill_by_rule, rule_tensor
from mae_dat.config.errors import CheckpointError, MissingInputError
from mae_dat.config.runs import FinetuneConfig
from mae_dat.models.classifier import Classifier, build_classifier
from mae_dat.models.mae import IMAGENET_MEAN, MaskedAutoencoder, build_mae, mask_noise
from mae_dat.models.tokenizer import VQGAN, LightTokenizer, load_tokenizer
from mae_dat.models.weights import torch_hub as hub
from mae_dat.models.weights.read import read_model_file
from mae_dat.robustness.evaluate_run import evaluated_config
from mae_dat.storage import released as store
from mae_dat.storage.released import released_weights
from mae_dat.training.finetune import initialize_from

NAMES = list(hub.__all__)
TINY: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
TINY |= {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4}
DEMO = store.PACKAGE_ROOT / released_weights()["mae_dat_demo"].file


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store."""
    monkeypatch.setenv("MAE_DAT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MAE_DAT_MIRROR", raising=False)
    (tmp_path / "home" / "weights").mkdir(parents=True)
    return tmp_path / "home" / "weights"


@pytest.fixture
def demo() -> Path:
    """The embedded classifier."""
    return DEMO


def picture(side: int = 64) -> torch.Tensor:
    return torch.rand(2, 3, side, side)


def resnet50_as_easyrobust_saves_it(path: Path) -> torch.nn.Module:
    """A ResNet50 with weights by the rule, saved behind its normalization."""
    net = timm.create_model("resnet50").eval()
    net.load_state_dict(fill_by_rule(net))
    statistics = {"0.mean": torch.tensor(IMAGENET_MEAN), "0.std": torch.tensor([0.229, 0.224, 0.225])}
    torch.save({**statistics, **{f"1.{key}": value for key, value in net.state_dict().items()}}, path)
    return net


# ---- what torch.hub shows ----


def test_the_list_and_the_help_of_torch_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "owner_mae_dat_main").symlink_to(ROOT)  # as after a download
    quiet = {"skip_validation": True, "trust_repo": True}
    assert torch.hub.list("owner/mae_dat:main", **quiet, verbose=False) == sorted(NAMES)
    for name in NAMES:
        text = torch.hub.help("owner/mae_dat:main", name, **quiet)
        assert "pixels" in text or "as mae_vit_base_patch16" in text, name
        assert len(text.splitlines()[0]) <= 120
        assert inspect.signature(getattr(hub, name)).parameters["pretrained"].default is False


def test_importing_hubconf_reads_no_weights_writes_nothing_and_needs_no_torch() -> None:
    code = """
import sys
events = []
def note(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        events.append(arguments)
    if event.startswith(("socket.", "urllib.", "os.mkdir", "subprocess.")):
        events.append((event, arguments))
sys.addaudithook(note)
import hubconf
assert not events, events
assert not {"torch", "timm", "numpy"} & set(sys.modules)
assert callable(hubconf.mae_dat_demo)
open("/dev/null", "w")
assert len(events) == 1  # the hook works
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def imported(path: Path, anywhere: bool = False) -> set[str]:
    """Modules that a file imports at its top, or anywhere in it."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_dependencies_are_what_the_models_import() -> None:
    """All that torch_hub.py and the modules behind it import, and what these wait with: taming until a VQGAN is built,
    rich until a download."""
    waiting = imported(ROOT / "mae_dat" / "models" / "weights" / "torch_hub.py", anywhere=True)
    seen, foreign = set(), {"taming", "rich"}
    while waiting:
        name = waiting.pop()
        path = ROOT / name.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name.partition(".")[0] != "mae_dat":
            foreign.add(name.partition(".")[0])
        elif name not in seen and file.is_file():
            seen.add(name)
            waiting |= imported(file)
    assert "mae_dat.models.tokenizer.vqgan" in seen
    tree = ast.parse((ROOT / "hubconf.py").read_text())
    listed = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    with_torch = {"numpy"}
    assert foreign - set(sys.stdlib_module_names) - with_torch == set(listed)


@pytest.mark.parametrize(
    "name, million",
    [
        ("mae_vit_base_patch16", 111.9),
        ("mae_vit_large_patch16", 329.5),
        ("mae_vit_huge_patch14", 657.1),
        ("vit_base_patch16", 86.6),
        ("vit_large_patch16", 304.3),
        ("vit_huge_patch14", 632.0),
        ("resnet50_dat", 25.6),
        ("vit_base_patch16_dat", 86.6),
        ("mae_vit_huge_patch14_dat", 632.0),
        ("vqgan_f8_16384", 67.7),
        ("vqgan_f16_1024", 72.1),
        ("vqgan_demo", 0.5),
    ],
)
def test_every_name_builds_the_network_it_says(name: str, million: float) -> None:
    with torch.device("meta"):
        model = getattr(hub, name)()
    assert not model.training
    assert sum(value.numel() for value in model.parameters()) / 1e6 == pytest.approx(million, abs=0.06)
    entry = released_weights()[name]
    if entry.kind == "classifier" and "vit" in name:
        assert ("net.fc_norm.weight" in model.state_dict()) == (name != "vit_base_patch16_dat")


# ---- without a network ----


def test_the_demo_loads_from_the_folder(demo: Path) -> None:
    model = torch.hub.load(str(ROOT), "mae_dat_demo", source="local", pretrained=True)
    image = picture()
    assert isinstance(model, Classifier)
    assert model(image).shape == (2, 10)
    file = read_model_file("mae_dat_demo")
    assert file.facts["model"] == "vit_demo_patch8"
    assert torch.equal(model.net.state_dict()["head.weight"], file.tensors["head.weight"])
    again = hub.mae_dat_demo(pretrained=str(demo))
    assert torch.equal(again(image), model(image))
    assert not torch.equal(hub.mae_dat_demo()(image), model(image))


def test_the_demo_loads_from_a_cached_copy_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What torch.hub leaves of OWNER/mae_dat:TAG after its first download; it is imported from there, not from here.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    copy = tmp_path / "hub" / "OWNER_mae_dat_TAG"
    copy.mkdir(parents=True)
    shutil.copy(ROOT / "hubconf.py", copy)
    shutil.copytree(ROOT / "mae_dat", copy / "mae_dat", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys, torch\n"
        "model = torch.hub.load('OWNER/mae_dat:TAG', 'mae_dat_demo', pretrained=True, trust_repo=True)\n"
        "print(sys.modules['mae_dat'].__file__, *model(torch.rand(1, 3, 64, 64)).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Using cache found in" in done.stderr
    assert done.stdout == f"{copy}/mae_dat/__init__.py 1 10\n"


def test_a_damaged_demo_is_not_loaded(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy" / "models" / "weights" / demo.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(demo.read_bytes()[:-1] + b"x")
    copy.with_suffix(".json").write_text(demo.with_suffix(".json").read_text())
    monkeypatch.setattr(store, "PACKAGE_ROOT", tmp_path / "copy")
    with pytest.raises(CheckpointError, match="has the wrong content"):
        hub.mae_dat_demo(pretrained=True)
    with pytest.raises(CheckpointError, match="damaged"):
        hub.mae_dat_demo(pretrained=copy)
    assert copy.is_file()  # the package's own files are not moved
    copy.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match="belongs to the package and is missing"):
        hub.mae_dat_demo(pretrained=True)


def test_the_embedded_tokenizer_under_both_its_names() -> None:
    image, one = picture(), torch.hub.load(str(ROOT), "vqgan_demo", source="local", pretrained=True)
    assert isinstance(one, LightTokenizer)
    assert torch.equal(one.encode(image), load_tokenizer().encode(image))
    assert torch.equal(load_tokenizer("vqgan_demo").encode(image), one.encode(image))
    assert not any(value.requires_grad for value in one.parameters())


# ---- weights from a path and from the store ----


def test_an_autoencoder_from_a_path_and_by_its_name(home: Path) -> None:
    reference = MaskedAutoencoder(**TINY).eval()
    reference.load_state_dict(fill_by_rule(reference))
    path = home / released_weights()["mae_vit_base_patch16"].file  # as if downloaded
    torch.save({"model": reference.state_dict()}, path)
    image, noise = picture(), mask_noise(2, 64, None, "cpu")
    for pretrained in (True, str(path), path):
        model = hub.mae_vit_base_patch16(pretrained, **TINY)
        assert torch.equal(model(image, 0.75, noise)[0], reference(image, 0.75, noise)[0])


def test_a_file_without_decoder_is_taken_only_when_said(home: Path) -> None:
    reference = MaskedAutoencoder(**TINY)
    encoder = {key: value for key, value in reference.state_dict().items() if "decoder" not in key}
    del encoder["mask_token"]
    torch.save({"model": encoder}, home / "encoder.pth")
    with pytest.raises(CheckpointError, match=r"no decoder.*decoder=False"):
        hub.mae_vit_base_patch16(home / "encoder.pth", **TINY)
    model, image = hub.mae_vit_base_patch16(home / "encoder.pth", decoder=False, **TINY), picture()
    assert torch.equal(model.features(image), reference.eval().features(image))


def test_the_released_resnet_normalizes_by_itself_and_takes_a_new_head(home: Path) -> None:
    net, image = resnet50_as_easyrobust_saves_it(home / "resnet50_dat.pth"), picture()
    model = hub.resnet50_dat(pretrained=True)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(model(image), net((image - mean) / std), atol=1e-5)
    assert (home / "resnet50_dat.json").is_file()
    smaller = hub.resnet50_dat(pretrained=True, num_classes=7)
    assert smaller(image).shape == (2, 7)
    assert torch.equal(smaller.net.conv1.weight, net.conv1.weight)
    with pytest.raises(CheckpointError, match="does not fit|no classification head"):
        hub.vit_base_patch16(home / "resnet50_dat.pth", img_size=32)


def test_nothing_that_released_weights_say_is_executed(home: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "canary"),)

    torch.save({"model": {"fc.weight": torch.ones(1)}, "args": Hostile()}, home / "resnet50_dat.pth")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        hub.resnet50_dat(pretrained=True)
    assert not (tmp_path / "canary").exists()
    torch.load(home / "resnet50_dat.pth", weights_only=False)  # the file is as hostile as it was meant to be
    assert (tmp_path / "canary").exists()


def test_what_is_not_there_is_said(home: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no such file: .*absent\.pth"):
        hub.resnet50_dat(pretrained=home / "absent.pth")
    with pytest.raises(MissingInputError, match="did you mean .*mae_vit_huge_patch14_dat"):
        hub.resnet50_dat(pretrained="mae_vit_huge_patch41_dat")


# ---- names where paths stand ----


def test_a_name_is_a_pretraining_to_start_from(home: Path) -> None:
    autoencoder = build_mae("mae_vit_demo_patch8", img_size=224)
    torch.save({"model": autoencoder.state_dict()}, home / released_weights()["mae_vit_base_patch16"].file)
    file = read_model_file("mae_vit_base_patch16")
    assert file.facts == {
        "kind": "mae",
        "model": "mae_vit_base_patch16",
        "input_size": [224, 224],
        "in_chans": 3,
        "norm_pix_loss": True,
    }
    model = build_classifier("vit_demo_patch8", 5)
    initialize_from(model, "mae_vit_base_patch16")
    assert torch.equal(model.net.blocks[0].attn.qkv.weight, autoencoder.blocks[0].attn.qkv.weight)
    with pytest.raises(CheckpointError, match="pretraining, which has no classes"):
        evaluated_config(file, FinetuneConfig())


def test_a_name_is_a_classifier_to_evaluate(home: Path) -> None:
    torch.save({"x": torch.ones(1)}, home / "mae_dat.pth")
    torch.save({"x": torch.ones(1)}, home / "vit_dat.pth")
    file = read_model_file("mae_vit_huge_patch14_dat")
    huge = evaluated_config(file, FinetuneConfig())
    assert (huge.classifier.model, huge.classifier.nb_classes, file.facts["global_pool"]) == (
        "vit_huge_patch14",
        1000,
        True,
    )
    file = read_model_file("vit_base_patch16_dat")
    base = evaluated_config(file, FinetuneConfig())
    assert (base.classifier.model, file.facts["global_pool"], base.data.image_size) == (
        "vit_base_patch16",
        False,
        (224, 224),
    )


def test_a_name_is_a_tokenizer(home: Path) -> None:
    golden = ROOT / "tests" / "golden"
    shapes = json.loads((golden / "vqgan_tiny_keys.json").read_text())["keys"]
    tensors = {key: rule_tensor(key, shape) for key, shape in shapes.items()}
    with np.load(golden / "vq_grads.npz") as arrays:
        tensors["quantize.embedding.weight"] = torch.from_numpy(arrays["codebook"])
    torch.save({"state_dict": tensors}, home / "vqgan_f8_256.ckpt")
    tokenizer = load_tokenizer("vqgan_f8_256")
    assert isinstance(tokenizer, VQGAN)
    assert torch.equal(tokenizer.codebook, tensors["quantize.embedding.weight"])
    assert torch.equal(hub.vqgan_f8_16384(home / "vqgan_f8_256.ckpt").codebook, tokenizer.codebook)


# ---- the command ----


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    verb("list")(arguments)
    return capsys.readouterr().out


def test_the_command_lists_tells_and_finds(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "resnet50_dat.pth").write_bytes(b"x" * 3_000_000)
    table = command([], monkeypatch, capsys)
    assert max(len(line) for line in table.splitlines() if not line.startswith("Downloads go to ")) <= 80
    lines = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert set(released_weights()) <= set(lines)
    assert lines["resnet50_dat"].split()[-1] == "yes"
    assert " 3 " in lines["resnet50_dat"]
    assert lines["vqgan_demo"].split()[1:] == ["2", "Apache-2.0", "yes"]
    assert "CC-BY-NC-4.0" in lines["mae_vit_huge_patch14_dat"]
    assert lines["vit_base_patch16"].split() == ["vit_base_patch16", "CC-BY-NC-4.0"]  # not here
    assert "  MAE ViT-B/16 fine-tuned on ImageNet-1k\n" in table
    told = command(["mae_vit_huge_patch14_dat"], monkeypatch, capsys)
    assert "mCE 31.4" in told
    assert "not for commercial use" in told
    assert not list(home.glob("*.json"))
    verb("get")(["vqgan_demo"])
    assert str(store.PACKAGE_ROOT) in capsys.readouterr().out


def test_the_command_fails_without_a_network_and_says_how_to_go_on(home: Path) -> None:
    environment = {**os.environ, "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "mae_dat", "get", "vqgan_f16_1024", "--output_dir", str(home.parent / "mirror")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 69
    assert "Traceback" not in done.stderr
    assert "MAE_DAT_MIRROR" in done.stderr

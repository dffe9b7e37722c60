"""Files that were written before the code was split into packages can still be read: a checkpoint amid a DAT run,
exported weights, and the results of an evaluation (tests/golden/earlier)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import GOLDEN
from tiny_runs import one_thread, verb

from mae_dat.config.adversaries import DatConfig
from mae_dat.config.flags import RENAMED
from mae_dat.config.groups import AugmentConfig, ClassifierConfig, DataConfig, OptimConfig, RunConfig
from mae_dat.config.runs import FinetuneConfig
from mae_dat.data.generated.folder import FolderSettings, write_image_folder
from mae_dat.models import mae
from mae_dat.models.mae import ViTSize
from mae_dat.models.tokenizer import LightConfig, LightTokenizer
from mae_dat.models.weights.open import open_model
from mae_dat.robustness.scores.results import read_results, write_results
from mae_dat.runtime.console import Console
from mae_dat.runtime.run_log import read_log
from mae_dat.storage.weight_files import read_weights
from mae_dat.training.finetune import run_finetuning

write_report_again = verb("report")

__all__ = ["one_thread"]

EARLIER = GOLDEN / "earlier"
SIDE = 32
# A CPU of another kind rounds differently.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def tiny_vit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(mae.VIT_SIZES, "vit_tiny", ViTSize(SIDE, 8, 32, 2, 2))
    monkeypatch.setenv("MAE_DAT_HOME", str(tmp_path / "home"))


@pytest.mark.usefixtures("one_thread")
def test_a_checkpoint_amid_a_dat_run_resumes_and_ends_as_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the settings of the checkpoint name relative paths
    shutil.copytree(EARLIER / "dat", "dat")
    write_image_folder(Path("images"), FolderSettings(train=34, val=20, conflict=10, silhouette=10, size=SIDE))
    torch.manual_seed(0)
    LightTokenizer(LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=32)).save(
        Path("tokenizer.safetensors")
    )
    config = FinetuneConfig(
        run=RunConfig(output_dir="dat", device="cpu", precision="fp32", images_every=0),
        data=DataConfig(data_path="images", input_size=(SIDE,), num_workers=0),
        classifier=ClassifierConfig("vit_tiny"),
        augment=AugmentConfig(aa=None),
        optim=OptimConfig(batch_size=8, epochs=2, warmup_epochs=1, blr=0.05),
        dat=DatConfig("released", share=0.05, tokenizer="tokenizer.safetensors"),
    )
    run_finetuning(config, Console(quiet=True))
    weights = read_weights(Path("dat/model.safetensors")).tensors
    expected = read_weights(EARLIER / "dat_end.safetensors").tensors
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE)
    records = read_log(Path("dat/log.txt"))
    expected_records = read_log(EARLIER / "dat_end_log.txt")
    assert [record["step"] for record in records] == [4, 8]
    for record, expected_record in zip(records, expected_records, strict=True):
        assert record.keys() - {"test_balanced_acc"} == expected_record.keys()  # a later score
        assert record["train_loss"] == pytest.approx(expected_record["train_loss"], rel=1e-4)
    settings = json.loads(Path("dat/checkpoint-00000008.json").read_text())["settings"]
    earlier = json.loads((EARLIER / "dat" / "checkpoint-00000006.json").read_text())["settings"]
    earlier = {RENAMED.get(name, name): value for name, value in earlier.items()}
    assert {name: settings[name] for name in earlier} == earlier  # later releases have more flags


def test_exported_weights_give_the_same_logits() -> None:
    model = open_model(EARLIER / "classifier.safetensors").classifier()
    image = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(image)
    torch.testing.assert_close(logits, torch.from_numpy(np.load(EARLIER / "classifier_logits.npy")), **CLOSE)


def test_results_give_the_same_report(tmp_path: Path) -> None:
    results = read_results(EARLIER / "results.json")
    write_results(results, tmp_path / "results.json")
    assert (tmp_path / "results.json").read_bytes() == (EARLIER / "results.json").read_bytes()
    write_report_again([str(tmp_path)])
    for name in ("report.md", "report.csv"):
        assert (tmp_path / name).read_bytes() == (EARLIER / name).read_bytes()

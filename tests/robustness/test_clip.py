"""The documented example of a zero-shot CLIP model runs, with a tiny random CLIP."""

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from tiny_runs import draw_folder

transformers = pytest.importorskip("transformers")


def tiny_clip(folder: Path) -> str:
    """A random CLIP of 32 px with a vocabulary of letters."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {word: number for number, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(vocabulary), "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return str(folder)


def test_the_documented_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "how-to" / "evaluate.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "CLIPModel" in block]
    data = draw_folder(tmp_path / "ROOT", train=0, val=10, conflict=0)
    names = sorted(folder.name for folder in (data / "val").iterdir())
    monkeypatch.chdir(tmp_path)
    code = code.replace("input_size=224", "input_size=32, num_workers=0, progress=False")
    code = code.replace('["clean", "generated"]', '"clean"')
    scope: dict[str, Any] = {"NAME": tiny_clip(tmp_path / "clip"), "CLASSES": names}
    exec(code, scope)
    assert "Clean (%) ↑" in capsys.readouterr().out
    logits = scope["zero_shot"](torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    assert len([line for line in code.splitlines() if line.strip()]) <= 14

"""The notebooks run from start to end, and are stored without outputs."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_there_are_two_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["dat_in_your_loop", "visual_words"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the tools that run notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = run(nbformat.read(path, 4), path.parent, monkeypatch)
    printed = "".join(output.text for output in outputs(notebook) if output.output_type == "stream")
    images = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    if path.stem == "visual_words":
        assert len(images) == 3
        assert "1024 words" in printed
        shares = [float(share) for share in re.findall(r"([\d.]+)% of the words changed", printed)]
        assert len(shares) == 3
        assert shares[0] < 0.5 < shares[2]
    else:
        assert len(images) == 2
        ((plain, dat),) = re.findall(r"^clean +([\d.]+) +([\d.]+)", printed, re.MULTILINE)
        assert float(plain) > 80
        assert float(dat) > 80


def run(notebook: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run all cells in a kernel of their own; an error in one raises."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel chooses the one that shows figures in the notebook
    return NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()


def outputs(notebook: Any) -> Iterator[Any]:
    for cell in notebook.cells:
        yield from cell.get("outputs", ())


PROGRESS = """
import mae_dat
result = mae_dat.finetune(
    data_path="photos", output_dir="out", model="vit_demo_patch8", input_size=32, batch_size=2, epochs=12,
    num_workers=0, images_every=0,
)
result
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_shows_progress_and_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bar that is replaced in place, the log's lines, and a table."""
    from tiny_runs import draw_folder

    draw_folder(tmp_path / "photos", train=40, val=20, conflict=0)
    cells = [PROGRESS, 'mae_dat.evaluate("out", "clean", "photos", num_workers=0)']
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    run(notebook, tmp_path, monkeypatch)
    training, evaluation = notebook.cells
    (bar,) = [output for output in training.outputs if output.output_type == "display_data"]
    assert re.fullmatch(r"fine-tune: 240/240 in \d+:\d\d", bar.data["text/plain"])
    assert "<progress" not in bar.data["text/html"]
    printed = "".join(output.text for output in training.outputs if output.output_type == "stream")
    assert "epoch 12/12" in printed
    assert len(printed.splitlines()) < 60
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr" and "tqdm" not in output.text]
    (result,) = [output for output in training.outputs if output.output_type == "execute_result"]
    assert result.data["text/plain"].startswith("TrainingResult: out/model.safetensors")
    (table,) = [output for output in evaluation.outputs if output.output_type == "execute_result"]
    assert "<table>" in table.data["text/html"]

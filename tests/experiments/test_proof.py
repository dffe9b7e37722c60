"""The proof's command, whole at a toy size, and what it refuses."""

from pathlib import Path

import pytest
from tiny_runs import one_thread  # noqa: F401 - used by itself

from mae_dat.config.commands.compare import PROOF_GROUPS, ProofConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.variants import group_label
from mae_dat.experiments.compare import groups_to_train
from mae_dat.experiments.proof import comparisons, prove
from mae_dat.robustness.scores.results import read_results
from mae_dat.runtime.console import Console
from mae_dat.runtime.inputs import read_inputs


@pytest.mark.slow
def test_quick_trains_and_measures_every_arm(tmp_path: Path) -> None:
    config = ProofConfig(output_dir=str(tmp_path / "out"), quick=True, jobs=1)
    tables = prove(config, Console(quiet=True))
    (one,) = comparisons(config).values()
    assert read_inputs(tmp_path / "out" / "inputs.json").rows["data"].startswith("images: ")
    assert len(groups_to_train(one)) == len(PROOF_GROUPS) + 4
    results = read_results(Path(one.output_dir) / "results.json")
    runs = results["training"]["runs"]
    assert [run["label"] for run in runs.values()] == [group_label(group) for group in groups_to_train(one)]
    assert all(run["cpu_seconds"] > 0 for run in runs.values())
    assert set(results["training"]["cpu_seconds"]) == {"pretrain", "pretrain, DAT"}
    assert all(len(results["cells"][name]["generated"]) == 75 for name in runs)
    told = tables.read_text()
    assert all(f"| {group_label(group)} |" in told for group in groups_to_train(one))


def test_a_data_set_has_a_folder_of_its_name(tmp_path: Path) -> None:
    config = ProofConfig(
        data_path=("a/photos", "b/photos", "demo"), output_dir=str(tmp_path), protocol="dat", restrict_classes=True
    )
    found = comparisons(config)
    assert list(found) == ["a-photos", "b-photos", "demo"]
    assert [Path(one.output_dir).name for one in found.values()] == list(found)
    assert all(one.seeds == (0, 1, 2) for one in found.values())
    assert all((one.protocol, one.restrict_classes) == ("dat", True) for one in found.values())


def test_data_sets_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names a folder twice"):
        comparisons(ProofConfig(data_path=("a", "a"), output_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="--arms: unknown variant 'simbolic': did you mean symbolic"):
        comparisons(ProofConfig(arms=("plain", "simbolic"), output_dir=str(tmp_path)))

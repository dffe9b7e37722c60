"""One vocabulary for all verbs: a flag has one meaning, one type, and where it matters one default."""

from collections import defaultdict
from pathlib import Path

import pytest

from mae_dat.cli import run
from mae_dat.config.commands.submit import launcher_command
from mae_dat.config.errors import ConfigError, MissingInputError
from mae_dat.config.flags import Flag
from mae_dat.verbs import VERBS

ONE_DEFAULT = (
    *("threads", "num_workers", "device", "seed", "precision", "tokenizer", "on_bad", "in_chans", "pretrained"),
    "config",
)
REMOVED = {
    "data",
    "output",
    "data_paths",
    "workers",
    "out_dir",
    "checkpoints",
    "network",
    "pictures",
    "pictures_every",
    "batch",
    "size_px",
}
"""Earlier or common spellings of flags in the vocabulary."""
MODELS = {
    "evaluate": ["--checkpoint", "mae_dat_demo"],
    "features": ["--checkpoint", "mae_dat_demo", "--knn", "1"],
    "analyze": ["--checkpoint", "mae_dat_demo"],
}


def flags_by_name() -> dict[str, dict[str, Flag]]:
    """For every flag the verbs that have it, with their flag."""
    found: dict[str, dict[str, Flag]] = defaultdict(dict)
    for verb, entry in VERBS.items():
        for flag in entry.command_line(verb).flags:
            if not flag.positional:
                found[flag.name][verb] = flag
    return found


FLAGS = flags_by_name()
WITH_DATA = [verb for verb in FLAGS["data_path"] if verb != "demo"]


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_has_one_type_in_all_verbs(name: str) -> None:
    flags = list(FLAGS[name].values())
    assert len({flag.kind for flag in flags}) == 1
    largest = max((set(flag.choices) for flag in flags), key=len)
    assert all(set(flag.choices) <= largest and bool(flag.choices) == bool(largest) for flag in flags)
    assert len({flag.bare for flag in flags}) == 1


@pytest.mark.parametrize("name", ONE_DEFAULT)
def test_a_shared_flag_has_one_default(name: str) -> None:
    assert len(FLAGS[name]) > 1
    assert len({flag.default for flag in FLAGS[name].values()}) == 1


def test_the_limits_of_benchmarks_mean_the_same_in_all_verbs() -> None:
    verbs = ("evaluate", "finetune", "compare", "demo", "proof")
    assert FLAGS["limit_corrupted"].keys() == set(verbs)
    for flag, start in (
        ("limit", "Images of each suite, and of each corruption and severity"),
        ("limit_corrupted", "At most this many images for each corruption and severity, and under each attack"),
    ):
        for verb in verbs:
            text = FLAGS[flag][verb].help.removeprefix("With --eval: ")
            assert text.lower().startswith(start.lower()), verb
    assert {FLAGS["limit"][verb].default for verb in verbs} == {None}


def test_names_that_are_not_in_the_vocabulary() -> None:
    assert not REMOVED & FLAGS.keys()


def test_every_verb_that_computes_has_a_device() -> None:
    without = {
        "compare",
        "demo",
        "proof",
        "report",
        "pack",
        "scan",
        "split",
        "list",
        "get",
        "convert",
        "corrupt",
        "recipes",
        "completion",
    }
    assert VERBS.keys() - FLAGS["device"].keys() == without
    assert {flag.help for flag in FLAGS["device"].values()} == {"cuda, cuda:N, cpu, or auto: CUDA if there is a GPU."}


def test_every_verb_that_computes_has_threads() -> None:
    assert FLAGS["threads"].keys() == FLAGS["device"].keys() | {"compare", "demo", "proof"}
    assert len({flag.help for flag in FLAGS["threads"].values()}) == 1


def test_the_launcher_shares_no_flag_with_a_verb() -> None:
    """So a flag on the wrong side of the verb is noticed."""
    names = {flag.name for flag in launcher_command("submit").flags}
    assert not names & FLAGS.keys()


@pytest.mark.parametrize("verb", WITH_DATA)
def test_every_verb_reads_the_images_that_the_environment_names(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "$MAE_DAT_DATA" in FLAGS["data_path"][verb].help
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAE_DAT_DATA", "nowhere")
    with pytest.raises((ConfigError, MissingInputError), match="nowhere"):
        run([*verb.split(), *MODELS.get(verb, [])])


def test_the_demo_draws_its_images_whatever_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_DAT_DATA", "nowhere")
    assert VERBS["demo"].load([], "demo").root == "demo"
    assert VERBS["compare"].load([], "compare").root == "nowhere"
    monkeypatch.delenv("MAE_DAT_DATA")
    assert VERBS["compare"].load([], "compare").root == "demo"
    assert VERBS["proof"].load([], "proof").roots == VERBS["tokenizer train"].load([], "train").roots == ("demo",)

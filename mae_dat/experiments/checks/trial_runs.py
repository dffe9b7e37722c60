"""One real run of each kind at tiny size: pretraining, fine-tuning, fine-tuning with DAT, evaluation.

The runs do all that a long one does: they decode images in a worker process, train, and write checkpoints, logs and
weights. They use generated images, and the weights and the tokenizer that come with the package.
"""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from mae_dat.config.commands.doctor import DoctorConfig
from mae_dat.config.errors import NumericsError
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.experiments.checks.row import CheckRow

_STEPS, _BATCH = 2, 8
_VAL_IMAGES, _CORRUPTED_IMAGES = 40, 2
_WEIGHTS = "mae_dat_demo"
_LEAST_ACCURACY = 20.0
"""In percent. The weights have 40 % on all generated images, and guessing has 10 %."""


class TrialRuns:
    """The runs, with generated images in a temporary folder. Nothing is left when the block ends."""

    def __init__(self, config: DoctorConfig) -> None:
        self.config = config
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._temporary:
            self._temporary.cleanup()

    @property
    def folder(self) -> Path:
        """The temporary folder, created at its first use."""
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="mae-dat-doctor-")
        return Path(self._temporary.name)

    @property
    def images(self) -> Path:
        """The folder of generated images, drawn at its first use."""
        from mae_dat.data.generated.folder import FolderSettings, write_image_folder

        settings = FolderSettings(train=_STEPS * _BATCH, val=_VAL_IMAGES, conflict=0, silhouette=0)
        return write_image_folder(self.folder / "images", settings)

    def pretrain(self) -> CheckRow:
        """Pretrain a masked autoencoder."""
        from mae_dat.runtime.console import Console
        from mae_dat.training.pretrain import run_pretraining

        config = PretrainConfig.from_flags(model="mae_vit_demo_patch8", **self._flags("pretraining"))
        return self._train("pretraining", lambda: run_pretraining(config, Console(quiet=True)))

    def finetune(self) -> CheckRow:
        """Fine-tune a classifier."""
        return self._finetune("fine-tuning")

    def finetune_with_dat(self) -> CheckRow:
        """Fine-tune a classifier with DAT."""
        return self._finetune("DAT", dat="released")

    def _finetune(self, name: str, **flags: Any) -> CheckRow:
        from mae_dat.runtime.console import Console
        from mae_dat.training.finetune import run_finetuning

        config = FinetuneConfig.from_flags(model="vit_demo_patch8", finetune=_WEIGHTS, **self._flags(name), **flags)
        return self._train(name, lambda: run_finetuning(config, Console(quiet=True)))

    def _flags(self, name: str) -> dict[str, Any]:
        """Return the flags of a training that writes to the folder `name`."""
        small = {"input_size": 64, "batch_size": _BATCH, "epochs": 1, "warmup_epochs": 0, "num_workers": 1}
        quiet = {"images_every": 0, "hang_minutes": 0}
        given = {"device": self.config.device, "precision": self.config.precision}
        return {"data_path": self.images, "output_dir": self.folder / name, **small, **quiet, **given}

    def _train(self, name: str, train: Callable[[], object]) -> CheckRow:
        """Run a training and return its row. Raises NumericsError for a loss that is not finite."""
        from mae_dat.runtime.run_log import read_log

        with _one_thread():
            start = time.perf_counter()
            train()
            seconds = time.perf_counter() - start
        record = read_log(self.folder / name / "log.txt")[-1]
        if not math.isfinite(record["train_loss"]):
            raise NumericsError(f"the loss is {record['train_loss']}.")
        text = f"{seconds:.1f} s for {_STEPS} steps of {_BATCH} images, loss {record['train_loss']:.2f}"
        if "train_changed_words" in record:
            text += f", {100 * record['train_changed_words']:.1f} % of the words changed"
        return CheckRow("ok", name, text)

    def evaluate(self) -> CheckRow:
        """Evaluate the included classifier on clean and corrupted images."""
        from mae_dat.robustness.evaluation import run_evaluation
        from mae_dat.robustness.network import EvalOptions
        from mae_dat.robustness.open_networks import open_network
        from mae_dat.robustness.report.summarize import summarize
        from mae_dat.robustness.setup import EvaluationSetup
        from mae_dat.robustness.suites.base import CLEAN, GENERATED, SuiteSettings
        from mae_dat.runtime.console import Console
        from mae_dat.runtime.device import amp_dtype, pick_device

        device = pick_device(self.config.device)
        options = EvalOptions(device, amp_dtype(self.config.precision, device))
        settings = SuiteSettings(self.images, limit_corrupted=_CORRUPTED_IMAGES, device=device)
        with _one_thread():
            start = time.perf_counter()
            network = open_network(_WEIGHTS, None, _WEIGHTS, options)
            setup = EvaluationSetup(options, None, Console(quiet=True))
            results = run_evaluation([network], settings, (CLEAN, GENERATED), setup, title="doctor")
            seconds = time.perf_counter() - start
        accuracy = next(metric for metric in summarize(results).metrics if metric.key == CLEAN).values[_WEIGHTS].value
        text = f"{seconds:.1f} s, accuracy {accuracy:.1f} % on clean images"
        if accuracy < _LEAST_ACCURACY:
            fix = "try --precision fp32 and --device cpu, and report this as a bug, with the table"
            return CheckRow("failed", "evaluation", f"{text}; 30 to 40 % is expected", fix)
        return CheckRow("ok", "evaluation", text)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: tiny tensors gain nothing from more, for which every step waits on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

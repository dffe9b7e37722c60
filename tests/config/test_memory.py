"""Errors that mean that there is no memory left, and the flags that their messages name."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mae_dat.config.commands.evaluate import EvaluateConfig
from mae_dat.config.flags import flat_values
from mae_dat.config.memory import MemoryLimitError, is_memory_error, memory_errors_name_flags
from mae_dat.config.runs import FinetuneConfig
from mae_dat.verbs import Verb

GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 77.90 GiB memory in use. Of the allocated memory 70.00 GiB "
    "is allocated by PyTorch, and 6.00 GiB is reserved by PyTorch but unallocated."
)


def real_error(allocate: Any) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    return caught.value


def test_errors_of_torch_numpy_and_the_system_are_recognized() -> None:
    assert is_memory_error(real_error(lambda: torch.empty(2**50)))
    assert is_memory_error(real_error(lambda: np.empty(2**50)))
    assert is_memory_error(torch.OutOfMemoryError(GPU))
    assert is_memory_error(RuntimeError("CUDA error: out of memory"))
    assert is_memory_error(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_memory_error(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_memory_error(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_memory_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_memory_error(ValueError("out of memory"))


def message(error: BaseException, settings: dict[str, Any]) -> str:
    with pytest.raises(MemoryLimitError) as caught, memory_errors_name_flags(settings):
        raise error
    assert caught.value.exit_code == 64
    assert caught.value.__cause__ is error
    return str(caught.value)


def finetuning(output: Path, **flags: Any) -> dict[str, Any]:
    return flat_values(FinetuneConfig.from_flags(output_dir=str(output), num_workers=4, **flags))


def test_a_training_names_the_flags_that_keep_its_result(tmp_path: Path) -> None:
    text = message(torch.OutOfMemoryError(GPU), finetuning(tmp_path, batch_size=64, accum_iter=2))
    assert text.startswith("out of memory on the GPU (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a ")
    assert "--batch_size 32 --accum_iter 4: about half the memory for as many images per update." in text
    assert "Or give --checkpoint_activations" in text
    assert "--num_workers" not in text, "they need no memory of the GPU"
    assert "No checkpoint was written yet; the same command with these flags starts again." in text
    (tmp_path / "checkpoint-00000004.pth").touch()
    text = message(MemoryError(), finetuning(tmp_path, batch_size=6, checkpoint_activations=True))
    assert text.startswith("out of memory (an allocation failed). Lower --batch_size (now 6) and raise --accum_iter")
    assert "--checkpoint_activations" not in text
    assert "Each of the --num_workers (now 4) needs memory too" in text
    assert f"The last checkpoint in {tmp_path} is intact: with these flags the same command resumes from it." in text


def test_an_evaluation_names_its_own_flags(tmp_path: Path) -> None:
    error = real_error(lambda: torch.empty(2**50))
    for settings in (finetuning(tmp_path, eval=True, batch_size=64), flat_values(EvaluateConfig(batch_size=64))):
        text = message(error, {**settings, "num_workers": 2})
        assert text.startswith("out of memory (can't allocate memory: you tried to allocate 4503599627370496 bytes")
        assert "Lower --batch_size (now 64). Each of the --num_workers (now 2) needs memory too" in text
        assert "--accum_iter" not in text
        assert "heckpoint" not in text


def test_the_traceback_of_a_worker_becomes_one_line(tmp_path: Path) -> None:
    error = MemoryError(
        "Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\nnumpy._core._exceptions._ArrayMemoryError: Unable to allocate 8.00 PiB\n'
    )
    text = message(error, finetuning(tmp_path))
    assert "\n" not in text
    assert "(numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8.00 PiB)" in text


def test_every_verb_explains_its_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb's function meets the real error of an allocation that no machine can serve."""
    (tmp_path / "greedy.py").write_text("import torch\n\ndef main(config):\n    torch.empty(2**50)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("mae_dat.verbs._find", lambda place: __import__(place).main)
    verb = Verb("", "", "greedy", ())
    with pytest.raises(MemoryLimitError, match="Lower --batch_size"):
        verb.call(EvaluateConfig())


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="a bug"), memory_errors_name_flags({"batch_size": 8}):
        raise RuntimeError("a bug")

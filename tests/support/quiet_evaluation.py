"""`mae_dat.evaluate` for tests of its counts."""

from typing import Any

from mae_dat.robustness import evaluate as api
from mae_dat.robustness.scores.results import Results


def evaluate(models: Any, suite: Any = "all", data_path: Any = None, **flags: Any) -> Results:
    """Evaluate in float32 without workers, progress and exact losses of words, and return the results."""
    settings = {"num_workers": 0, "precision": "fp32", "progress": False, "rescore": 0, **flags}
    return api.evaluate(models, suite, data_path, **settings).results

"""Masked autoencoders and Discrete Adversarial Training: image models that stay accurate on noisy, corrupted or shifted
data.

The names in `__all__` are the Python API. Everything else is private, and may change between versions.
"""

import importlib

# As in typing, whose import would leave a command 5 ms longer without its handler of Ctrl-C. Not a plain False, because
# jedi, which completes in editors, leaves out what it knows to be false.
TYPE_CHECKING = bool()  # noqa: UP018
if TYPE_CHECKING:  # at run time they are imported on first use
    from mae_dat.analysis.extract_features import extract_features
    from mae_dat.attacks.discrete import discrete_adversary
    from mae_dat.config.adversaries import AttackConfig
    from mae_dat.config.runs import FinetuneConfig, PretrainConfig
    from mae_dat.models.classifier import Classifier
    from mae_dat.models.mae import MaskedAutoencoder
    from mae_dat.models.tokenizer import VisualTokenizer, load_tokenizer
    from mae_dat.models.weights.convert import convert
    from mae_dat.models.weights.named_models import create_model, list_models, load_model
    from mae_dat.prediction.predict import predict
    from mae_dat.robustness.corrupt import corrupt
    from mae_dat.robustness.evaluate import evaluate
    from mae_dat.training.objectives.dat import WithDAT
    from mae_dat.training.python_api import finetune, pretrain

__version__ = "0.1.0"
__all__ = [
    "AttackConfig",
    "Classifier",
    "FinetuneConfig",
    "MaskedAutoencoder",
    "PretrainConfig",
    "VisualTokenizer",
    "WithDAT",
    "convert",
    "corrupt",
    "create_model",
    "discrete_adversary",
    "evaluate",
    "extract_features",
    "finetune",
    "list_models",
    "load_model",
    "load_tokenizer",
    "predict",
    "pretrain",
]

_MODULES = {
    "AttackConfig": "config.adversaries",
    "Classifier": "models.classifier",
    "FinetuneConfig": "config.runs",
    "MaskedAutoencoder": "models.mae",
    "PretrainConfig": "config.runs",
    "VisualTokenizer": "models.tokenizer",
    "WithDAT": "training.objectives.dat",
    "convert": "models.weights.convert",
    "corrupt": "robustness.corrupt",
    "create_model": "models.weights.named_models",
    "discrete_adversary": "attacks.discrete",
    "evaluate": "robustness.evaluate",
    "extract_features": "analysis.extract_features",
    "finetune": "training.python_api",
    "list_models": "models.weights.named_models",
    "load_model": "models.weights.named_models",
    "load_tokenizer": "models.tokenizer",
    "predict": "prediction.predict",
    "pretrain": "training.python_api",
}
"""The module of each name, below `mae_dat`."""


if not TYPE_CHECKING:  # otherwise a type checker would accept any name

    def __getattr__(name: str) -> object:
        """Import a name of the API on first use, so that `import mae_dat` and `mae_dat --help` do not import torch."""
        if name not in _MODULES:
            # Python's own message has no suggestion for a name that is imported on first use.
            from difflib import get_close_matches

            hint = get_close_matches(name, _MODULES, n=1)
            text = f"module 'mae_dat' has no attribute {name!r}"
            raise AttributeError(f"{text}. Did you mean: {hint[0]!r}?" if hint else text)
        value = getattr(importlib.import_module(f"mae_dat.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Return the names of the API, for `dir` and tab completion."""
    return sorted([*__all__, "__version__"])

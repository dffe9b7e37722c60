"""Released weights by name: what they are, where they come from, what they should give. The list itself is
`weights_registry.yaml`.

Importing this module imports neither torch nor anything else that is slow.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import yaml

from mae_dat.config.errors import ConfigError
from mae_dat.config.parse import nearest

PACKAGE = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Released:
    """Weights that someone has published, or that lie in the package (`embedded`, `file` is then relative to it)."""

    name: str
    what: str
    kind: Literal["mae", "classifier", "tokenizer", "export"]
    """export: a file of ours, which says by itself what it takes to build the model."""
    model: str
    """What is built: a name of `build_mae` or `build_classifier`, or of `VQGAN_PRESETS`."""
    file: str
    """Its name in the store and in mirrors; the published one where that is telling."""
    licence: str
    origin: str
    """Where it is published and described."""
    urls: tuple[str, ...] = ()
    sha256: str | None = None
    md5: str | None = None
    """Leading digits of the MD5."""
    size: int | None = None
    """Bytes."""
    embedded: bool = False
    input_size: int = 224
    """Side in pixels that it was trained at."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Statistics that the built model normalizes pixels in [0, 1] by (a tokenizer does its own 2x - 1)."""
    nb_classes: int = 1000
    global_pool: bool = True
    decoder: bool = True
    """Whether a masked autoencoder's file holds the decoder."""
    norm_pix: bool = False
    """Whether the decoder predicts pixels normalized by patch."""
    expected: dict[str, float] = dataclasses.field(default_factory=dict)
    """Published numbers."""

    @property
    def facts(self) -> dict[str, Any]:
        """What our own files say about themselves (see `run.export`), for a file that says nothing."""
        size = {"model": self.model, "input_size": [self.input_size, self.input_size], "in_chans": 3}
        if self.kind == "mae":
            return {"kind": "mae", **size, "norm_pix_loss": self.norm_pix}
        if self.kind == "classifier":
            return {"kind": "classifier", **size, "global_pool": self.global_pool, "nb_classes": self.nb_classes}
        return {}


@functools.cache
def released() -> dict[str, Released]:
    """All released weights by name."""
    entries = yaml.safe_load((PACKAGE / "storage" / "weights_registry.yaml").read_text())
    return {name: _entry(name, **fields) for name, fields in entries.items()}


def _entry(name: str, **fields: Any) -> Released:
    lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    return Released(name=name, **{**fields, **lists})


def find_released(name: str) -> Released:
    """The weights `name`. ConfigError with the nearest names where there are none."""
    try:
        return released()[name]
    except KeyError:
        raise ConfigError(f"unknown weights {name!r}: {nearest(name, list(released()))}") from None

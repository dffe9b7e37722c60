"""Read the `config.json` of timm, which lies next to weights from the Hugging Face Hub.

It has the architecture, and in `pretrained_cfg` mean, std, size, crop and interpolation of the images; optionally
`label_names`. The file may come from anyone: `check_facts` checks its values.
"""

import json
from pathlib import Path
from typing import Any

from mae_dat.config.errors import CheckpointError
from mae_dat.storage.model_facts import check_facts

CONFIG_FILE = "config.json"
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The names of weights in a repository of timm, the preferred one first."""
_MAX_BYTES = 16 * 2**20
_COPIED = ("mean", "std", "crop_pct", "interpolation")


def read_timm_config(weights: Path) -> dict[str, Any]:
    """Return the facts about a weights file that timm's `config.json` next to it records; empty if there is none.

    Raises CheckpointError with file and key for a wrong value.
    """
    path = weights.with_name(CONFIG_FILE)
    settings = _read_settings(path) if weights.name in HUB_WEIGHTS else None
    if settings is None:
        return {}
    config: dict[str, Any] = settings.get("pretrained_cfg") or {}
    facts: dict[str, Any] = {"model": settings["architecture"]}
    facts |= {key: config[key] for key in _COPIED if config.get(key) is not None}
    size = config.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        facts |= {"in_chans": size[0], "input_size": size[1:]}
    if names := settings.get("label_names") or config.get("label_names"):
        facts["classes"] = names
    return check_facts(facts, str(path))


def _read_settings(path: Path) -> dict[str, Any] | None:
    """Return the content of a `config.json` if it is timm's, else None. Raises CheckpointError for a damaged one."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_BYTES // 2**20} MiB: it is not timm's configuration.")
        settings = json.loads(path.read_bytes())
    except OSError:
        return None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): download it again, or remove it.") from error
    if not isinstance(settings, dict) or "architecture" not in settings:
        return None
    if not isinstance(settings.get("pretrained_cfg") or {}, dict):
        raise CheckpointError(f"{path}: pretrained_cfg must be keys and values.")
    return settings


def hub_weights(folder: Path) -> Path | None:
    """Return the weights in a folder that holds timm's `config.json`, None in any other folder."""
    files = [folder / name for name in HUB_WEIGHTS if (folder / name).is_file()]
    return files[0] if files and _read_settings(folder / CONFIG_FILE) is not None else None

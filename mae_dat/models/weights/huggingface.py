"""Models for the Hugging Face hub: `from_pretrained(FOLDER or REPOSITORY)`, `save_pretrained`, `push_to_hub`.

A folder holds `config.json` (the arguments of the class), `model.safetensors` and a model card. Our own loader reads
the weights: it never reads a pickle, and every key has to match.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from torch import Tensor

from mae_dat.models.classifier import Classifier, build_classifier
from mae_dat.models.mae import MaskedAutoencoder, mae_arguments
from mae_dat.models.weights.load import DECODER_KEYS, load_autoencoder, load_classifier
from mae_dat.storage.weight_files import write_weights

_DOWNLOAD = (
    "revision",
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
)  # other arguments are for the model
_CARD = """---
{{ card_data }}
---

# {{ name | default("A model of mae_dat") }}

{{ description | default("Masked autoencoders and Discrete Adversarial Training (DAT).") }}

Pixels are float in [0, 1], (B, C, H, W); the model normalizes them itself, by the `mean` and `std` of `config.json`.

```python
from mae_dat.models.weights.huggingface import {{ class_name | default("HubClassifier") }}

model = {{ class_name | default("HubClassifier") }}.from_pretrained("FOLDER or USER/NAME")
```
"""


class _FromHub(PyTorchModelHubMixin, library_name="mae_dat", model_card_template=_CARD):
    """Read and write weights with our own code, because the mixin ignores keys that differ."""

    def _save_pretrained(self, save_directory: Path) -> None:
        write_weights(save_directory / SAFETENSORS_SINGLE_FILE, self.tensors(), {})  # type: ignore[attr-defined]

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", **arguments: Any) -> Self:
        options = {name: arguments.pop(name) for name in _DOWNLOAD if name in arguments}
        file = Path(model_id) / SAFETENSORS_SINGLE_FILE
        if not Path(model_id).is_dir():
            file = Path(hf_hub_download(model_id, SAFETENSORS_SINGLE_FILE, **options))
        model: Any = cls(**arguments)
        model.load_file(file)
        return model.eval().to(map_location)


class HubClassifier(Classifier, _FromHub, tags=["image-classification"]):
    """A classifier that the hub can store; the arguments are those of `build_classifier`.

    `classes` are the names of its outputs, if known.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        img_size: Sequence[int] | None = None,
        in_chans: int = 3,
        global_pool: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        size = (img_size[0], img_size[-1]) if img_size else None
        classifier = build_classifier(
            name, num_classes, size, global_pool=global_pool, in_chans=in_chans, mean=mean, std=std
        )
        super().__init__(classifier.net, classifier.mean.flatten().tolist(), classifier.std.flatten().tolist())
        self.classes = tuple(classes) if classes else None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to write, by bare key."""
        return dict(self.net.state_dict())

    def load_file(self, file: Path) -> None:
        """Load the weights; every key has to match. Raises MissingInputError, CheckpointError."""
        grid = getattr(getattr(self.net, "patch_embed", None), "grid_size", None)
        load_classifier(self, file, grid)


class HubMaskedAutoencoder(MaskedAutoencoder, _FromHub, tags=["masked-autoencoder"]):
    """A masked autoencoder that the hub can store; `name` is one of `MAE_MODELS`.

    With `decoder` False the files hold only the encoder.
    """

    def __init__(
        self,
        name: str,
        img_size: Sequence[int] | None = None,
        in_chans: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        decoder: bool = True,
    ) -> None:
        arguments = mae_arguments(name)
        if img_size:
            arguments["img_size"] = (img_size[0], img_size[-1])
        super().__init__(**arguments, in_chans=in_chans, mean=mean, std=std)
        self.has_decoder = decoder

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to write, without a decoder that was never trained."""
        state = self.state_dict()
        return {key: state[key] for key in state if self.has_decoder or not key.startswith(DECODER_KEYS)}

    def load_file(self, file: Path) -> None:
        """Load the weights; every key has to match. Raises MissingInputError, CheckpointError."""
        load_autoencoder(self, file, self.has_decoder, self.grid)


def write_card(folder: Path, kind: type, description: str, license: str | None) -> None:
    """Write the folder's model card, README.md, with a license if one is given."""
    tags = list(kind._hub_mixin_info.model_card_data.tags)  # type: ignore[attr-defined]
    data = ModelCardData(library_name="mae_dat", license=license, tags=tags)
    text = {"name": folder.name, "description": description, "class_name": kind.__name__}
    ModelCard.from_template(data, template_str=_CARD, **text).save(folder / "README.md")

"""Entry points of torch.hub, described in mae_dat/models/weights/torch_hub.py and README.md: `torch.hub.list`,
`torch.hub.help` and `torch.hub.load`. Importing this file reads nothing and downloads nothing."""

dependencies = ["torch", "timm", "taming", "einops", "rich", "safetensors", "yaml"]

from mae_dat.models.weights.torch_hub import *  # noqa: E402, F403

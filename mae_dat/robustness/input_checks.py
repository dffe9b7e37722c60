"""Models that give probabilities instead of logits."""

from torch import Tensor, nn

from mae_dat.models.modes import Network

_SMALLEST_PROBABILITY = 1e-30


class ProbabilityModel(nn.Module):
    """A model that gives probabilities (B, K), as one of logits: their logarithm, which softmax turns into them."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Return the logarithm of the probabilities (B, K) of images (B, C, H, W)."""
        return self.network(image).clamp_min(_SMALLEST_PROBABILITY).log()


def are_probabilities(outputs: Tensor) -> bool:
    """Return whether all rows of outputs (B, K) are probabilities: not negative, with the sum 1."""
    outputs = outputs.detach().float()
    return bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < 1e-3).all()) and outputs.shape[1] > 1

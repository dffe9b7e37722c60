"""Visual words as a target of masked autoencoding: word probabilities from the decoder's features of a patch.

Shapes: B images, R masked patches of each, n words per patch, K words in the vocabulary, D width of the decoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class WordHead(nn.Module):
    """Predicts the visual words of patches: a linear layer maps the decoder's features to n embeddings of 64 numbers,
    one per word of the patch; each embedding gives a score for each of K words.

    A single layer would have D * n * K weights: 34 M for a decoder of width 512, 4 words per patch and 16,384 words;
    this head has 1.2 M. The tokenizer's own codes are too short to score words with: 4 numbers in VQ-f8.
    """

    WIDTH = 64
    SCORES_AT_ONCE = 2**25  # 128 MiB, independent of the batch size and K

    def __init__(self, width: int, per_patch: int, num_words: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, per_patch * self.WIDTH)
        self.score = nn.Linear(self.WIDTH, num_words)

    def forward(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Score words (B, R, n) given features (B, R, D): negative log-likelihood in nats, and whether each word is the
        most probable one (1 or 0), both float32 (B, R, n).

        Scores are computed in chunks, and again in the backward pass: together they would take 4 * B * R * n * K bytes,
        5 GB for 128 images with 147 masked patches of 4 words each and K = 16,384.
        """
        rows = max(1, self.SCORES_AT_ONCE // self.score.out_features)
        embeddings = self.embed(features).reshape(-1, self.WIDTH).split(rows)
        losses, hits = [], []
        for embedding, chunk in zip(embeddings, words.reshape(-1).split(rows), strict=True):
            if len(embeddings) > 1:
                loss, hit = checkpoint(self._score_words, embedding, chunk, use_reentrant=False)
            else:
                loss, hit = self._score_words(embedding, chunk)
            losses.append(loss)
            hits.append(hit)
        return torch.cat(losses).view(words.shape), torch.cat(hits).view(words.shape)

    def _score_words(self, embedding: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(embedding).float()
        return F.cross_entropy(scores, words, reduction="none"), (scores.argmax(1) == words).float()

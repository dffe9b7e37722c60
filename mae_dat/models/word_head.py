"""Visual words as a target of masked autoencoding: the decoder's features of a patch, and how probable they make words.

Shapes: B images, R removed patches of each, n words a patch, K words in the vocabulary, D width of the decoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class WordHead(nn.Module):
    """How probable visual words are, given the decoder's features of their patches: of each of the n places in a patch
    an embedding of 64 numbers, of each embedding a score for each of K words.

    One layer would hold width * n * K weights: 34 M for a decoder of 512, 4 words a patch and 16,384 words, where this
    holds 1.2 M. The tokenizer's own codes would be too short to score words by: 4 numbers in VQ-f8.
    """

    WIDTH = 64
    SCORES_AT_ONCE = 2**25  # 128 MiB, whatever the batch and K

    def __init__(self, width: int, per_patch: int, num_words: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, per_patch * self.WIDTH)
        self.score = nn.Linear(self.WIDTH, num_words)

    def forward(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """(B, R, D) features and words (B, R, n) -> negative log-likelihood of the words in nats and whether each is
        the most probable one, both float32 (B, R, n).

        Scores are computed a chunk at a time, and again in the backward pass: all at once they would take 4 * B * R *
        n * K bytes, 5 GB for 128 pictures of 147 removed patches with 4 words of 16,384.
        """
        rows = max(1, self.SCORES_AT_ONCE // self.score.out_features)
        embeddings = self.embed(features).reshape(-1, self.WIDTH).split(rows)
        chunks = zip(embeddings, words.reshape(-1).split(rows), strict=True)
        many = len(embeddings) > 1
        found = [checkpoint(self._judge, *one, use_reentrant=False) if many else self._judge(*one) for one in chunks]
        surprise, best = (torch.cat(parts).view(words.shape) for parts in zip(*found, strict=True))
        return surprise, best

    def _judge(self, embedding: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(embedding).float()
        return F.cross_entropy(scores, words, reduction="none"), (scores.argmax(1) == words).float()

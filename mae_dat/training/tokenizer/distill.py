"""Trains a light student of any tokenizer: `python -m mae_dat distill_tokenizer --teacher FILE --data_path DIR ...
--output_dir OUT`.

The student keeps its teacher's codebook, so that words mean the same: its encoder learns to say the teacher's words,
its decoder to draw what the teacher draws of them. `OUT/tokenizer.safetensors` is used as `--tokenizer
OUT/tokenizer.safetensors`; its card `OUT/tokenizer.json` tells, on held-out pictures, the share of equal words, the
PSNR to the teacher's reconstructions, and the cost of both. A rerun of the same command resumes.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mae_dat.config.errors import NumericsError
from mae_dat.config.parse import load_config
from mae_dat.data.loader import ImageLoader
from mae_dat.models.modes import autocast
from mae_dat.models.tokenizer import VQGAN, VisualTokenizer, load_tokenizer, share_changed
from mae_dat.models.tokenizer.base import exact_float32
from mae_dat.models.tokenizer.light import LightConfig, LightTokenizer
from mae_dat.models.tokenizer.quantize import look_up, nearness
from mae_dat.runtime.console import Console
from mae_dat.runtime.device import amp_dtype, pick_device
from mae_dat.runtime.seeds import step_generator
from mae_dat.training.tokenizer.train import FoldersConfig, cosine, train_to_file

# Places of a batch whose words are classified: the scores of 16,384 words at all of them would be gigabytes.
_PLACES = 2048


@dataclasses.dataclass(frozen=True)
class DistillConfig(FoldersConfig):
    """Training of a student. Factor, words and channels are the teacher's."""

    command = "distill_tokenizer"
    teacher: str = "embedded"
    """As --tokenizer of the training commands: `embedded`, a released name, or a file."""
    width: int = 32
    encoder_blocks: int = 1
    decoder_blocks: int = 2
    word_weight: float = 0.1
    """Weight of the words' cross-entropy beside the distance to the teacher's latents."""


class StudentTrainer:
    """Teacher, student and optimizer; `step` does one update."""

    def __init__(self, config: DistillConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.teacher: VisualTokenizer = load_tokenizer(config.teacher).prepare(device)
        self.by_distance = not (isinstance(self.teacher, VQGAN) and self.teacher.config.gumbel)
        codes = self.teacher.codebook
        torch.manual_seed(config.seed)
        size = LightConfig(
            factor=self.teacher.factor,
            width=config.width,
            encoder_blocks=config.encoder_blocks,
            decoder_blocks=config.decoder_blocks,
            num_words=codes.shape[0],
            word_dim=codes.shape[1],
            in_chans=self.teacher.in_chans,
        )
        self.tokenizer = LightTokenizer(size).to(device)
        self.tokenizer.codes.requires_grad_(False).copy_(codes)
        self.optimizer = torch.optim.Adam(
            [weight for weight in self.tokenizer.parameters() if weight.requires_grad], betas=(0.9, 0.99)
        )
        self.precision = amp_dtype(config.precision, device)
        among = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))[:_PLACES].to(device)
        self.spacing = torch.cdist(codes[among], codes).square().topk(2, largest=False).values[:, 1].mean()

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs beside the step number."""
        return {"tokenizer": self.tokenizer.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.tokenizer.load_state_dict(state["tokenizer"])
        self.optimizer.load_state_dict(state["optimizer"])

    def step(self, step: int, image: Tensor) -> dict[str, float]:
        """One update on images (B, C, H, W) in [0, 1]: `loss`, `psnr` in dB to the teacher's drawing of the same words,
        and `agreement`, the share of equal words.

        Raises NumericsError on a loss that is not finite, before the weights change.
        """
        config, student = self.config, self.tokenizer.train()
        for group in self.optimizer.param_groups:
            group["lr"] = cosine(step, config.steps, config.lr)
        with torch.no_grad(), exact_float32():
            target = self.teacher.latent(image)
            words = self.teacher.words_of(target)
            quantized = look_up(words, student.codes)
            drawing = self.teacher.pixels(quantized).clamp(0, 1)
        with autocast(self.device, self.precision):
            latent, output = student.latent(image).float(), student.pixels(quantized).float()
        # A Gumbel model's words are no nearest codes: its student aims at the codes themselves.
        target = target if self.by_distance else quantized
        squared = F.mse_loss(output, drawing)
        loss = (
            F.mse_loss(latent, target) / self.spacing
            + config.word_weight * self.cross_entropy(step, latent, words)
            + F.l1_loss(output, drawing)
            + 5 * squared
        )
        if not math.isfinite(loss.item()):
            raise NumericsError(
                f"the student's loss is {loss.item()} at step {step}: lower --lr (now {config.lr}). "
                "The last checkpoint is intact."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for part in (student.encoder, student.decoder):
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            agreement = 1 - share_changed(words, student.words_of(latent)).item()
        return {"loss": loss.item(), "psnr": -10 * math.log10(max(squared.item(), 1e-10)), "agreement": agreement}

    def cross_entropy(self, step: int, latent: Tensor, words: Tensor) -> Tensor:
        """Of the teacher's words under scores that fall with the squared distance, at some places of the batch."""
        flat_MD, words_M = latent.permute(0, 2, 3, 1).flatten(0, 2), words.flatten()
        if len(flat_MD) > _PLACES:
            generator = step_generator(self.config.seed, step, 0, self.device)
            chosen = torch.randperm(len(flat_MD), generator=generator, device=self.device)[:_PLACES]
            flat_MD, words_M = flat_MD[chosen], words_M[chosen]
        scores_MK = nearness(flat_MD, self.tokenizer.codes)  # + a constant of each row
        return F.cross_entropy(2 * scores_MK / self.spacing, words_M)

    @torch.no_grad()
    def measure(self, loader: ImageLoader) -> dict[str, float]:
        """On held-out pictures: the share of words equal to the teacher's, PSNR in dB to the teacher's reconstructions
        and of both to the pictures; and the cost of a reconstruction of both."""
        student, teacher, count = self.tokenizer.eval(), self.teacher, 0
        sums = dict.fromkeys(("word_agreement", "psnr_to_teacher_db", "psnr_db", "teacher_psnr_db"), 0.0)
        for batch in loader:
            image = batch["image"].to(self.device)
            words, own = teacher.encode(image), student.encode(image)
            drawing, output = teacher.decode(words), student.decode(own)
            sums["word_agreement"] += len(image) * (1 - share_changed(words, own).item())
            sums["psnr_to_teacher_db"] += sum_of_psnr(output, drawing)
            sums["psnr_db"] += sum_of_psnr(output, image)
            sums["teacher_psnr_db"] += sum_of_psnr(drawing, image)
            count += len(image)
        return {**{name: value / count for name, value in sums.items()}, "pictures": count, **self.cost(image)}

    def cost(self, image: Tensor) -> dict[str, float]:
        """GFLOP a reconstruction of one image, and how many times as many images a second the student reconstructs (in
        turns with the teacher, median of 5 rounds)."""
        pair = (self.teacher, self.tokenizer.eval())
        gflop = []
        for one in pair:
            with FlopCounterMode(display=False) as counter:
                one.reconstruct(image[:1])
            gflop.append(counter.get_total_flops() / 1e9)
        ratios = []
        for _ in range(5):
            theirs, ours = (self.seconds(one, image) for one in pair)
            ratios.append(theirs / ours)
        return {"gflop": gflop[1], "teacher_gflop": gflop[0], "times_as_fast": statistics.median(ratios)}

    def seconds(self, tokenizer: VisualTokenizer, image: Tensor) -> float:
        """Wall time of a reconstruction; reading a pixel waits for the device."""
        start = time.perf_counter()
        tokenizer.reconstruct(image)[0, 0, 0, 0].item()
        return time.perf_counter() - start


def sum_of_psnr(image: Tensor, other: Tensor) -> float:
    """Sum over a batch of each picture's PSNR in dB, pixels in [0, 1]."""
    return float((-10 * (image - other).square().mean((1, 2, 3)).clamp(min=1e-10).log10()).sum())


def main(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    console = Console()
    console.start_logging()
    config = load_config(DistillConfig, arguments, __doc__ or "")
    train_to_file(StudentTrainer(config, pick_device(config.device)), config, console)

"""Train a light student of any tokenizer: `mae-dat tokenizer distill --teacher FILE --data_path DIR ...
--output_dir OUT`.

The student keeps its teacher's codebook, so that words mean the same. Its encoder learns to predict the teacher's
words, its decoder to draw what the teacher draws of them. `OUT/tokenizer.safetensors` is used as `--tokenizer
OUT/tokenizer.safetensors`; its card `OUT/tokenizer.json` reports, on held-out images, the share of equal words, the
PSNR to the teacher's reconstructions, and the cost of both. Running the same command again resumes.
"""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mae_dat.config.commands.tokenizer import DistillConfig
from mae_dat.data.loader import ImageLoader
from mae_dat.models.describe import describe_tokenizer
from mae_dat.models.tokenizer import VQGAN, VisualTokenizer, load_tokenizer, share_changed
from mae_dat.models.tokenizer.base import exact_float32
from mae_dat.models.tokenizer.light import LightConfig, LightTokenizer
from mae_dat.models.tokenizer.quantize import look_up, nearness
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.training.objectives.base import Parts
from mae_dat.training.optim import clip_gradient
from mae_dat.training.tokenizer.trainer import TokenizerObjective, TokenizerTrainer, train_to_file

# Places of a batch whose words are classified: the scores of 16,384 words at all of them would be gigabytes.
_PLACES = 2048


class Distillation(TokenizerObjective):
    """Distance to the teacher's latents and drawings, and cross-entropy of its words; holds teacher and student."""

    config: DistillConfig

    def __init__(self, config: DistillConfig, device: torch.device) -> None:
        super().__init__(config, device)
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
        sample = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))[:_PLACES].to(device)
        self.spacing = torch.cdist(codes[sample], codes).square().topk(2, largest=False).values[:, 1].mean()
        """Mean squared distance of a code to its nearest neighbor."""

    def teacher_in_words(self) -> str:
        """Describe the teacher."""
        return f"codebook and targets of {describe_tokenizer(self.config.teacher, self.teacher)}"

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of the student's encoder and decoder."""
        trained = [parameter for parameter in self.tokenizer.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, betas=(0.9, 0.99))

    def parts(self, model: nn.Module, image: Tensor, context: torch.Generator) -> Parts:
        """Compute for an image (B, C, H, W) in [0, 1] the `loss`, the `squared_error` to the teacher's drawing of the
        same words, and the share of `changed_words`."""
        student = self.tokenizer
        # The loop computes objectives in its precision; here only the student's layers are meant.
        with torch.autocast(self.device.type, enabled=False), torch.no_grad(), exact_float32():
            target = self.teacher.latent(image)
            words = self.teacher.words_of(target)
            quantized = look_up(words, student.codes)
            drawing = self.teacher.pixels(quantized).clamp(0, 1)
        latent, output = student.latent(image).float(), student.pixels(quantized).float()
        with torch.autocast(self.device.type, enabled=False):
            # A Gumbel model's words are no nearest codes: its student aims at the codes themselves.
            target = target if self.by_distance else quantized
            squared_error = F.mse_loss(output, drawing)
            loss = (
                F.mse_loss(latent, target) / self.spacing
                + self.config.word_weight * self.cross_entropy(latent, words, context)
                + F.l1_loss(output, drawing)
                + 5 * squared_error
            )
            with torch.no_grad():
                changed = share_changed(words, student.words_of(latent))
        return {"loss": loss, "squared_error": squared_error, "changed_words": changed}

    def logged(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the loss, the PSNR in dB to the teacher's drawings, and the share of equal words."""
        return {**super().logged(means), "agreement": 1 - means["changed_words"]}

    def cross_entropy(self, latent: Tensor, words: Tensor, generator: torch.Generator) -> Tensor:
        """Compute the cross-entropy of the teacher's words (B, h, w), a scalar, at some places of the batch.

        The scores fall with the squared distance of the latent (B, D, h, w) to each code.
        """
        flat_MD, words_M = latent.permute(0, 2, 3, 1).flatten(0, 2), words.flatten()
        if len(flat_MD) > _PLACES:
            chosen = torch.randperm(len(flat_MD), generator=generator, device=self.device)[:_PLACES]
            flat_MD, words_M = flat_MD[chosen], words_M[chosen]
        scores_MK = nearness(flat_MD, self.tokenizer.codes)  # + a constant of each row
        return F.cross_entropy(2 * scores_MK / self.spacing, words_M)

    @torch.no_grad()
    def measure(self, loader: ImageLoader) -> dict[str, float]:
        """Return figures on held-out images: the share of words equal to the teacher's, PSNR in dB to the teacher's
        reconstructions, PSNR of both to the images, and the cost of a reconstruction of both."""
        student, teacher, count = self.tokenizer.eval(), self.teacher, 0
        sums = dict.fromkeys(("word_agreement", "psnr_to_teacher_db", "psnr_db", "teacher_psnr_db"), 0.0)
        for batch in loader:
            image = batch["image"].to(self.device)
            words, student_words = teacher.encode(image), student.encode(image)
            drawing, output = teacher.decode(words), student.decode(student_words)
            sums["word_agreement"] += len(image) * (1 - share_changed(words, student_words).item())
            sums["psnr_to_teacher_db"] += sum_of_psnr(output, drawing)
            sums["psnr_db"] += sum_of_psnr(output, image)
            sums["teacher_psnr_db"] += sum_of_psnr(drawing, image)
            count += len(image)
        return {**{name: value / count for name, value in sums.items()}, "pictures": count, **self.cost(image)}

    def cost(self, image: Tensor) -> dict[str, float]:
        """Return GFLOP per reconstruction of an image (B, C, H, W), and how many times as fast the student is as the
        teacher (measured in turns, median of 5 rounds)."""
        pair = (self.teacher, self.tokenizer.eval())
        gflop = []
        for tokenizer in pair:
            with FlopCounterMode(display=False) as counter:
                tokenizer.reconstruct(image[:1])
            gflop.append(counter.get_total_flops() / 1e9)
        ratios = []
        for _ in range(5):
            teacher_seconds, student_seconds = (self.seconds(tokenizer, image) for tokenizer in pair)
            ratios.append(teacher_seconds / student_seconds)
        return {"gflop": gflop[1], "teacher_gflop": gflop[0], "times_as_fast": statistics.median(ratios)}

    def seconds(self, tokenizer: VisualTokenizer, image: Tensor) -> float:
        """Return the wall time of a reconstruction; reading a pixel waits for the device."""
        start = time.perf_counter()
        tokenizer.reconstruct(image)[0, 0, 0, 0].item()
        return time.perf_counter() - start


def sum_of_psnr(image: Tensor, other: Tensor) -> float:
    """Return the sum over a batch of each image's PSNR in dB, pixels (B, C, H, W) in [0, 1]."""
    return float((-10 * (image - other).square().mean((1, 2, 3)).clamp(min=1e-10).log10()).sum())


class StudentTrainer(TokenizerTrainer):
    """A tokenizer's training loop that clips encoder and decoder apart."""

    def clip_gradient(self) -> Tensor:
        """Clip the gradients of encoder and decoder to a norm of 1 each; returns the norm of both before."""
        student = self.objective.tokenizer
        return torch.stack([clip_gradient(part, 1.0) for part in (student.encoder, student.decoder)]).norm()


def train_student(config: DistillConfig, console: Console) -> Path:
    """Train a student and write it with its card; returns its path."""
    return train_to_file(config, console, Distillation, StudentTrainer)


def main(config: DistillConfig) -> None:
    """Run the command."""
    train_student(config, console_for_command())

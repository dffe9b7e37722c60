"""Training on images and their stored adversaries (Zhou et al. 2023, arXiv 2311.01441), and with a teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dat.config.groups import AugmentConfig
from mae_dat.data.image_set import Batch
from mae_dat.models.modes import evaluation_mode
from mae_dat.models.split_norms import auxiliary_norms
from mae_dat.training.objectives.base import Objective, ObjectiveWrapper, Parts
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import first_rows


class WithStoredAdversary(ObjectiveWrapper):
    """DAT with adversaries that were stored before: loss = L(image) + L(stored adversary), two plain passes.

    Batches hold both views of every image, (B, 2, C, H, W). Mixup and cutmix mix both alike. If only a share of the
    batch is attacked, L(adversary) is the mean over its first images. `description` is for the summary of inputs.
    """

    def __init__(self, objective: Objective, batch_share: float = 1.0, description: str = "") -> None:
        self.objective, self.batch_share, self.description = objective, batch_share, description

    def step(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Parts:
        """Compute one step; parts: loss, loss_clean, loss_adversarial and what the objective logs of the clean view."""
        views, prepared = self.objective.prepare_views(model, batch, generator)
        logged = self.objective.parts(model, views[:, 0], prepared)
        clean = logged.pop("loss")
        count = max(1, round(self.batch_share * len(views)))
        adversarial, prepared = first_rows((views[:, 1], prepared), count)
        with auxiliary_norms(model):
            loss_adversarial = self.objective.loss(model, adversarial, prepared)
        return {"loss": clean + loss_adversarial, "loss_clean": clean, "loss_adversarial": loss_adversarial, **logged}


class WithTeacher(Classification):
    """Classification, and the divergence of the model's predictions from those of a teacher.

    loss = L + w T^2 KL(softmax(teacher / T) || softmax(model / T)) for every view (Hinton et al. 2015). `outputs` are
    the teacher's outputs for the classes, in their order.
    """

    def __init__(
        self,
        augment: AugmentConfig,
        num_classes: int,
        teacher: nn.Module,
        outputs: list[int],
        *,
        binary: bool = False,
        class_weights: Tensor | None = None,
        weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(augment, num_classes, binary, class_weights)
        self.teacher, self.outputs = teacher.requires_grad_(False), outputs
        self.weight, self.temperature = weight, temperature

    def loss(self, model: nn.Module, image: Tensor, prepared: Tensor) -> Tensor:
        """Compute L + weight * divergence of a view (B, C, H, W), a scalar."""
        return self.parts(model, image, prepared)["loss"]

    def parts(self, model: nn.Module, image: Tensor, target: Tensor) -> Parts:
        """Compute loss and loss_teacher (unweighted, with T^2), for soft targets (B, K)."""
        logits = model(image).float()
        with torch.no_grad(), evaluation_mode(self.teacher):
            teacher = self.teacher(image).float()[:, self.outputs]
        soft, log_soft = ((x / self.temperature).log_softmax(-1) for x in (teacher, logits))
        divergence = F.kl_div(log_soft, soft, reduction="batchmean", log_target=True) * self.temperature**2
        return {"loss": self.loss_of_logits(logits, target) + self.weight * divergence, "loss_teacher": divergence}

"""Classifiers of timm, and a student's training beside a frozen teacher."""

from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.distillers.review import ReviewModule
from distill.errors import DistillError
from distill.losses import decoupled_divergence, hierarchical_context_loss, soft_label_divergence

METHODS = ("review", "kd", "dkd")


class Classifier(nn.Module):
    """A network of timm that shows its stages.

    Args:
        name: timm's name of it.
        num_classes: how many classes it tells apart.
        pretrained: whether to start from timm's weights, which are downloaded.
        weights: a file with a state dict, as :mod:`train` writes it; empty for none.

    Raises:
        DistillError: timm has no such network, it shows no stages, or the weights do not fit.
    """

    def __init__(self, name: str, num_classes: int, pretrained: bool = False, weights: str = "") -> None:
        super().__init__()
        if name not in timm.list_models():
            near = ", ".join(timm.list_models(f"*{name.split('_')[0][:6]}*")[:8]) or "timm.list_models() has them"
            raise DistillError(f"timm has no network {name!r}: expected one such as {near}.")
        self.network = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
        if not hasattr(self.network, "forward_intermediates") or not hasattr(self.network, "feature_info"):
            raise DistillError(f"timm's {name} does not show its stages: choose another, such as resnet18.")
        self.name = name
        if weights:
            state = _load(weights)
            own = self.state_dict()
            differing = own.keys() ^ state.keys()
            differing = differing or {key for key, value in own.items() if value.shape != state[key].shape}
            if differing:
                raise DistillError(
                    f"{weights} does not fit {name} with {num_classes} classes: see {min(differing)}, for one."
                )
            self.load_state_dict(state)

    @property
    def channels(self) -> list[int]:
        """Of each stage, finest first, and of the pooled features."""
        stages = [stage["num_chs"] for stage in self.network.feature_info]
        return [*stages[-4:], self.network.head_hidden_size]

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            images: ``Tensor[N, 3, H, W]``, normalised.

        Returns:
            Logits, ``Tensor[N, K]``, and the outputs of the last four stages, ``Tensor[N, C, H', W']``, finest first,
            with the pooled features, ``Tensor[N, C, 1, 1]``, behind them.
        """
        final, stages = self.network.forward_intermediates(images)
        pooled = self.network.forward_head(final, pre_logits=True)
        return self.network.get_classifier()(pooled), [*stages[-4:], pooled[:, :, None, None]]


def _load(path: str) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["model"]
    except Exception as error:  # missing, damaged, or of another form
        raise DistillError(
            f"Cannot read the weights {path!r} ({type(error).__name__}: {error}): expected a checkpoint of train.py, "
            "such as model_final.pth."
        ) from error


class DistilledClassifier(nn.Module):
    """A student, and a teacher that helps to train it. In evaluation it is the student.

    Args:
        student: learns.
        teacher: is frozen; None trains the student alone.
        methods: any of :data:`METHODS`; their losses add up.
        weights: by method, the factor of its loss.
        temperature: of "kd" and "dkd".
        mid_channels: inside the review's fusion.
        warmup_iters: the factor of "review" grows linearly over so many iterations.

    Raises:
        DistillError: a method is unknown, or there is no teacher for it.
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier | None = None,
        methods: Sequence[str] = (),
        weights: dict[str, float] | None = None,
        temperature: float = 4.0,
        mid_channels: int = 128,
        warmup_iters: int = 0,
    ) -> None:
        super().__init__()
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            raise DistillError(f"The method {unknown[0]!r} is unknown: expected some of {', '.join(METHODS)}.")
        if methods and teacher is None:
            raise DistillError(f"{', '.join(methods)} needs a teacher: name one by --teacher and --teacher-weights.")
        self.student = student
        self._teacher = [teacher.eval().requires_grad_(False)] if teacher else []  # in no state dict
        self.methods = list(methods)
        self.weights = {name: 1.0 for name in METHODS} | (weights or {})
        self.temperature = temperature
        self.warmup_iters = warmup_iters
        self.iteration = 0
        self.review = ReviewModule(student.channels, teacher.channels, mid_channels) if "review" in methods else None

    def _apply(self, fn, recurse: bool = True):
        for teacher in self._teacher:
            teacher._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, batch: list[dict]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batch: for each image a dict with "image", ``Tensor[3, H, W]``, normalised, and in training "label".

        Returns:
            In training the losses by name, each ``Tensor[]``; in evaluation for each image "scores", ``Tensor[K]``.
        """
        device = next(self.student.parameters()).device
        images = torch.stack([x["image"] for x in batch]).to(device)
        logits, stages = self.student(images)
        if not self.training:
            return [{"scores": scores} for scores in logits.softmax(1)]
        labels = torch.tensor([x["label"] for x in batch], device=device)
        losses = {"loss_class": F.cross_entropy(logits, labels)}
        if self.methods:
            with torch.no_grad():
                target, target_stages = self._teacher[0](images)
            self._check_stages(stages, target_stages)
        if "review" in self.methods:
            grown = min(1.0, self.iteration / self.warmup_iters) if self.warmup_iters else 1.0
            loss = hierarchical_context_loss(self.review(stages), target_stages)
            losses["loss_review"] = self.weights["review"] * grown * loss
        if "kd" in self.methods:
            losses["loss_kd"] = self.weights["kd"] * soft_label_divergence(logits, target, self.temperature).mean()
        if "dkd" in self.methods:
            parts = decoupled_divergence(logits, target, labels, 1.0, 8.0, self.temperature)
            losses["loss_dkd"] = self.weights["dkd"] * parts.mean()
        self.iteration += 1
        return losses

    def _check_stages(self, stages: Sequence[Tensor], target_stages: Sequence[Tensor]) -> None:
        own, theirs = ([tuple(stage.shape[2:]) for stage in side] for side in (stages, target_stages))
        if self.review is not None and own != theirs:
            raise DistillError(
                f"review compares stages of the same sizes: {self.student.name} has {own}, {self._teacher[0].name} "
                f"{theirs}. Choose networks of the same strides, or other methods."
            )

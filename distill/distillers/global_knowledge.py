"""Global knowledge (PGM + RDM): Tang, Zhang, Cheng et al., ECCV 2022, arXiv 2210.09022."""

import inspect
import logging
from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..config import num_classes
from ..errors import DistillError
from ..losses import (
    box_levels,
    box_mask,
    box_means,
    global_knowledge_loss,
    local_knowledge_loss,
    prototype_robustness,
    prototype_similarity,
    soft_label_divergence,
)
from ..modeling.classes import build_class_map
from ..modeling.views import DetectorView
from ..prototypes.bank import PrototypeBank
from .base import Distiller, shared_levels
from .build import DISTILLER_REGISTRY
from .instances import (
    INSTANCES,
    check_classifications,
    check_corner_anchors,
    instance_boxes,
    mean_over_processes,
    paired_logits,
)

logger = logging.getLogger(__name__)


@DISTILLER_REGISTRY.register()
class GlobalKnowledgeDistiller(Distiller):
    """Compares instances by where they lie among the prototypes of all classes, and weighs what it teaches by how far
    student and teacher agree on that.

    Args:
        levels: names of the levels, finest first.
        prototypes: the prototypes of these levels.
        adaptation: by level, what brings the student's features to the teacher's channels; None without the local part.
        local_distiller: takes the place of the local part's squared difference; its ``forward`` accepts ``weights``.
        instances: "proposals" (the student's sampled positive ones; the annotations of a dense detector) or
            "ground_truth".
        global_weight, local_weight, response_weight: factors of the parts; None leaves a part out.
        foreground_weight, background_weight: factors inside the local part.
        temperature: of the response part.
        class_map: of the response part: by the student's class, the teacher's; None where both have the same.
        hook_settings: arguments of :class:`distill.prototypes.hook.PrototypeHook` beside model and bank.
        weight_settings: arguments of :class:`Distiller`. The decay leaves the response part alone.
    """

    undecayed = ("loss_response",)

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[str],
        prototypes: PrototypeBank,
        adaptation: nn.ModuleDict | None,
        local_distiller: Distiller | None,
        instances: str,
        global_weight: float | None,
        local_weight: float | None,
        foreground_weight: float,
        background_weight: float,
        response_weight: float | None,
        temperature: float,
        class_map: Mapping[int, int] | None = None,
        hook_settings: Mapping,
        **weight_settings: float,
    ) -> None:
        super().__init__(**weight_settings)
        self.levels = list(levels)
        self.prototypes = prototypes
        self.adaptation = adaptation
        self.local_distiller = local_distiller
        self.instances = instances
        self.global_weight = global_weight
        self.local_weight = local_weight
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight
        self.response_weight = response_weight
        self.temperature = temperature
        self.class_map = class_map
        self.hook_settings = dict(hook_settings)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_shape: Mapping[str, ShapeSpec], teacher_shape: Mapping[str, ShapeSpec]
    ) -> dict:
        node, key = cfg.DISTILL.GLOBAL, "DISTILL.GLOBAL"
        _check(node)
        levels = shared_levels(node.LEVELS, student_shape, teacher_shape, f"{key}.LEVELS")
        adaptation = local_distiller = None
        if node.LOCAL_ON and node.LOCAL_DISTILLER:
            local_distiller = _weighted_distiller(node.LOCAL_DISTILLER, cfg, student_shape, teacher_shape)
            lacking = [level for level in local_distiller.levels if level not in levels]
            if lacking:
                raise DistillError(
                    f"{key}.LOCAL_DISTILLER {node.LOCAL_DISTILLER} compares {', '.join(lacking)}, which {key}.LEVELS "
                    "leaves out: give both the same levels."
                )
        elif node.LOCAL_ON:
            # as torch initialises them, like the published ones
            adaptation = nn.ModuleDict(
                {x: nn.Conv2d(student_shape[x].channels, teacher_shape[x].channels, 3, padding=1) for x in levels}
            )
        bank = PrototypeBank(levels, student_shape, teacher_shape, num_classes(cfg), node.NUM_PROTOTYPES)
        return {
            "levels": levels,
            "prototypes": bank,
            "adaptation": adaptation,
            "local_distiller": local_distiller,
            "instances": node.INSTANCES,
            "global_weight": node.GLOBAL_WEIGHT if node.GLOBAL_ON else None,
            "local_weight": node.LOCAL_WEIGHT if node.LOCAL_ON else None,
            "foreground_weight": node.LOCAL_FOREGROUND_WEIGHT,
            "background_weight": node.LOCAL_BACKGROUND_WEIGHT,
            "response_weight": node.RESPONSE_WEIGHT if node.RESPONSE_ON else None,
            "temperature": node.TEMPERATURE,
            "class_map": build_class_map(cfg) if node.RESPONSE_ON else None,
            "hook_settings": {
                "period": node.UPDATE_PERIOD,
                "max_images": node.MAX_IMAGES,
                "min_box_size": node.MIN_BOX_SIZE,
                "selection": {
                    "num_prototypes": node.NUM_PROTOTYPES,
                    "alpha": node.ALPHA,
                    "density_sigma": node.DENSITY_SIGMA,
                    "density_quantile": node.DENSITY_QUANTILE,
                },
            },
            **cls.weight_settings(node),
        }

    def reset(self) -> None:
        super().reset()
        self.prototypes.clear()
        if self.local_distiller is not None:
            self.local_distiller.reset()

    def build_hooks(self, model: nn.Module) -> list[HookBase]:
        from ..prototypes.hook import PrototypeHook  # it knows the model, which knows the distillers

        if self.response_weight is not None:
            views = model.frozen_views([])  # an error now rather than after the search
            self._check_response(*views)
            check_corner_anchors(*views)
            number = views[0].num_classes if self.class_map is None else len(self.class_map)
            if number + views[0].scores_background < 2:
                logger.warning(
                    "The response part of GlobalKnowledgeDistiller compares classes with each other, and there is one "
                    "only, without background: the part is left out."
                )
                self.response_weight = None
        hooks = [] if self.local_distiller is None else self.local_distiller.build_hooks(model)
        return [PrototypeHook(model, self.prototypes, **self.hook_settings), *hooks]

    def forward(self, student: DetectorView, teacher: DetectorView) -> dict[str, Tensor]:
        if self.response_weight is not None:
            self._check_response(student, teacher)
        boxes, labels = instance_boxes(student, self.instances)
        sizes = [len(x) for x in boxes]
        own_level = box_levels(torch.cat(boxes), len(self.levels))
        own_robustness = torch.zeros(len(labels), device=labels.device)  # of each instance, at its own level
        losses, masks = {}, {}
        total = 0.0
        for index, level in enumerate(self.levels):
            prototypes = self.prototypes.at(level)
            similarities = [
                prototype_similarity(box_means(view.features[level], boxes, view.strides[level]), own)
                for view, own in zip((student, teacher), prototypes)
            ]
            robustness = prototype_robustness(*similarities, labels, prototypes[2])
            known = (labels[:, None] == prototypes[2]).any(1)  # torch.isin may wait for the GPU
            if self.global_weight is not None:
                total = total + global_knowledge_loss(*similarities, robustness, known)
            here = own_level == index
            own_robustness = torch.where(here, robustness, own_robustness)
            if self.local_weight is not None:
                painted = torch.where(here & known, robustness, -1.0).split(sizes)
                size = tuple(teacher.features[level].shape[2:])
                masks[level] = box_mask(boxes, painted, size, student.strides[level])
        if self.global_weight is not None:
            losses["loss_global"] = self.global_weight * total
        if self.local_weight is not None:
            losses["loss_local"] = self.local_weight * self._local_loss(student, teacher, masks)
        if self.response_weight is not None:
            response = self._response_loss(student, teacher, boxes, labels, own_robustness)
            losses["loss_response"] = self.response_weight * response
        return losses

    def _local_loss(self, student: DetectorView, teacher: DetectorView, masks: Mapping[str, Tensor]) -> Tensor:
        if self.local_distiller is None:
            parts = [
                local_knowledge_loss(
                    self.adaptation[level](student.features[level]),
                    teacher.features[level],
                    masks[level],
                    self.foreground_weight,
                    self.background_weight,
                )
                for level in self.levels
            ]
            # published: the mean over the levels for a detector with a box head, the sum for a dense one
            return torch.stack(parts).mean() if student.has_box_head else torch.stack(parts).sum()
        weights = {
            level: torch.where(mask < 0, self.background_weight, self.foreground_weight * mask)
            for level, mask in masks.items()
        }
        return self.local_distiller.loss_weight * sum(self.local_distiller(student, teacher, weights=weights).values())

    def _response_loss(
        self, student: DetectorView, teacher: DetectorView, boxes: list[Tensor], labels: Tensor, robustness: Tensor
    ) -> Tensor:
        """Soft labels of the instances, times their robustness. The mean over classes, too, as published."""
        pairs = paired_logits(student, teacher, self.instances, boxes, labels, self.class_map)
        divergence = soft_label_divergence(pairs.student, pairs.teacher, self.temperature) / pairs.student.shape[1]
        number = mean_over_processes(len(divergence), divergence.device)
        return (divergence * robustness[pairs.instances]).sum() / number

    def _check_response(self, student: DetectorView, teacher: DetectorView) -> None:
        what, otherwise = "The response part of GlobalKnowledgeDistiller", "switch the part off"
        otherwise += ": DISTILL.GLOBAL.RESPONSE_ON False"
        check_classifications(student, teacher, self.class_map, what, otherwise, with_softmax=False)


def _check(node: CfgNode) -> None:
    expected = {
        "INSTANCES": (node.INSTANCES in INSTANCES, f"one of {', '.join(INSTANCES)}"),
        "NUM_PROTOTYPES": (node.NUM_PROTOTYPES > 0, "a number above 0, such as 10"),
        "DENSITY_SIGMA": (node.DENSITY_SIGMA > 0, "a number above 0, such as 0.1"),
        "DENSITY_QUANTILE": (0 <= node.DENSITY_QUANTILE < 1, "a share from 0 to below 1, such as 0.4"),
        "ALPHA": (node.ALPHA >= 0, "0 or more, such as 10"),
        "UPDATE_PERIOD": (node.UPDATE_PERIOD >= 0, "a number of iterations, or 0 for an epoch"),
        "MAX_IMAGES": (node.MAX_IMAGES > 0, "a number of images, such as 800"),
        "MIN_BOX_SIZE": (node.MIN_BOX_SIZE >= 0, "a number of pixels, such as 30"),
        "TEMPERATURE": (node.TEMPERATURE > 0, "a number above 0, such as 2"),
        "GLOBAL_ON": (
            node.GLOBAL_ON or node.LOCAL_ON or node.RESPONSE_ON,
            "True, since LOCAL_ON and RESPONSE_ON are off",
        ),
    }
    for key, (is_valid, meaning) in expected.items():
        if not is_valid:
            raise DistillError(f"DISTILL.GLOBAL.{key} is {node[key]!r}: expected {meaning}.")


def _weighted_distiller(
    name: str, cfg: CfgNode, student_shape: Mapping[str, ShapeSpec], teacher_shape: Mapping[str, ShapeSpec]
) -> Distiller:
    resolved = DISTILLER_REGISTRY.resolve(name)
    forwards = {key: getattr(cls, "forward", cls) for key, cls in DISTILLER_REGISTRY}
    weighted = [key for key, forward in forwards.items() if "weights" in inspect.signature(forward).parameters]
    if resolved not in weighted:
        raise DistillError(
            f"DISTILL.GLOBAL.LOCAL_DISTILLER is {name!r}: expected '' or a distiller whose forward takes the cells' "
            f"weights: {', '.join(sorted(weighted))}."
        )
    return DISTILLER_REGISTRY.get(resolved)(cfg, student_shape, teacher_shape)

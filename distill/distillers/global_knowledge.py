"""Global knowledge (PGM + RDM): Tang, Zhang, Cheng et al., ECCV 2022, arXiv 2210.09022."""

import inspect
from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
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
    response_loss,
)
from ..modeling.views import DetectorView
from ..prototypes.bank import PrototypeBank
from .base import Distiller, shared_levels
from .build import DISTILLER_REGISTRY

_INSTANCES = ("proposals", "ground_truth")


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
            _check_response(*model.frozen_views([]))  # an error now rather than after the search
        hooks = [] if self.local_distiller is None else self.local_distiller.build_hooks(model)
        return [PrototypeHook(model, self.prototypes, **self.hook_settings), *hooks]

    def forward(self, student: DetectorView, teacher: DetectorView) -> dict[str, Tensor]:
        if self.response_weight is not None:
            _check_response(student, teacher)
        boxes, labels = self._boxes(student)
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
            response = self._response_loss(student, teacher, boxes, own_robustness)
            losses["loss_response"] = self.response_weight * response
        return losses

    def _boxes(self, student: DetectorView) -> tuple[list[Tensor], Tensor]:
        """The instances of each image, and the classes of all."""
        if self.instances == "proposals" and student.has_box_head:
            rows, sizes = self._positive_rows(student.proposals)
            boxes = torch.cat([x.proposal_boxes.tensor for x in student.proposals])[rows]
            return list(boxes.split(sizes)), torch.cat([x.gt_classes for x in student.proposals])[rows]
        truth = student.ground_truth
        return [x.gt_boxes.tensor for x in truth], torch.cat([x.gt_classes for x in truth])

    def _positive_rows(self, proposals: Sequence[Instances]) -> tuple[Tensor, list[int]]:
        """Which of all images' proposals are positive, and how many each image has. The host waits once."""
        classes = torch.cat([x.gt_classes for x in proposals])
        positive = (classes >= 0) & (classes < self.prototypes.num_classes)
        sizes = torch.stack([x.sum() for x in positive.split([len(x) for x in proposals])]).tolist()
        # the positive ones first, each kind in its order
        return positive.logical_not().to(torch.uint8).argsort(stable=True)[: sum(sizes)], sizes

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
        self, student: DetectorView, teacher: DetectorView, boxes: list[Tensor], robustness: Tensor
    ) -> Tensor:
        if student.has_box_head:
            teachers = teacher.box_head([Boxes(x) for x in boxes])[0]
            if self.instances == "proposals":  # its own forward has been there, and a second one would move batch norms
                own = student.proposal_logits[self._positive_rows(student.proposals)[0]]
            else:
                own = student.box_head([Boxes(x) for x in boxes])[0]
            logits = [own, teachers]
        else:
            matches = student.match_anchors()
            if student.num_anchors != teacher.num_anchors:
                raise DistillError(
                    f"The student has {student.num_anchors} anchors in this batch and the teacher "
                    f"{teacher.num_anchors}, so their "
                    "classifications cannot be compared. Give both the same anchors and levels, or switch the part off "
                    "by DISTILL.GLOBAL.RESPONSE_ON False."
                )
            rows = [anchors for anchors, _ in matches]
            logits = [view.anchor_logits_at(rows) for view in (student, teacher)]
            parts = robustness.split([len(x) for x in boxes])
            robustness = torch.cat([part[truth] for part, (_, truth) in zip(parts, matches)])
        return response_loss(*logits, robustness, self.temperature)


def _check_response(student: DetectorView, teacher: DetectorView) -> None:
    """Refuses detectors whose classifications cannot be compared."""
    differences = []
    if student.has_box_head != teacher.has_box_head:
        kinds = ["boxes" if view.has_box_head else "anchors" for view in (student, teacher)]
        differences.append(f"the student classifies {kinds[0]} and the teacher {kinds[1]}")
    if student.num_classes != teacher.num_classes:
        differences.append(f"the student has {student.num_classes} classes and the teacher {teacher.num_classes}")
    if differences:
        raise DistillError(
            f"The response part of GlobalKnowledgeDistiller compares classifications, but {' and '.join(differences)}. "
            "Use a teacher of the same family and classes, or switch the part off: DISTILL.GLOBAL.RESPONSE_ON False."
        )


def _check(node: CfgNode) -> None:
    expected = {
        "INSTANCES": (node.INSTANCES in _INSTANCES, f"one of {', '.join(_INSTANCES)}"),
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
    forwards = {key: getattr(cls, "forward", cls) for key, cls in DISTILLER_REGISTRY}
    weighted = [key for key, forward in forwards.items() if "weights" in inspect.signature(forward).parameters]
    if name not in weighted:
        raise DistillError(
            f"DISTILL.GLOBAL.LOCAL_DISTILLER is {name!r}: expected '' or a distiller whose forward takes the cells' "
            f"weights: {', '.join(sorted(weighted))}."
        )
    return DISTILLER_REGISTRY.get(name)(cfg, student_shape, teacher_shape)

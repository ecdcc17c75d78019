"""Collects the candidates of prototypes: the features of annotated instances, from both sides, over a dataset."""

from collections.abc import Sequence
from functools import partial

import torch
from detectron2.data import DatasetFromList, MapDataset
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..losses import box_means
from ..modeling.distillation_model import DistillationModel
from ..modeling.precision import amp_dtype, autocast
from ..modeling.scaling import build_scaling
from ..recipes import Recipe


def choose_images(images: Sequence[dict], max_images: int) -> dict[int, set[int]]:
    """Chooses images until each class is seen in enough of them.

    Args:
        images: records in Detectron2's dataset format.
        max_images: how many images a class may have.

    Returns:
        For the index of each chosen image, the classes that it is chosen for. The order is random but always the same.
    """
    seen: dict[int, int] = {}
    chosen: dict[int, set[int]] = {}
    for index in torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist():
        present = {x["category_id"] for x in images[index].get("annotations", ()) if not x.get("iscrowd", 0)}
        wanted = {label for label in present if seen.get(label, 0) < max_images}
        for label in wanted:
            seen[label] = seen.get(label, 0) + 1
        if wanted:
            chosen[index] = wanted
    return chosen


def large_annotations(image: dict, min_box_size: float) -> list[dict]:
    """The annotations of an image whose boxes are large enough to be prototypes.

    Args:
        image: a record in Detectron2's dataset format.
        min_box_size: what the shorter side must exceed, in pixels of the image file.

    Returns:
        Those of its annotations.
    """
    return [x for x in image.get("annotations", ()) if _shorter_side(x["bbox"], x["bbox_mode"]) > min_box_size]


def _shorter_side(box: Sequence[float], mode: BoxMode) -> float:
    if mode == BoxMode.XYXY_ABS:  # BoxMode.convert takes as long as reading the box did
        return min(box[2] - box[0], box[3] - box[1])
    return min(BoxMode.convert(box, mode, BoxMode.XYWH_ABS)[2:])


class InstanceCollector:
    """Collects this process's share of the instances. What the teacher sees of them is kept, the student's is not.

    Args:
        recipe: of the run.
        levels: names of the levels.
        max_images: how many images a class may have.
        min_box_size: what the shorter side of a box must exceed, in pixels of the image file.

    Attributes:
        num_training_images: of the whole dataset.
    """

    def __init__(self, recipe: Recipe, levels: Sequence[str], max_images: int, min_box_size: float) -> None:
        self._levels = list(levels)
        self._dtype = amp_dtype(recipe.cfg)
        cfg = recipe.cfg
        # read and chosen once, in the main process
        choice = _choose(recipe, max_images, min_box_size) if comm.is_main_process() else None
        self.num_training_images, records = comm.all_gather(choice)[0]
        records = records[comm.get_rank() :: comm.get_world_size()]
        # as large as the teacher sees them, for a student at INPUT_SCALE makes the images that it is given smaller
        mapper = recipe.build_mapper(keep_annotations=True, scale=build_scaling(cfg).factor)
        self._loader = partial(
            DataLoader,
            # serialised, so that worker processes share its memory; an empty share cannot be
            MapDataset(DatasetFromList(records) if records else records, mapper),
            # a forward pass alone takes a fraction of a step's memory for an image
            batch_size=max(1, 4 * cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            collate_fn=list,
        )
        self._kept: dict[str, Tensor] | None = None

    @torch.no_grad()
    def collect(self, model: DistillationModel) -> dict[str, Tensor]:
        """Runs over the images once.

        Args:
            model: student and teacher.

        Returns:
            On the CPU, a row for each instance: "labels" (``LongTensor[n]``), "images" (``LongTensor[n]``), "boxes"
            (``Tensor[n, 4]``, in pixels of the image file), and for each level "student.LEVEL" (``Tensor[n, Ds]``) and
            "teacher.LEVEL" (``Tensor[n, Dt]``). Nothing where this process has no images.
        """
        first = self._kept is None
        rows: dict[str, list[Tensor]] = {}

        def add(name: str, values: Tensor) -> None:
            rows.setdefault(name, []).append(values.float().cpu() if values.is_floating_point() else values.cpu())

        was_training = model.student.training
        model.student.eval()
        # a generator of its own, so that the training draws the same numbers with and without
        loader = self._loader(generator=torch.Generator().manual_seed(0))
        try:
            for batch in tqdm(loader, "prototypes", unit="batch", disable=not comm.is_main_process(), mininterval=1.0):
                with autocast(model.student.device, self._dtype):  # as in a step
                    student, teacher = model.frozen_views(batch)
                    for view in (student, teacher) if first else (student,):
                        view.images  # noqa: B018  the backbone runs
                boxes = [x["instances"].gt_boxes.tensor for x in batch]
                on_device = [x.to(model.student.device) for x in boxes]
                for level in self._levels:
                    add(f"student.{level}", box_means(student.features[level], on_device, student.strides[level]))
                    if first:
                        means = box_means(teacher.features[level], on_device, teacher.strides[level])
                        add(f"teacher.{level}", means)
                if first:
                    for x, corners in zip(batch, boxes):
                        height, width = x["image"].shape[-2:]
                        scale = torch.tensor([x["width"] / width, x["height"] / height] * 2)
                        add("labels", x["instances"].gt_classes)
                        add("images", torch.full((len(corners),), x["prototype_index"]))
                        add("boxes", corners * scale)
        finally:
            model.student.train(was_training)
        collected = {name: torch.cat(values) for name, values in rows.items()}
        if first:
            self._kept = {name: values for name, values in collected.items() if not name.startswith("student.")}
        return {**self._kept, **collected}


def _choose(recipe: Recipe, max_images: int, min_box_size: float) -> tuple[int, list[dict]]:
    """How many training images there are, and the records of those that are chosen."""
    images = recipe.training_images()
    images = [{**image, "annotations": large_annotations(image, min_box_size)} for image in images]
    chosen = choose_images(images, max_images)
    return len(images), [_slim_record(images[index], index, chosen[index]) for index in sorted(chosen)]


def _slim_record(image: dict, index: int, classes: set[int]) -> dict:
    """Of an image's record, what is needed here: masks and other classes are left behind."""
    kept = {key: image[key] for key in ("file_name", "height", "width", "image_id") if key in image}
    annotations = [
        {key: x[key] for key in ("bbox", "bbox_mode", "category_id")}
        for x in image["annotations"]
        if x["category_id"] in classes and not x.get("iscrowd", 0)
    ]
    return {**kept, "annotations": annotations, "prototype_index": index}

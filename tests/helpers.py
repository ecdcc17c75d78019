"""Small detectors, random batches and files to try things on."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import Backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image
from pycocotools import mask as coco_masks

import distill.modeling  # noqa: F401  registers its meta-architectures and backbones
from distill import add_distill_config
from distill.data.digit_scenes import prepare_digit_scenes
from distill.distillers import DISTILLER_REGISTRY

from .forks import run_in_fork

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
FULL_WIDTH = {  # of detector_cfg's ResNet from depth 50 on, which is narrow otherwise
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
}
DETECTORS = ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet", "fcos"]
NUM_CLASSES = 3


def set_all(cfg: CfgNode, values: dict) -> None:
    """Sets config keys, such as {"MODEL.FPN.OUT_CHANNELS": 16}."""
    for key, value in values.items():
        *nodes, leaf = key.split(".")
        node = cfg
        for name in nodes:
            node = node[name]
        node[leaf] = value


def detector_cfg(kind: str, depth: int = 50, channels: int = 16, **overrides) -> CfgNode:
    """The plain config of a small detector of one of DETECTORS, on the CPU. From depth 50 on it has a 16th of ResNet's
    channels, which Detectron2 does not offer for 18 and 34."""
    cfg = get_cfg()
    add_distill_config(cfg)
    dense = kind in ("retinanet", "fcos")
    levels = ["p3", "p4", "p5", "p6", "p7"] if dense else ["p2", "p3", "p4", "p5", "p6"]
    stages = ["res3", "res4", "res5"] if dense else ["res2", "res3", "res4", "res5"]
    narrow = depth >= 50
    set_all(
        cfg,
        {
            "MODEL.DEVICE": "cpu",
            "MODEL.PIXEL_STD": [580.0, 570.0, 570.0],  # a random ResNet enlarges what it gets
            "MODEL.META_ARCHITECTURE": {"retinanet": "RetinaNet", "fcos": "FCOS"}.get(kind, "GeneralizedRCNN"),
            "MODEL.MASK_ON": kind == "mask_rcnn",
            "MODEL.BACKBONE.NAME": f"build_{'retinanet_' if dense else ''}resnet_fpn_backbone",
            "MODEL.BACKBONE.FREEZE_AT": 0,
            "MODEL.RESNETS.DEPTH": depth,
            "MODEL.RESNETS.STEM_OUT_CHANNELS": 16 if narrow else 64,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": 16 if narrow else 64,
            "MODEL.RESNETS.WIDTH_PER_GROUP": 4 if narrow else 64,
            "MODEL.RESNETS.NORM": "FrozenBN",
            "MODEL.RESNETS.OUT_FEATURES": stages,
            "MODEL.FPN.IN_FEATURES": stages,
            "MODEL.FPN.OUT_CHANNELS": channels,
            "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]],
            "MODEL.RPN.IN_FEATURES": levels,
            "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
            "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
            "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
            "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
            "MODEL.ROI_HEADS.NAME": "CascadeROIHeads" if kind == "cascade_rcnn" else "StandardROIHeads",
            "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
            "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
            "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
            "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
            "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": kind == "cascade_rcnn",
            "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
            "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
            "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
            "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
            "MODEL.RETINANET.NUM_CLASSES": NUM_CLASSES,
            "MODEL.RETINANET.NUM_CONVS": 1,
            "MODEL.FCOS.NUM_CLASSES": NUM_CLASSES,
            "MODEL.FCOS.NUM_CONVS": 1,
            "INPUT.MASK_FORMAT": "bitmask",
            **overrides,
        },
    )
    return cfg


def aligned_cfg(kind: str, at: str = "teacher", **overrides) -> CfgNode:
    """The config of a small AlignedTeacher of one of DETECTORS ("teacher"), or of the plain detector that computes what
    it does on the whole image ("full") or on the image at half size ("half")."""
    first = 2 if at == "half" else 3
    levels = [f"p{level}" for level in range(first, first + 5)]
    stages = ["res2", "res3", "res4", "res5"]
    values = {
        "MODEL.RESNETS.OUT_FEATURES": stages,
        "MODEL.FPN.IN_FEATURES": stages,
        "MODEL.RPN.IN_FEATURES": levels,
        "MODEL.ROI_HEADS.IN_FEATURES": levels[:4],
        "MODEL.RETINANET.IN_FEATURES": levels,
        "MODEL.FCOS.IN_FEATURES": levels,
        "MODEL.FCOS.NORM": "",  # in groups of one channel, a level of one cell cannot be normalised
        "MODEL.ANCHOR_GENERATOR.SIZES": [[size / 2 if at == "half" else size] for size in (16, 32, 64, 128, 256)],
    }
    cfg = detector_cfg(kind, **{**values, **overrides})
    if at == "teacher":
        cfg.MODEL.ALIGNED_TEACHER.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
        cfg.MODEL.META_ARCHITECTURE = "AlignedTeacher"
    return cfg


def write_teacher(folder: Path, cfg: CfgNode) -> CfgNode:
    """Writes a teacher's config and random weights; returns a config's DISTILL.TEACHER overrides."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "teacher.pth")
    (folder / "teacher.yaml").write_text(cfg.dump())
    return {
        "DISTILL.TEACHER.CONFIG_FILE": str(folder / "teacher.yaml"),
        "DISTILL.TEACHER.WEIGHTS": str(folder / "teacher.pth"),
    }


def distillation_cfg(student: CfgNode, teacher: dict, **overrides) -> CfgNode:
    """The config that distils ``student`` from what ``write_teacher`` returned, by knowledge review."""
    cfg = copy.deepcopy(student)
    set_all(
        cfg,
        {
            "DISTILL.STUDENT.META_ARCHITECTURE": cfg.MODEL.META_ARCHITECTURE,
            "MODEL.META_ARCHITECTURE": "DistillationModel",
            "DISTILL.DISTILLERS": ["ReviewDistiller"],
            "DISTILL.REVIEW.MID_CHANNELS": 8,
            **teacher,
            **overrides,
        },
    )
    return cfg


def random_batch(*sizes: tuple[int, int], boxes: int = 3) -> list[dict]:
    """Random images of the given (height, width) with random boxes and masks."""
    batch = []
    for height, width in sizes:
        corners = torch.rand(boxes, 2) * 0.4
        corners = torch.cat([corners, corners + 0.2 + 0.3 * torch.rand(boxes, 2)], 1)
        instances = Instances((height, width), gt_boxes=Boxes(corners * torch.tensor([width, height] * 2)))
        masks = torch.zeros(boxes, height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, instances.gt_boxes.tensor.long().tolist()):
            mask[y0:y1, x0:x1] = True
        instances.gt_masks = BitMasks(masks)
        instances.gt_classes = torch.randperm(boxes) % NUM_CLASSES  # three boxes have all three classes
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def built_in(student: str, teacher: str | None = None) -> list[str]:
    """This package's distillers for a student of one of DETECTORS and a teacher of another, or the same; tests register
    their own."""
    dense = [kind in ("retinanet", "fcos") for kind in (student, teacher or student)]
    names = {name for name, cls in DISTILLER_REGISTRY if cls.__module__.startswith("distill.")}
    if not all(dense):
        names -= {"CrossKDDistiller"}
    if dense[0] != dense[1]:
        names -= {"LogitDistiller"}
    return sorted(names)


def write_coco(folder):
    """Three random images in COCO format; returns the annotation file and the image folder."""
    folder.mkdir()
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i + 1, "name": f"c{i}"} for i in range(NUM_CLASSES)],
    }
    for index, (height, width) in enumerate([(75, 101), (64, 64), (133, 90)], 1):
        Image.fromarray(np.random.randint(256, size=(height, width, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        content["images"].append({"id": index, "file_name": f"{index}.png", "height": height, "width": width})
        box = {"bbox": [8, 8, 40, 32], "area": 1280, "category_id": index, "iscrowd": 0}
        content["annotations"].append({"id": index, "image_id": index, **box})
    (folder / "instances.json").write_text(json.dumps(content))
    return str(folder / "instances.json"), str(folder)


def write_few_scenes(folder: Path, number: int) -> list[str]:
    """The first test images of the digit scenes as a dataset in COCO format; returns the annotation file and the image
    folder."""
    scenes = prepare_digit_scenes()
    content = json.loads((scenes / "instances_val.json").read_text())
    content["images"] = content["images"][:number]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] in kept]
    (folder / "few_scenes.json").write_text(json.dumps(content))
    return [str(folder / "few_scenes.json"), str(scenes / "JPEGImages")]


def take_detections(folder: Path) -> list[dict]:
    """What COCOEvaluator wrote into a folder. The file is deleted, so that the next evaluation has to write its own."""
    path = folder / "coco_instances_results.json"
    found = json.loads(path.read_text())
    path.unlink()
    return found


def check_same_detections(found: list[dict], expected: list[dict]) -> None:
    """Compares classes, boxes, scores and masks of what :func:`take_detections` returned."""
    assert expected and len(found) == len(expected)
    for own, other in zip(found, expected):
        assert (own["image_id"], own["category_id"]) == (other["image_id"], other["category_id"])
        np.testing.assert_allclose([*own["bbox"], own["score"]], [*other["bbox"], other["score"]], rtol=1e-4, atol=1e-4)
        masks = [coco_masks.decode(x["segmentation"]) for x in (own, other)]
        assert (masks[0] != masks[1]).sum() <= 0.02 * (masks[0] | masks[1]).sum()


def averaging(fpn):
    """Makes an FPN compute averages over its cells and nothing else, so that what it sees can be located."""

    class Pool(Backbone):
        def output_shape(self):
            return fpn_shape

        def forward(self, images):
            gray = images.mean(1, keepdim=True)
            return {
                name: torch.nn.functional.avg_pool2d(gray, shape.stride).expand(-1, shape.channels, -1, -1)
                for name, shape in fpn_shape.items()
            }

    fpn_shape = fpn.bottom_up.output_shape()
    fpn.bottom_up = Pool()
    for name, weight in fpn.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(weight)
        elif "lateral" in name:
            torch.nn.init.constant_(weight, 1 / weight.shape[1])
        else:
            torch.nn.init.dirac_(weight)
    return fpn.eval().requires_grad_(False)


def script_environment() -> dict[str, str]:
    """Of a script of the project, with one thread, and without a GPU."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def run_script(
    *args: str, cwd: Path = ROOT, timeout: int = 1200, processes: int = 1, **env: str
) -> subprocess.CompletedProcess:
    """Runs a script of the project, or one of an absolute path, as a user does. With several ``processes`` it runs as
    under torchrun. Other scripts and modules run in a Python of their own."""
    env = {**script_environment(), **env}
    if args[0].endswith(".py") and (cwd == ROOT or Path(args[0]).is_absolute()):
        return run_in_fork(list(args), cwd, timeout, env, processes)
    assert processes == 1, "only scripts that are forked run in several processes"
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def write_yaml(path: Path, content: dict) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


torch.set_num_threads(1)  # the models are small, and there may be other work on the machine

"""``digit_scenes``: a detection dataset that needs no download.

Scenes are composed on first use, from a seed, out of the real handwritten digits and the photographs that are
bundled with scikit-learn. Train and val draw from disjoint digits.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, load_voc_instances
from PIL import Image, ImageFilter

from ..errors import DistillError
from .lock import waiting_lock

logger = logging.getLogger(__name__)

CLASS_NAMES = [str(digit) for digit in range(10)]

# A change of any value makes a new cache folder.
SETTINGS = {
    "version": 2,  # raise it when the code below composes other images
    "seed": 2022,
    "size": 128,
    "images": {"train": 2000, "val": 300},
    "digits_per_image": [3, 8],
    "digit_pixels": [16, 56],
    "min_visible": 0.5,  # the least share of a digit's pixels that each later thing on top of it leaves
    "val_digit_share": 0.25,
}


def cache_dir() -> Path:
    """Folder of the composed scenes: below ``$DISTILL_CACHE``, by default ``~/.cache/distill``.

    Raises:
        DistillError: this user has no home folder, and the variable is not set.
    """
    root = Path(os.path.expanduser(os.environ.get("DISTILL_CACHE") or "~/.cache/distill"))
    if str(root).startswith("~"):
        raise DistillError(
            "This user has no home folder for the composed images of digit_scenes: set the variable DISTILL_CACHE to a "
            "folder that can be written to."
        )
    digest = hashlib.sha256(json.dumps(SETTINGS, sort_keys=True).encode()).hexdigest()
    return root / f"digit_scenes_{digest[:12]}"


class SceneComposer:
    """Composes the scenes of one split.

    Args:
        split: "train" or "val". Each has its own digits.
    """

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits, load_sample_images  # a second that only this dataset costs

        self.split = split
        self.size = SETTINGS["size"]
        digits = load_digits()
        order = np.random.default_rng(SETTINGS["seed"]).permutation(len(digits.target))
        num_val = int(len(order) * SETTINGS["val_digit_share"])
        self.indices = order[:num_val] if split == "val" else order[num_val:]
        glyphs = (digits.images * (255 / 16)).astype(np.uint8)
        self.glyphs = np.pad(glyphs, ((0, 0), (1, 1), (1, 1)))  # strokes touch the border of the 8x8 pixels
        self.labels = digits.target
        self.photos = [Image.fromarray(photo) for photo in load_sample_images().images]

    def compose(self, index: int) -> tuple[Image.Image, np.ndarray, np.ndarray]:
        """Composes one scene; the same index gives the same scene.

        Args:
            index: number of the scene in its split.

        Returns:
            The image, the digits' masks (bool array (N, H, W), visible pixels only, disjoint) and their
            classes (int array (N,)).
        """
        rng = np.random.default_rng([SETTINGS["seed"], ("train", "val").index(self.split), index])
        canvas = self._background(rng)
        masks, classes = [], []
        low, high = SETTINGS["digits_per_image"]
        for _ in range(rng.integers(low, high + 1)):
            digit = rng.choice(self.indices)
            alpha, mask = self._place(rng, self.glyphs[digit])
            areas = [m.sum() for m in masks]
            if mask.sum() < 12 or any((m & ~mask).sum() < SETTINGS["min_visible"] * a for m, a in zip(masks, areas)):
                continue
            canvas = self._paint(rng, canvas, alpha)
            masks = [m & ~mask for m in masks] + [mask]
            classes.append(self.labels[digit])
        if rng.random() < 0.5:
            canvas, masks = self._occlude(rng, canvas, masks)
        noise = rng.normal(0, rng.uniform(0, 6), canvas.shape)
        image = Image.fromarray(np.clip(canvas + noise, 0, 255).astype(np.uint8))
        return image, np.array(masks).reshape(-1, self.size, self.size), np.array(classes, dtype=np.int64)

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """A random crop of a photograph under random colours, or smoothed noise, as float (H, W, 3)."""
        if rng.random() < 0.6:
            photo = self.photos[rng.integers(len(self.photos))]
            side = int(rng.integers(64, 320))
            x, y = (int(rng.integers(0, extent - side)) for extent in photo.size)
            crop = photo.crop((x, y, x + side, y + side)).resize((self.size, self.size), Image.BILINEAR)
            texture = np.asarray(crop, dtype=np.float64)
        else:
            texture = np.zeros((self.size, self.size, 3))
            for cells in (4, 16, 48):
                noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
                layer = Image.fromarray(noise).resize((self.size, self.size), Image.BICUBIC)
                texture += np.asarray(layer, dtype=np.float64) / 3
        contrast = rng.uniform(0.2, 0.6)
        return texture.mean((0, 1)) * 0.5 + rng.uniform(0, 128, 3) + (texture - texture.mean((0, 1))) * contrast

    def _place(self, rng: np.random.Generator, glyph: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scales, turns, blurs and places a glyph; returns its opacity (H, W) in [0, 1] and its mask."""
        low, high = np.log(SETTINGS["digit_pixels"])
        side = int(np.exp(rng.uniform(low, high)))
        stamp = Image.fromarray(glyph).resize((side, side), Image.BICUBIC)
        stamp = stamp.rotate(rng.uniform(-25, 25), Image.BICUBIC, expand=True)
        layer = Image.new("L", (self.size, self.size))
        x, y = (int(rng.integers(-side // 8, self.size - extent + side // 8 + 1)) for extent in stamp.size)
        layer.paste(stamp, (x, y))
        if rng.random() < 0.25:
            layer = layer.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.04 * side)))
        alpha = np.clip(np.asarray(layer, dtype=np.float64) / 160, 0, 1)
        return alpha, alpha > 0.4

    def _paint(self, rng: np.random.Generator, canvas: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        """Blends the digit in, in a colour that differs from what lies below, by little at times."""
        below = (canvas * alpha[..., None]).sum((0, 1)) / max(alpha.sum(), 1e-6)
        contrast = rng.uniform(35, 60) if rng.random() < 0.2 else rng.uniform(70, 170)
        direction = -1 if below.mean() > 128 else 1
        colour = np.clip(below + direction * contrast + rng.normal(0, 12, 3), 0, 255)
        return canvas + alpha[..., None] * (colour - canvas)

    def _occlude(
        self, rng: np.random.Generator, canvas: np.ndarray, masks: list[np.ndarray]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Draws a bar across the scene, unless it would hide too much of some digit."""
        width = int(rng.integers(2, 7))
        start = int(rng.integers(0, self.size - width))
        bar = np.zeros((self.size, self.size), dtype=bool)
        bar[start : start + width] = True
        if rng.random() < 0.5:
            bar = bar.T
        visible = [m & ~bar for m in masks]
        if any(v.sum() < SETTINGS["min_visible"] * m.sum() or v.sum() < 12 for v, m in zip(visible, masks)):
            return canvas, masks
        return np.where(bar[..., None], rng.uniform(0, 255, 3), canvas), visible


def _bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The box (x0, y0, x1, y1) around a mask, in pixels; x1 and y1 are exclusive."""
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def _coco_annotation(mask: np.ndarray, category: int, image_id: int, annotation_id: int) -> dict:
    rle = mask_util.encode(np.asfortranarray(mask))
    x0, y0, x1, y1 = _bounding_box(mask)
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": int(category) + 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }


def _write_voc_annotation(path: Path, image_name: str, size: int, masks: np.ndarray, classes: np.ndarray) -> None:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = image_name
    extent = ElementTree.SubElement(root, "size")
    for key, value in (("width", size), ("height", size), ("depth", 3)):
        ElementTree.SubElement(extent, key).text = str(value)
    for mask, category in zip(masks, classes):
        node = ElementTree.SubElement(root, "object")
        for key, value in (
            ("name", CLASS_NAMES[category]),
            ("pose", "Unspecified"),
            ("truncated", 0),
            ("difficult", 0),
        ):
            ElementTree.SubElement(node, key).text = str(value)
        x0, y0, x1, y1 = _bounding_box(mask)
        box = ElementTree.SubElement(node, "bndbox")
        # PASCAL VOC counts pixels from 1 and includes the last one
        for key, value in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
            ElementTree.SubElement(box, key).text = str(value)
    ElementTree.ElementTree(root).write(path)


def _write_split(folder: Path, split: str) -> None:
    """Composes one split into ``folder``: images, COCO JSON, and for val the PASCAL VOC files."""
    composer, count = SceneComposer(split), SETTINGS["images"][split]
    images, annotations, names = [], [], []
    started = logged = time.time()
    for index in range(count):
        image, masks, classes = composer.compose(index)
        names.append(f"{split}_{index:05d}")
        image.save(folder / "JPEGImages" / f"{names[-1]}.jpg", quality=95)
        images.append({"id": index + 1, "file_name": f"{names[-1]}.jpg", "width": image.width, "height": image.height})
        for mask, category in zip(masks, classes):
            annotations.append(_coco_annotation(mask, category, index + 1, len(annotations) + 1))
        if split == "val":
            xml = folder / "Annotations" / f"{names[-1]}.xml"
            _write_voc_annotation(xml, f"{names[-1]}.jpg", image.width, masks, classes)
        if time.time() - logged > 5:
            logged = time.time()
            left = (logged - started) / (index + 1) * (count - index - 1)
            logger.info(f"Composing digit_scenes, {split}: {index + 1} of {count} images, {left:.0f} s left")
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / f"instances_{split}.json").write_text(json.dumps(content))
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")


def prepare_digit_scenes() -> Path:
    """Composes the dataset unless it is there already; safe when several processes start at once.

    Returns:
        Its folder, always complete: it is written under another name first and renamed when done.
    """
    folder = cache_dir()
    if folder.is_dir():
        return folder
    with waiting_lock(str(folder), "composes digit_scenes") as is_held:
        if folder.is_dir():
            return folder
        for draft in folder.parent.glob(f"{folder.name}.*") if is_held else ():
            if draft.is_dir():  # of a process that was killed
                shutil.rmtree(draft, ignore_errors=True)
        logger.info(f"Composing digit_scenes into {folder}, once")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        except OSError as error:
            raise DistillError(
                f"The digit scenes cannot be written to {folder.parent}: {error}. Name a folder that you may write to "
                "by the environment variable DISTILL_CACHE."
            ) from error
        try:
            for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
                (draft / name).mkdir(parents=True)
            for split in SETTINGS["images"]:
                _write_split(draft, split)
            draft.chmod(0o755)
            draft.rename(folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            if not folder.is_dir():  # where there is no lock, another process may have been faster
                raise
    return folder


def register_digit_scenes() -> None:
    """Registers ``digit_scenes_train``, its first 100, 200 and 400 images as ``digit_scenes_train_100`` and so on,
    ``digit_scenes_val`` and ``digit_scenes_voc_val``; composes nothing yet."""
    folder = cache_dir()
    for split in SETTINGS["images"]:
        _register_coco(f"digit_scenes_{split}", folder / f"instances_{split}.json", folder / "JPEGImages")
    for number in (100, 200, 400):
        name = f"digit_scenes_train_{number}"
        DatasetCatalog.register(name, lambda number=number: DatasetCatalog.get("digit_scenes_train")[:number])
        MetadataCatalog.get(name).set(thing_classes=CLASS_NAMES)
    name = "digit_scenes_voc_val"
    DatasetCatalog.register(name, lambda: load_voc_instances(str(prepare_digit_scenes()), "val", CLASS_NAMES))
    MetadataCatalog.get(name).set(
        thing_classes=CLASS_NAMES, dirname=str(folder), split="val", year=2012, evaluator_type="pascal_voc"
    )


def _register_coco(name: str, json_file: Path, image_root: Path) -> None:
    def load() -> list[dict]:
        prepare_digit_scenes()
        return load_coco_json(str(json_file), str(image_root), name)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=CLASS_NAMES, json_file=str(json_file), image_root=str(image_root), evaluator_type="coco"
    )

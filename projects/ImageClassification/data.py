"""Images with one class each: a folder of images a class, CIFAR-100, or scikit-learn's digits."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import datasets, transforms

from distill.errors import DistillError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class Digits(torch.utils.data.Dataset):
    """scikit-learn's handwritten digits, 8x8 pixels, at four times their size.

    Args:
        train: the training images (the first of the dataset) or the others.
        number: how many the training images are.
    """

    def __init__(self, train: bool, number: int = 400) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        part = slice(0, number) if train else slice(number, None)
        images = torch.from_numpy(found.images[part]).float() / 16
        images = F.interpolate(images[:, None], scale_factor=4, mode="bilinear", align_corners=False)
        self.images = ((images - images.mean()) / images.std()).repeat(1, 3, 1, 1)
        self.labels = found.target[part].tolist()
        self.classes = [str(name) for name in found.target_names]
        self.shift = 3 if train else 0  # pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        image = self.images[index]
        if self.shift:
            dx, dy = torch.randint(-self.shift, self.shift + 1, (2,)).tolist()
            image = image.roll((dy, dx), (1, 2))
        return {"image": image, "label": self.labels[index], "id": index}


class Labelled(torch.utils.data.Dataset):
    """A dataset of torchvision's as dicts.

    Args:
        source: gives (image, label) pairs.
        classes: names of the classes.
    """

    def __init__(self, source: torch.utils.data.Dataset, classes: list[str]) -> None:
        self.source, self.classes = source, classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        image, label = self.source[index]
        return {"image": image, "label": label, "id": index}


def load_data(name: str, train: bool, size: int = 224) -> torch.utils.data.Dataset:
    """A dataset by its name.

    Args:
        name: "digits"; "cifar100:ROOT", with cifar-100-python below ROOT; or "folder:ROOT", with a folder of images for
            each class below ROOT/train and ROOT/val.
        train: the training images or the test images.
        size: of the images of a folder, in pixels.

    Returns:
        A dataset with ``classes``, whose items are dicts with "image" (``Tensor[3, H, W]``, normalised), "label" and
        "id".

    Raises:
        DistillError: the name is unknown, or there is nothing there.
    """
    kind, _, root = name.partition(":")
    if kind == "digits" and not root:
        return Digits(train)
    normalise = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    if kind == "cifar100" and root:
        augment = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()] if train else []
        try:
            source = datasets.CIFAR100(root, train, transforms.Compose(augment + normalise))
        except RuntimeError:
            raise DistillError(f"{root} holds no CIFAR-100: expected cifar-100-python in there.") from None
        return Labelled(source, source.classes)
    if kind == "folder" and root:
        path = Path(root) / ("train" if train else "val")
        if train:
            resize = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        else:
            resize = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
        try:
            source = datasets.ImageFolder(str(path), transforms.Compose(resize + normalise))
        except FileNotFoundError as error:
            raise DistillError(f"{path} holds no images by class: {error}") from None
        return Labelled(source, source.classes)
    raise DistillError(f"The dataset {name!r} is unknown: expected digits, cifar100:ROOT or folder:ROOT.")

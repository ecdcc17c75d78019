#!/usr/bin/env python3
"""Cuts one width out of a slimmable ResNet-50's ImageNet weights, for the students of aligned distillation.

    python tools/convert_slimmable.py s_resnet50_0.25_0.5_0.75_1.0.pt --width 0.25 \\
        --output output/imagenet/slim_resnet50_x0.25.pth

The file is that of Slimmable Neural Networks (Yu et al., ICLR 2019, arXiv 1812.08928), which the paper of aligned
distillation starts from: convolutions of the full width, whose first channels are the narrower networks', and batch
norms of each width. Its images are RGB, divided by torchvision's deviations; its bottlenecks stride in the 3x3.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from distill.errors import DistillError

WIDTHS = (0.25, 0.5, 0.75, 1.0)
BLOCKS = (3, 4, 6, 3)
CONVOLUTIONS = {"conv1": ("body.0", "body.1"), "conv2": ("body.3", "body.4"), "conv3": ("body.6", "body.7")}
NORM = ("weight", "bias", "running_mean", "running_var")


def convert(state: dict[str, Tensor], width: float) -> dict[str, Tensor]:
    """The weights of one width, by Detectron2's names.

    Args:
        state: the slimmable network's state dict.
        width: one of WIDTHS.

    Returns:
        What Detectron2's ResNet-50 of that width holds, ``backbone.bottom_up.`` in front.

    Raises:
        DistillError: the file is of another network, or has no such width.
    """
    if width not in WIDTHS:
        raise DistillError(f"--width is {width}: expected one of {', '.join(map(str, WIDTHS))}.")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    norm = f"bn.{WIDTHS.index(width)}."
    converted: dict[str, Tensor] = {}

    def add(source: str, norm_source: str, target: str, in_channels: int) -> int:
        """One convolution and its norm; returns how many channels it has."""
        names = [f"{source}.weight", *(f"{norm_source}.{norm}{x}" for x in NORM)]
        lacking = [name for name in names if name not in state]
        if lacking:
            raise DistillError(
                f"The weights have no {lacking[0]}: expected the state dict of a slimmable ResNet-50 of the widths "
                f"{', '.join(map(str, WIDTHS))}."
            )
        kernel, *values = (state[name] for name in names)
        channels = len(values[0])
        converted[f"backbone.bottom_up.{target}.weight"] = kernel[:channels, :in_channels].clone()
        for name, value in zip(NORM, values):
            converted[f"backbone.bottom_up.{target}.norm.{name}"] = value.clone()
        return channels

    channels = add("features.0.0", "features.0.1", "stem.conv1", 3)
    index = 1
    for stage, blocks in enumerate(BLOCKS, 2):
        for block in range(blocks):
            source, target = f"features.{index}", f"res{stage}.{block}"
            inside = channels
            for name, (conv, norm_of_it) in CONVOLUTIONS.items():
                inside = add(f"{source}.{conv}", f"{source}.{norm_of_it}", f"{target}.{name}", inside)
            if block == 0:
                add(f"{source}.shortcut.0", f"{source}.shortcut.1", f"{target}.shortcut", channels)
            channels = inside
            index += 1
    return converted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="the slimmable network's file")
    parser.add_argument("--width", type=float, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    try:
        state = torch.load(args.weights, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises for a missing or damaged file
        raise DistillError(f"Cannot read {args.weights!r}: {error}.") from error
    converted = convert(state.get("model", state), args.width)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": converted}, args.output)
    print(f"{len(converted)} weights: {args.output}")


if __name__ == "__main__":
    try:
        main()
    except DistillError as error:
        sys.exit(f"error: {error}")

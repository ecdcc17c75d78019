"""What an image costs at inference."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from measuring import count_gflops, time_images
from torch import nn

from distill.recipes.base import Mapper
from report_parts.tables import Cell, Table, row_of

logger = logging.getLogger("detectron2.report")

_DIRECTION = "The lowest of a row is bold; a few percent of time are chance."


def cost_table(
    models: Mapping[str, nn.Module], mappers: Mapping[str, Mapper], records: Sequence[dict], rounds: int, where: str
) -> tuple[Table, list[str]]:
    """Parameters, time and GFLOPs side by side, on the same images, each resized as its own config says.

    Args:
        models: detectors by name, in eval mode.
        mappers: what reads an image for each.
        records: the images.
        rounds: how many of them are timed.
        where: the device, in words.

    Returns:
        The table, and a sentence for each model whose GFLOPs cannot be counted.

    Raises:
        DistillError: an image cannot be read.
    """
    inputs = {name: [mappers[name](record) for record in records[: rounds + 2]] for name in models}
    parameters = [sum(p.numel() for p in model.parameters()) / 1e6 for model in models.values()]
    sizes = ["{1} × {2}".format(*images[0]["image"].shape) for images in inputs.values()]  # noqa: RUF001
    gflops: list[float | None] = []
    notes = []
    for name, model in models.items():
        try:
            gflops.append(count_gflops(model, inputs[name][0]))
        except Exception as error:  # whatever tracing a model of the user's own raises
            gflops.append(None)
            notes.append(f"The GFLOPs of {name} cannot be counted: {type(error).__name__}: {error}")
    times = time_images(models, inputs, rounds)
    rows = [
        ("parameters (millions)", row_of(parameters, 2, min)),
        ("ms per image", row_of([times[name] for name in models], 1, min)),
        ("GFLOPs per image", row_of(gflops, 2, min)),
        ("size of the first image", [Cell(size) for size in sizes]),
    ]
    caption = (
        f"Inference on {where}, one image at a time: the median of {rounds} images, the models in turns. GFLOPs of the "
        f"first image by fvcore, a multiplication and an addition being one. {_DIRECTION}"
    )
    return Table(caption, list(models), rows), notes

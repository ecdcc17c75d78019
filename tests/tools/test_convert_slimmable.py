"""Slim ImageNet weights: a narrow ResNet of Detectron2 computes what the first channels of the slimmable one do."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone

from distill.config import slim_config
from distill.errors import DistillError
from tests.helpers import FULL_WIDTH, detector_cfg, run_script

WIDTHS = (0.25, 0.5, 0.75, 1.0)


def slimmable_state() -> dict[str, torch.Tensor]:
    """Random weights by the names and shapes of a slimmable ResNet-50."""
    state = {}

    def add(conv: str, norm: str, outside: int, inside: int, size: int) -> None:
        state[f"module.{conv}.weight"] = torch.randn(outside, inside, size, size) / (inside * size * size) ** 0.5
        for index, width in enumerate(WIDTHS):
            channels = int(outside * width)
            for name in ("weight", "running_var"):
                state[f"module.{norm}.bn.{index}.{name}"] = torch.rand(channels) + 0.5
            for name in ("bias", "running_mean"):
                state[f"module.{norm}.bn.{index}.{name}"] = torch.randn(channels) / 10

    add("features.0.0", "features.0.1", 64, 3, 7)
    index, inside = 1, 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        middle = 64 * 2**stage
        for block in range(blocks):
            name = f"features.{index}"
            add(f"{name}.body.0", f"{name}.body.1", middle, inside, 1)
            add(f"{name}.body.3", f"{name}.body.4", middle, middle, 3)
            add(f"{name}.body.6", f"{name}.body.7", 4 * middle, middle, 1)
            if block == 0:
                add(f"{name}.shortcut.0", f"{name}.shortcut.1", 4 * middle, inside, 1)
            index, inside = index + 1, 4 * middle
    return state


def literal_forward(state: dict[str, torch.Tensor], x: torch.Tensor, width: float) -> torch.Tensor:
    """The slimmable network at one width, slicing its convolutions at each step."""

    def unit(x: torch.Tensor, conv: str, norm: str, stride: int, padding: int) -> torch.Tensor:
        scale, bias, mean, var = (
            state[f"module.{norm}.bn.{WIDTHS.index(width)}.{k}"]
            for k in ("weight", "bias", "running_mean", "running_var")
        )
        kernel = state[f"module.{conv}.weight"][: len(scale), : x.shape[1]]
        return F.batch_norm(F.conv2d(x, kernel, stride=stride, padding=padding), mean, var, scale, bias)

    x = F.max_pool2d(unit(x, "features.0.0", "features.0.1", 2, 3).relu(), 3, 2, 1)
    index = 1
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            name, stride = f"features.{index}", 2 if block == 0 and stage > 0 else 1
            y = unit(x, f"{name}.body.0", f"{name}.body.1", 1, 0).relu()
            y = unit(y, f"{name}.body.3", f"{name}.body.4", stride, 1).relu()
            y = unit(y, f"{name}.body.6", f"{name}.body.7", 1, 0)
            if block == 0:
                x = unit(x, f"{name}.shortcut.0", f"{name}.shortcut.1", stride, 0)
            x = (x + y).relu()
            index += 1
    return x


@pytest.mark.parametrize("width", [0.25, 0.75])
def test_the_slim_network_computes_the_same(tmp_path, width):
    state = slimmable_state()
    torch.save({"model": state}, tmp_path / "slimmable.pt")
    output = tmp_path / "new" / "slim.pth"
    result = run_script(
        "tools/convert_slimmable.py", str(tmp_path / "slimmable.pt"), "--width", str(width), "--output", str(output)
    )
    assert result.returncode == 0, result.stderr
    settings = {"MODEL.RESNETS.STRIDE_IN_1X1": False, "MODEL.RESNETS.WIDTH_MULT": width}
    cfg = slim_config(detector_cfg("retinanet", **settings, **FULL_WIDTH))
    backbone = build_backbone(cfg).bottom_up.eval()
    weights = torch.load(output, weights_only=True)["model"]
    backbone.load_state_dict({k.removeprefix("backbone.bottom_up."): v for k, v in weights.items()})  # all of them
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(backbone(image)["res5"], literal_forward(state, image, width), rtol=1e-3, atol=1e-3)


def test_other_weights_and_widths_are_refused():
    import importlib.util

    from tests.helpers import ROOT

    spec = importlib.util.spec_from_file_location("convert_slimmable", ROOT / "tools" / "convert_slimmable.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(DistillError, match="--width is 0.3: expected one of 0.25, 0.5"):
        module.convert({}, 0.3)
    with pytest.raises(DistillError, match="have no features.0.0.weight: expected the state dict of a slimmable"):
        module.convert({"conv1.weight": torch.zeros(1)}, 0.5)

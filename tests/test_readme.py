"""The distiller that the README shows works as it stands."""

import re

from detectron2.modeling import build_model

from distill.distillers import DISTILLER_REGISTRY
from tests.helpers import ROOT, detector_cfg, distillation_cfg, random_batch, write_teacher


def test_the_readmes_distiller_trains(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(# my_distiller\.py.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "my_distiller.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        cfg = distillation_cfg(
            detector_cfg("retinanet"),
            write_teacher(tmp_path, detector_cfg("faster_rcnn", channels=32)),
            **{"DISTILL.IMPORTS": ["my_distiller"], "DISTILL.DISTILLERS": ["PlainDistiller"]},
        )
        model = build_model(cfg).train()
        losses = model(random_batch((64, 96)))
        losses["loss_plain"].backward()
        assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())
    finally:
        DISTILLER_REGISTRY._obj_map.pop("PlainDistiller", None)

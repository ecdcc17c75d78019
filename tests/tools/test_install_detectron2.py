"""The installer's patches and stub, on a small tree of the same shape and in the Detectron2 that is installed."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MapDataset
from detectron2.data import transforms as T
from detectron2.engine import hooks
from omegaconf import OmegaConf

from tests.helpers import ROOT

spec = importlib.util.spec_from_file_location("install_detectron2", ROOT / "tools" / "install_detectron2.py")
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)

FILES = {
    "detectron2/__init__.py": "",
    "detectron2/layers/nms.py": "def f(a):\n    return torch.ops.detectron2.nms_rotated(a)\n",
    "detectron2/data/transforms/transform.py": "x = Image.LINEAR, np.bool, np.bool_, np.float32, np.int\n",
    "detectron2/evaluation/fast_eval_api.py": "from detectron2 import _C\n",
    "detectron2/evaluation/coco_evaluation.py": (
        "class COCOeval: pass\nfrom detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
    ),
    "detectron2/utils/collect_env.py": "    try:\n        import detectron2._C as _C\n",
    "detectron2/export/__init__.py": "from .api import *\nfrom .flatten import x\nfrom .torchscript import y\n",
    "detectron2/export/api.py": "import caffe2\n",
    "detectron2/export/flatten.py": "x = 1\n",
    "detectron2/export/torchscript.py": "y = 2\n",
    "detectron2/data/common.py": "self._rng.sample(self._fallback_candidates, k=1)\n",
    "detectron2/engine/hooks.py": "torch.optim.lr_scheduler._LRScheduler\n",
    "detectron2/modeling/meta_arch/retinanet.py": "get_norm(norm, 1)\n",
    "setup.py": (
        'name="pb1-detectron2",\n    ext_modules=get_extensions(),\n    cmdclass={},\nget_model_zoo_configs()}\n'
        'find_packages(exclude=("configs", "tests*"))\n        "future",  # used by caffe2\n        "black==21.4b2",\n'
    ),
}


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_patches_rename_what_numpy_and_pillow_dropped(tree):
    install.patch(tree)
    text = (tree / "detectron2/data/transforms/transform.py").read_text()
    assert text == "x = Image.BILINEAR, bool, np.bool_, np.float32, int\n"
    setup = (tree / "setup.py").read_text()
    assert 'name="detectron2"' in setup and "ext_modules" not in setup
    assert "future" not in setup and '"black",' in setup


def test_export_can_be_imported_without_caffe2(tree):
    install.patch(tree)
    subprocess.run([sys.executable, "-c", "from detectron2.export import x, y"], cwd=tree, check=True)


def test_coco_evaluation_falls_back_without_the_extension(tree):
    install.patch(tree)
    code = "from detectron2.evaluation.coco_evaluation import COCOeval, COCOeval_opt; assert COCOeval_opt is COCOeval"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True)


def test_stub_names_the_op_and_how_to_get_it(tree):
    install.patch(tree)
    code = "from detectron2 import _C; _C.deform_conv_forward"
    result = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert "ImportError: detectron2._C.deform_conv_forward needs" in result.stderr
    assert "--from-source" in result.stderr


def test_another_source_is_refused(tree):
    (tree / "detectron2/layers/nms.py").write_text("")
    with pytest.raises(install.InstallError, match="this is not Detectron2 v0.6"):
        install.patch(tree)


def test_a_download_with_another_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "pip", lambda *args: (tmp_path / "pb1-detectron2-0.6.tar.gz").write_bytes(b"other"))
    with pytest.raises(install.InstallError, match=f"expected {install.SHA256}"):
        install.download(tmp_path)


@pytest.mark.parametrize("is_outdated", [False, True])
def test_an_installed_detectron2_is_left_alone_unless_its_patches_are_others(monkeypatch, capsys, is_outdated):
    calls = []
    monkeypatch.setattr(sys, "argv", ["install_detectron2.py"])
    monkeypatch.setattr(install, "is_outdated", lambda: is_outdated)
    monkeypatch.setattr(install, "build_wheel", lambda folder: folder / "detectron2.whl")
    monkeypatch.setattr(install, "pip", lambda *args: calls.append(args))
    install.main()
    told = capsys.readouterr().out
    assert ("left alone" in told, "replaced" in told) == (not is_outdated, is_outdated)
    assert [call[:4] for call in calls] == [("install", "-q", "--force-reinstall", "--no-deps")] * is_outdated


@pytest.mark.parametrize("change", ["", "none", "another", "compiled"])
def test_builds_with_other_patches_are_told(tree, monkeypatch, change):
    install.patch(tree)
    stub = tree / "detectron2" / "_C.py"
    if change == "none":  # of a time before there was a digest
        stub.write_text(install.STUB)
    elif change == "another":
        stub.write_text(stub.read_text().replace(install.digest_of_patches(), "0" * 16))
    elif change == "compiled":
        stub.rename(stub.with_name("compiled.py"))
        (tree / "detectron2" / "__init__.py").write_text("import sys\nfrom . import compiled as _C\n")
        with (tree / "detectron2" / "__init__.py").open("a") as f:
            f.write("sys.modules['detectron2._C'] = _C\n")
    monkeypatch.chdir(tree)
    assert install.is_outdated() == (change in ("none", "another"))


# The rest asks the Detectron2 that is installed. Our build and the main branch do all of it; v0.6 as released does not,
# or lacks a package for it: opencv, shapely, black.


def test_a_module_is_exported_without_caffe2():
    from detectron2.export import TracingAdapter

    adapter = TracingAdapter(torch.nn.ReLU(), torch.tensor([-1.0, 1.0]))
    assert adapter(torch.tensor([-2.0, 3.0]))[0].tolist() == [0, 3]


def test_an_image_without_a_result_is_replaced_by_another():
    data = MapDataset([0, 1], lambda x: x or None)  # nothing for 0
    assert [data[0], data[1]] == [1, 1]


def test_the_state_of_torch_schedulers_is_saved():
    def hook():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return hooks.LRScheduler(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2))

    first, second = hook(), hook()
    first.scheduler.optimizer.step()
    first.scheduler.step()
    second.load_state_dict(first.state_dict())
    assert second.scheduler.last_epoch == 1


def test_polygons_are_cropped():
    square = np.array([[0, 0], [8, 0], [8, 8], [0, 8]], dtype=float)
    (polygon,) = T.CropTransform(4, 4, 10, 10).apply_polygons([square])
    assert polygon.min() == 0 and polygon.max() == 4


def test_a_lazy_config_is_printed_as_python():
    assert LazyConfig.to_py(OmegaConf.create({"a": {"b": 1}})) == "cfg.a.b = 1\n"


def test_fcos_of_the_model_zoo_is_built():
    model = instantiate(model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model)
    norms = [layer for layer in model.head.modules() if isinstance(layer, torch.nn.GroupNorm)]
    assert norms and all(norm.num_channels == 256 for norm in norms)


def test_visualizer_draws():
    from detectron2.utils.visualizer import Visualizer

    mask = np.zeros((32, 32), dtype=bool)
    mask[8:24, 8:24] = True
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    drawn = Visualizer(image).overlay_instances(masks=[mask], assigned_colors=["w"])
    assert drawn.get_image()[16, 16].min() > 100

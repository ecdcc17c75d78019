"""The installer's patches and stub, on a small tree of the same shape."""

import importlib.util
import subprocess
import sys

import pytest

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
    "setup.py": (
        'name="pb1-detectron2",\n    ext_modules=get_extensions(),\n    cmdclass={},\nget_model_zoo_configs()}\n'
        'find_packages(exclude=("configs", "tests*"))\n        "black==21.4b2",\n'
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
    assert 'name="detectron2"' in setup and "ext_modules" not in setup and "black" not in setup


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


def test_an_installed_detectron2_is_left_alone():
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "install_detectron2.py"], capture_output=True, text=True, check=True
    )
    assert result.stdout == "detectron2 can be imported already: left alone.\n"

#!/usr/bin/env python3
"""Installs Detectron2 without a compiler, from the Python package index alone.

Detectron2 is on no package index under its own name. The source distribution ``pb1-detectron2`` 0.6
carries the Python files of the official tag v0.6 (compared: identical) without the C++ sources. This
script checks its sha256, unpacks it, applies a few of the changes that Detectron2's main branch has made
since (``PATCHES`` below), puts an explaining stub in the place of the compiled extension, and installs the result
as a pure-Python wheel named ``detectron2``. RoIAlign and NMS come from torchvision, so Faster, Mask and
Cascade R-CNN, RetinaNet and FCOS train on CPU and CUDA. See docs/install.md.

    python tools/install_detectron2.py                 # install, unless `import detectron2` works already
    python tools/install_detectron2.py --wheel DIR     # write the wheel to DIR, install nothing
    python tools/install_detectron2.py --from-source   # compile and install the official main branch
"""

import argparse
import hashlib
import importlib.util
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SDIST = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
UPSTREAM = "git+https://github.com/facebookresearch/detectron2.git"

STUB = '''"""Stands in for Detectron2's compiled extension, which this pure-Python installation does not have."""


def __getattr__(name):
    if name.startswith("__"):  # what Python itself asks of any module
        raise AttributeError(name)
    raise ImportError(
        f"detectron2._C.{name} needs Detectron2's compiled extension, and this is the pure-Python build. "
        "Deformable convolution on CUDA, rotated boxes and the fast COCO evaluation are in it. To get it: "
        "`pip uninstall detectron2`, then `python tools/install_detectron2.py --from-source` "
        "(needs git, a C++ compiler and, for CUDA, nvcc)."
    )
'''

# (file, pattern, replacement): every pattern must match, or the source is not the one that was checked.
PATCHES = [
    # numpy 1.24 dropped its aliases of Python's types, Pillow 10 its alias of BILINEAR
    ("detectron2/**/*.py", r"\bnp\.(bool|int|float|object|str)\b", r"\1"),
    ("detectron2/data/transforms/transform.py", r"Image\.LINEAR", "Image.BILINEAR"),
    # as on main: without the extension, evaluate with pycocotools
    (
        "detectron2/evaluation/fast_eval_api.py",
        r"from detectron2 import _C\n",
        "from detectron2 import _C\n\n_C.COCOevalEvaluateImages  # ImportError without the extension\n",
    ),
    (
        "detectron2/evaluation/coco_evaluation.py",
        r"from detectron2\.evaluation\.fast_eval_api import COCOeval_opt\n",
        "\ntry:\n    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n    COCOeval_opt = COCOeval\n\n",
    ),
    (
        "detectron2/layers/nms.py",
        r"    return torch\.ops\.detectron2\.nms_rotated\(",
        "    from detectron2 import _C\n\n    _C.nms_rotated  # ImportError without the extension\n"
        "    return torch.ops.detectron2.nms_rotated(",
    ),
    (
        "detectron2/utils/collect_env.py",
        r"        import detectron2\._C as _C\n",
        "        import detectron2._C as _C\n\n        _C.get_compiler_version  # ImportError without the extension\n",
    ),
    # as on main: torch no longer has caffe2, and only the export to caffe2 needs it
    (
        "detectron2/export/__init__.py",
        r"from \.api import \*\n(from \.flatten .*\nfrom \.torchscript .*\n)",
        r"\1" + "\ntry:\n    from caffe2.proto import caffe2_pb2 as _tmp\nexcept ImportError:\n    pass\n"
        "else:\n    from .api import *\n",
    ),
    # as on main: Python 3.11 no longer samples from a set, which ends the training at the first image without a result
    ("detectron2/data/common.py", r"sample\(self\._fallback_candidates,", "sample(list(self._fallback_candidates),"),
    # as on main: torch 2.0 renamed the base class of its schedulers; by the old name the hook saves no state of theirs
    ("detectron2/**/*.py", r"\blr_scheduler\._LRScheduler\b", "lr_scheduler.LRScheduler"),
    # as on main: FCOS makes a norm of one channel to learn its type, and torch refuses 32 groups (GN) of one channel
    ("detectron2/modeling/meta_arch/retinanet.py", r"get_norm\(norm, 1\)", "get_norm(norm, 32)"),
    # a pure-Python distribution named detectron2, the model zoo's configs inside
    ("setup.py", r'name="pb1-detectron2"', 'name="detectron2"'),
    ("setup.py", r"    ext_modules=get_extensions\(\),\n    cmdclass=.*\n", ""),
    ("setup.py", r"get_model_zoo_configs\(\)\}", '["configs/**/*.yaml", "configs/**/*.py"]}'),
    ("setup.py", r'find_packages\(exclude=\("configs", "tests\*"\)\)', 'find_packages(include=("detectron2*",))'),
    # only for the caffe2 export
    ("setup.py", r' +"(future|pydot)",.*\n', ""),
    # as on main: LazyConfig.to_py formats with black, and any will do
    ("setup.py", r'"black==21\.4b2"', '"black"'),
]


class InstallError(Exception):
    """What went wrong and what to do, in one message."""


def pip(*args: str) -> None:
    """Runs pip of this interpreter.

    Args:
        args: pip's arguments.

    Raises:
        InstallError: pip failed.
    """
    command = [sys.executable, "-m", "pip", *args]
    if subprocess.run(command).returncode:
        raise InstallError(
            f"`{' '.join(command)}` failed: its message is above. Check that the Python package index is "
            "reachable (`python -m pip download --no-deps fvcore`) and run this again."
        )


def check_build_environment() -> None:
    """Makes sure that the source distribution's metadata step, which imports torch, can run."""
    if importlib.util.find_spec("torch") is None:
        raise InstallError(
            "Detectron2 is built on torch, which this Python does not have. Install both first: "
            "`pip install -c constraints.txt torch torchvision`, or type `make venv`."
        )
    pip("install", "-q", "setuptools<81", "wheel")  # 81 drops pkg_resources, which Detectron2 imports


def download(folder: Path) -> Path:
    """Downloads and checks the source distribution.

    Args:
        folder: where to.

    Returns:
        Its path.

    Raises:
        InstallError: it is not the file that was checked.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{SDIST} --hash=sha256:{SHA256}\n")  # pip runs the setup.py of what it downloads
    options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", str(folder)]
    pip("download", "-q", *options, "-r", str(requirements))
    (archive,) = folder.glob("*.tar.gz")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise InstallError(
            f"{archive.name} has sha256 {digest}, expected {SHA256}. The file was damaged on its way or "
            "replaced at its source: do not install it. Try again, or use --from-source."
        )
    return archive


def digest_of_patches() -> str:
    """What tells this script's patches from those of an earlier one."""
    return hashlib.sha256(repr((PATCHES, STUB)).encode()).hexdigest()[:16]


def patch(root: Path) -> None:
    """Applies ``PATCHES`` and adds the stub of the extension.

    Args:
        root: the unpacked source distribution.

    Raises:
        InstallError: a pattern does not occur.
    """
    for files, pattern, replacement in PATCHES:
        count = 0
        for path in root.glob(files):
            text, n = re.subn(pattern, replacement, path.read_text())
            if n:
                path.write_text(text)
            count += n
        if not count:
            raise InstallError(f"{pattern!r} is not in {files}: this is not Detectron2 v0.6. Use --from-source.")
    (root / "detectron2" / "_C.py").write_text(f'{STUB}\n\nPATCHES = "{digest_of_patches()}"\n')


def build_wheel(folder: Path) -> Path:
    """Writes the pure-Python wheel into ``folder`` and returns its path."""
    check_build_environment()
    with tempfile.TemporaryDirectory() as tmp:
        archive = download(Path(tmp))
        with tarfile.open(archive) as tar:
            # early patch releases of Python 3.10 have no filters; the checksum vouches for the archive
            tar.extractall(tmp, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        source = Path(tmp) / archive.name.removesuffix(".tar.gz")
        patch(source)
        folder.mkdir(parents=True, exist_ok=True)
        pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
    return next(folder.glob("detectron2-0.6-*.whl"))


def is_installed() -> bool:
    """Whether ``import detectron2`` works in a fresh process of this interpreter."""
    # a part of it: the folder of a clone in the current one would be importable by its name
    return subprocess.run([sys.executable, "-c", "import detectron2.config"], capture_output=True).returncode == 0


def is_outdated() -> bool:
    """Whether what is installed is this script's build with other patches."""
    code = "import detectron2._C as c; print(vars(c).get('PATCHES') if c.__file__.endswith('_C.py') else 'compiled')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return result.returncode == 0 and result.stdout.split()[-1] not in ("compiled", digest_of_patches())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--wheel", metavar="DIR", type=Path, help="write the wheel there instead of installing it")
    group.add_argument("--from-source", action="store_true", help="compile and install the official main branch")
    parser.add_argument("-c", "--constraint", help="a constraints file for what Detectron2 depends on")
    args = parser.parse_args()
    constraint = ["-c", args.constraint] if args.constraint else []

    if args.wheel:
        print(build_wheel(args.wheel))
        return
    renew = []
    if is_installed():
        if args.from_source or not is_outdated():
            print("detectron2 can be imported already: left alone.")
            return
        print("detectron2 was installed by an earlier form of this script: replaced.")
        renew = ["--force-reinstall", "--no-deps"]
    if args.from_source:
        check_build_environment()
        pip("install", "-q", "--no-build-isolation", *constraint, UPSTREAM)
    else:
        with tempfile.TemporaryDirectory() as tmp:
            try:
                pip("install", "-q", *renew, *constraint, str(build_wheel(Path(tmp))))
            except InstallError as error:
                if not renew or not is_installed():
                    raise
                print(f"It could not be replaced, so the earlier one stays. {error}")
                return
    if not is_installed():
        raise InstallError("detectron2 is installed, but `import detectron2` fails: run it to see why.")
    print("detectron2 is installed.")


if __name__ == "__main__":
    try:
        main()
    except InstallError as error:
        sys.exit(f"error: {error}")

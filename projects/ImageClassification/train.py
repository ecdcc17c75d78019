#!/usr/bin/env python3
r"""Trains a classifier of timm, alone or taught by another, on Detectron2's engine.

    python projects/ImageClassification/train.py --data digits --student resnet18 --output output/teacher
    python projects/ImageClassification/train.py --data digits --student test_resnet --teacher resnet18 \
        --teacher-weights output/teacher/model_final.pth --methods review kd --output output/student
"""

import argparse
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import SimpleTrainer, hooks
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, JSONWriter
from detectron2.utils.logger import setup_logger

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distill.errors import DistillError
from projects.ImageClassification.data import load_data
from projects.ImageClassification.modeling import METHODS, Classifier, DistilledClassifier


class TopKEvaluator(DatasetEvaluator):
    """The share of images whose class is the first, or among the first five.

    Args:
        num_classes: with five or fewer, top-5 says nothing and is left out.
    """

    def __init__(self, num_classes: int) -> None:
        self.ks = [k for k in (1, 5) if k == 1 or num_classes > 5]

    def reset(self) -> None:
        self.found: list[list[bool]] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for x, y in zip(inputs, outputs, strict=True):
            first = y["scores"].topk(max(self.ks)).indices.tolist()
            self.found.append([x["label"] in first[:k] for k in self.ks])

    def evaluate(self) -> OrderedDict:
        found = [row for rows in comm.all_gather(self.found) for row in rows]
        shares = [100 * sum(column) / len(found) for column in zip(*found)]
        return OrderedDict(classification={f"top{k}": share for k, share in zip(self.ks, shares)})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--data", required=True, help="digits, cifar100:ROOT or folder:ROOT")
    result.add_argument("--student", required=True, metavar="NAME", help="timm's name")
    result.add_argument("--pretrained", action="store_true", help="the student starts from timm's weights")
    result.add_argument("--teacher", metavar="NAME", help="timm's name")
    result.add_argument("--teacher-weights", default="", metavar="FILE", help="empty: timm's own")
    result.add_argument("--methods", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(METHODS)}")
    result.add_argument("--review-weight", type=float, default=1.0, help="published: 1 on ImageNet, 5 on CIFAR-100")
    result.add_argument("--kd-weight", type=float, default=1.0)
    result.add_argument("--dkd-weight", type=float, default=1.0)
    result.add_argument("--temperature", type=float, default=4.0, help="of kd and dkd")
    result.add_argument("--warmup", type=int, default=0, help="iterations over which review's weight grows")
    result.add_argument("--image-size", type=int, default=224, help="of a folder's images")
    result.add_argument("--iterations", type=int, default=600)
    result.add_argument("--batch-size", type=int, default=64)
    result.add_argument("--lr", type=float, default=0.05)
    result.add_argument("--weight-decay", type=float, default=5e-4)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--workers", type=int, default=0)
    result.add_argument("--output", required=True, metavar="FOLDER")
    return result


def build(args: argparse.Namespace, num_classes: int) -> DistilledClassifier:
    """The model of a command.

    Args:
        args: the parsed command line.
        num_classes: of the data.

    Raises:
        DistillError: see :mod:`modeling`.
    """
    student = Classifier(args.student, num_classes, args.pretrained)
    teacher = None
    if args.teacher:
        with torch.random.fork_rng(devices=[]):  # so that the student's training draws what it draws alone
            teacher = Classifier(args.teacher, num_classes, not args.teacher_weights, args.teacher_weights)
    weights = {"review": args.review_weight, "kd": args.kd_weight, "dkd": args.dkd_weight}
    with torch.random.fork_rng(devices=[]):
        return DistilledClassifier(student, teacher, args.methods, weights, args.temperature, warmup_iters=args.warmup)


def main(args: argparse.Namespace) -> dict:
    """Trains and evaluates.

    Args:
        args: the parsed command line.

    Returns:
        Top-1 and top-5, in percent.

    Raises:
        DistillError: bad input.
    """
    setup_logger(args.output, name="distill")
    setup_logger(args.output, name="detectron2")
    seed_all_rng(args.seed)
    train, test = (load_data(args.data, part, args.image_size) for part in (True, False))
    if list(train.classes) != list(test.classes):
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise DistillError(f"{args.data} has other classes to train on than to test on: {', '.join(differing[:10])}.")
    model = build(args, len(train.classes)).to("cuda" if torch.cuda.is_available() else "cpu")
    loader = torch.utils.data.DataLoader(
        train,
        args.batch_size,
        sampler=TrainingSampler(len(train), seed=args.seed),
        collate_fn=list,
        num_workers=args.workers,
        drop_last=True,
    )
    test_loader = torch.utils.data.DataLoader(test, 100, collate_fn=list, num_workers=args.workers)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations)
    trainer = SimpleTrainer(model.train(), loader, optimizer)
    checkpointer = DetectionCheckpointer(model.student, args.output)  # what a teacher is loaded from
    results = {}

    def evaluate() -> dict:
        results.update(inference_on_dataset(model, test_loader, TopKEvaluator(len(test.classes))))
        return results

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, schedule),
            hooks.EvalHook(0, evaluate),
            hooks.PeriodicCheckpointer(checkpointer, args.iterations),
            hooks.PeriodicWriter(
                [CommonMetricPrinter(args.iterations), JSONWriter(f"{args.output}/metrics.json")], period=20
            ),
        ]
    )
    trainer.train(0, args.iterations)
    print_csv_format(results)
    return results["classification"]


if __name__ == "__main__":
    try:
        main(parser().parse_args())
    except DistillError as error:
        sys.exit(f"error: {error}")

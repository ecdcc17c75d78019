"""The check of a file: what counts as a difference, and what it catches."""

import math

import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torchvision.ops import boxes as box_ops

from distill.errors import DistillError
from distill.export import (
    DeployedDetector,
    compare,
    compare_on,
    eager_detector,
    evaluate_both,
    load_deployed,
    nms_of_files,
    output_names,
)
from distill.export.check import _cut_offs
from distill.export.tracing import write_torchscript
from tests.export.test_files import box_predictors, describe_file, finding_detector, image_of


def detections(boxes, scores, classes, masks=None):
    found = Instances((100, 100), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4)))
    found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes, dtype=torch.int64)
    if masks is not None:
        found.pred_masks = torch.tensor(masks).view(-1, 1, 2, 2)
    return found


BOXES = [[0, 0, 50, 20], [10, 10, 20, 20], [10, 10, 20, 20]]
PLAIN = detections(BOXES, [0.9, 0.5, 0.2], [0, 1, 2])


def test_order_does_not_count():
    assert compare(PLAIN, PLAIN[torch.tensor([2, 0, 1])]).largest == 0
    assert compare(PLAIN, PLAIN).detections == 3


def test_a_coordinate_counts_in_shares_of_the_longer_side():
    moved = detections([[0, 0, 50, 20.5], *BOXES[1:]], [0.9, 0.5, 0.2], [0, 1, 2])
    assert compare(PLAIN, moved).box == pytest.approx(0.5 / 50)
    sliver = detections([[0, 0, 0.1, 0.1]], [0.9], [0])
    moved = detections([[0, 0, 0.1, 0.2]], [0.9], [0])
    assert compare(sliver, moved).box == pytest.approx(0.1)


def test_scores_classes_and_masks_count():
    rescored = detections(BOXES, [0.9, 0.5, 0.25], [0, 1, 2])
    assert compare(PLAIN, rescored).score == pytest.approx(0.05)
    swapped = detections(BOXES, [0.9, 0.5, 0.2], [0, 2, 2])
    assert compare(PLAIN, swapped).score == pytest.approx(0.5)
    first, second = (detections(BOXES[:1], [0.9], [0], [0.1, 0.2, 0.3, last]) for last in (0.4, 0.6))
    assert compare(first, second).mask == pytest.approx(0.2)


@pytest.mark.parametrize("turn", [False, True])
def test_a_missing_detection_counts_by_its_score_above_what_left_it_out(turn):
    def largest(a, b, **cut):
        return compare(*((b, a) if turn else (a, b)), **cut).largest

    assert largest(PLAIN, PLAIN[:1]) == pytest.approx(0.5)
    assert largest(PLAIN, PLAIN[:2], threshold=0.1999) == pytest.approx(1e-4, rel=1e-2)
    assert largest(PLAIN, PLAIN[:0]) == pytest.approx(0.9)
    # each side has kept another one of two at the end of a full list
    ours, theirs = (detections([*BOXES[:2], last], [0.9, 0.5, 0.2], [0, 1, 1]) for last in ([0] * 4, [60] * 4))
    theirs.pred_classes[2] = 2
    assert largest(ours, theirs, limit=3) == pytest.approx(0.0)
    assert largest(ours, theirs, limit=4) == pytest.approx(0.2)
    assert compare(PLAIN[:0], PLAIN[:0]).largest == 0


def test_not_a_number_is_a_difference():
    for broken in (detections([[math.nan] * 4, *BOXES[1:]], [0.9, 0.5, 0.2], [0, 1, 2]),):
        assert compare(PLAIN, broken).largest > 0.5
    broken = detections(BOXES, [math.nan, 0.5, 0.2], [0, 1, 2])
    assert compare(PLAIN, broken).largest == math.inf
    first, second = (detections(BOXES[:1], [0.9], [0], [0.1, 0.2, 0.3, last]) for last in (0.4, math.nan))
    assert compare(first, second).mask == math.inf


@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_rcnn", "retinanet"])
@pytest.mark.parametrize("part", ["backbone", "bbox", "threshold"])
def test_a_file_of_another_detector_is_caught(tmp_path, kind, part):
    model = finding_detector(kind)
    image = image_of(64, 96)
    metadata = describe_file(output_names(model, image))
    write_torchscript(model, image, tmp_path / "model.ts", metadata)
    detector = load_deployed(tmp_path / "model.ts")
    images = [image, image_of(80, 64)]
    right = compare_on(eager_detector(model, metadata), detector, model, images)
    assert right.largest == 0 and right.detections > 5

    if part == "threshold":
        (model if kind == "retinanet" else box_predictors(model)[-1]).test_score_thresh = 0.0
    else:
        word = {"backbone": "fpn_lateral3.weight", "bbox": "bbox_pred"}[part]
        changed = [p for name, p in model.named_parameters() if word in name]
        for weight in changed:
            weight += 0.01 * weight.std().nan_to_num(nan=1.0)
        assert changed
    assert compare_on(eager_detector(model, metadata), detector, model, images).largest > 1e-3


class Results:
    """A recipe whose evaluations are given."""

    def __init__(self, *results):
        self.results = list(results)

    def evaluate(self, model, mapper, folder):
        return self.results.pop(0)


def test_ap_differs_by_a_tenth_at_most():
    boxes = {"AP": 30.0, "AP50": 50.0, "AP-cat": 3.0}
    near = {"bbox": {**boxes, "AP": 30.09, "AP-cat": 5.0}, "segm": {"AP": math.nan}}
    recipe = Results({"bbox": boxes, "segm": {"AP": math.nan}}, near)
    both = evaluate_both(recipe, None, None)
    assert both["bbox/AP"] == (30.0, 30.09) and list(both) == ["bbox/AP", "segm/AP"]
    for result in ({"bbox": {"AP": 30.2}}, {"bbox": {"AP": math.nan}}, {}):
        with pytest.raises(DistillError, match=r"bbox/AP .* \(in PyTorch 30.00\): bbox/AP differs by more than 0.1"):
            evaluate_both(Results({"bbox": boxes}, result), None, None)
    several = ({"first": {"bbox": boxes}, "second": {"bbox": {"AP": ap}}} for ap in (10.0, 20.0))
    with pytest.raises(DistillError, match=": second/bbox/AP differs"):
        evaluate_both(Results(*several), None, None)
    with pytest.raises(DistillError, match="gave no AP"):
        evaluate_both(Results({}, {}), None, None)


def test_a_file_that_does_not_run_on_another_size():
    model = finding_detector("retinanet")
    metadata = describe_file(["pred_boxes", "pred_classes", "scores"])

    def only_one_size(image):
        raise RuntimeError("Got invalid dimensions\nfor input")

    reference, broken = eager_detector(model, metadata), type(eager_detector(model, metadata))(only_one_size, metadata)
    with pytest.raises(DistillError, match="run on an image of 64x48 pixels: Got invalid dimensions .*--size HEIGHT"):
        compare_on(reference, broken, model, [image_of(64, 48)])


@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_rcnn"])
def test_a_negative_limit_is_none(kind):
    model = finding_detector(kind)
    for predictor in box_predictors(model):
        predictor.test_topk_per_image = -1
    assert _cut_offs(model)[1] == math.inf
    assert compare(PLAIN, PLAIN[:0], *_cut_offs(model)).score > 0.5


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_student_is_run_with_the_nms_of_files():
    """Of many boxes and classes, torchvision's own is exact, and what it traces is not."""
    corners = torch.stack([torch.arange(600) % 25, torch.arange(600) // 25], 1) * 40 + torch.rand(600, 2)
    first = torch.cat([corners, corners + 10], 1)
    boxes = torch.cat([first, first + torch.tensor([3.333, 0, 3.333, 0])])  # pairs with an IoU of 0.50004
    scores, classes = torch.rand(1200), torch.full((1200,), 1202)
    traced = torch.jit.trace(lambda *x: batched_nms(*x, 0.5), (boxes, scores, classes), check_trace=False)
    assert len(batched_nms(boxes, scores, classes, 0.5)) == 600
    with nms_of_files():
        own = batched_nms(boxes, scores, classes, 0.5)
        assert batched_nms(boxes[:0], scores[:0], classes[:0], 0.5).shape == (0,)
    assert torch.equal(own, traced(boxes, scores, classes)) and len(own) > 650
    assert len(batched_nms(boxes, scores, classes, 0.5)) == 600  # as before


def test_only_the_students_side_of_a_comparison_has_that_nms():
    seen = []

    def run(image):
        seen.append(box_ops.batched_nms)
        return torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([0]), torch.tensor([0.9])

    metadata = describe_file(["pred_boxes", "pred_classes", "scores"])
    student, file = (DeployedDetector(run, metadata, is_file) for is_file in (False, True))
    compare_on(student, file, torch.nn.Identity(), [image_of(32, 32)])
    assert [nms is box_ops.batched_nms for nms in seen] == [True, False]  # the file is run first

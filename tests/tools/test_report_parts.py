"""What the report is made of, part by part."""

import math
import re

import numpy as np
from detectron2.structures import BoxMode


def literal_differences(first, second):
    """Boxes without a counterpart, counted one by one."""

    def iou(a, b):
        w = min(a[2], b[2]) - max(a[0], b[0])
        h = min(a[3], b[3]) - max(a[1], b[1])
        common = max(w, 0) * max(h, 0)
        return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)

    left = list(range(len(second.classes)))
    alone = 0
    for i in np.argsort(-np.asarray(first.scores), kind="stable"):
        best, at = 0.5, None
        for j in left:
            if first.classes[i] == second.classes[j] and iou(first.boxes[i], second.boxes[j]) >= best:
                best, at = iou(first.boxes[i], second.boxes[j]), j
        if at is None:
            alone += 1
        else:
            left.remove(at)
    return alone + len(left)


def test_images_are_chosen_as_a_literal_count_says(tools):
    pictures = tools["pictures"]
    generator = np.random.default_rng(0)

    def some():
        number = generator.integers(0, 6)
        corners = generator.integers(0, 4, (number, 2)) * 5.0 + generator.random((number, 2))
        classes = generator.integers(0, 2, number).tolist()
        return pictures.Found(np.concatenate([corners, corners + 20], 1), classes, generator.random(number).tolist())

    firsts, seconds = [[some() for _ in range(60)] for _ in range(2)]
    counts = [literal_differences(a, b) for a, b in zip(firsts, seconds)]
    assert [pictures.count_differences(a, b) for a, b in zip(firsts, seconds)] == counts
    assert 0 in counts and len({*counts}) > 4
    chosen = pictures.choose(firsts, seconds, 12)
    expected = sorted(range(60), key=lambda i: (-counts[i], i))[:12]
    assert chosen == expected
    assert len(pictures.choose(firsts, seconds, 60)) == 60 - counts.count(0)


def test_a_box_takes_the_free_one_of_its_class_that_overlaps_most(tools):
    pictures = tools["pictures"]
    first = pictures.Found(np.array([[0, 0, 10, 10], [0, 0, 10, 9.0]]), [1, 1], [0.5, 0.9])
    second = pictures.Found(np.array([[0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 9.0]]), [1, 1, 0])
    assert pictures.match(first, second) == {1: 0, 0: 1}  # the surer one first: IoU 0.9 and 0.89


def test_detections_that_no_metric_counts_are_left_out(tools):
    pictures = tools["pictures"]
    objects = {
        "true": ([0, 0, 10, 10], 0, {}),
        "difficult": ([20, 0, 30, 10], 0, {"difficult": 1}),
        "crowd": ([40, 0, 80, 40], 1, {"iscrowd": 1}),
    }
    record = {
        "annotations": [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": number, **more}
            for box, number, more in objects.values()
        ]
    }
    boxes = [[0, 0, 10, 10], [20, 0, 30, 9], [20, 0, 30, 9], [45, 5, 50, 10], [38, 0, 41, 3], [60, 60, 70, 70]]
    classes, scores = [0, 0, 1, 1, 1, 0], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    found = pictures.Found(np.array(boxes, dtype=float), classes, scores)
    truth = pictures.Found(*pictures.true_boxes(record))
    kept = pictures.without_ignored(found, truth, record)
    assert kept.scores == [0.9, 0.7, 0.5, 0.4] and kept.classes == [0, 1, 1, 0]  # neither its class, nor within
    assert kept.boxes.tolist() == [boxes[i] for i in (0, 2, 4, 5)]
    record["annotations"].append({**record["annotations"][0], "difficult": 1})  # on the one that is looked for
    assert pictures.without_ignored(found, truth, record).scores == kept.scores


def test_records_of_several_runs_in_one_file(tools):
    merge, parse = tools["reading"].merge_records, tools["reading"].parse_scores
    records = [{"iteration": i, "total_loss": float(i)} for i in (19, 39, 59)]
    later = [{"iteration": 39, "total_loss": -1.0}, {"iteration": 20, "gradient_ratio/X": 2.0}]
    merged = merge([*records, {"iteration": 20, "gradient_ratio/X": 1.0}, {"iteration": 60, "bbox/AP": 9.0}, *later])
    assert merged == {19: records[0], 20: later[1], 39: later[0]}
    found = parse({"a/bbox/AP-x/bbox/AP": 1.0, "a/segm/AP": 2.0, "lr": 3.0}, ["a", "b"])
    assert found == {("a", "bbox", "AP-x/bbox/AP"): 1.0, ("a", "segm", "AP"): 2.0}
    assert parse({"bbox/AP-x/bbox/AP": 1}, ["a"]) == {("a", "bbox", "AP-x/bbox/AP"): 1.0}


def test_a_curve_has_a_gap_where_a_loss_is_not_finite(tools):
    curves = tools["curves"]
    values = [1.0, 2.0, math.nan, 3.0, 4.0]
    chart = curves.draw_chart("t", "c", [curves.Line("<b>", list(enumerate(values)), 0)])
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--c0\)', chart.svg)
    assert path.count("M") == 2 and path.count("L") == 2
    assert curves.draw_chart("t", "c", [curves.Line("x", [(0, math.nan)], 0)]) is None

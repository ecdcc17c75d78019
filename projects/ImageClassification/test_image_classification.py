"""The project: its losses, what is frozen, its data, and both stages on the digits."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from distill.distillers.review import ReviewModule
from distill.errors import DistillError
from distill.losses import decoupled_divergence, hierarchical_context_loss, soft_label_divergence
from projects.ImageClassification.data import load_data
from projects.ImageClassification.modeling import Classifier, DistilledClassifier
from projects.ImageClassification.train import TopKEvaluator, main, parser


def random_batch(number=4, size=64):
    return [{"image": torch.randn(3, size, size), "label": int(torch.randint(7, ()))} for _ in range(number)]


@pytest.mark.parametrize("student, teacher", [("resnet10t", "resnet18"), ("mobilenetv2_050", "resnet10t")])
def test_a_step_is_its_formulas_and_gives_every_weight_a_gradient(student, teacher):
    teacher = Classifier(teacher, 7)
    weights = {"review": 2.0, "kd": 3.0, "dkd": 0.5}
    model = DistilledClassifier(
        Classifier(student, 7), teacher, ["review", "kd", "dkd"], weights, warmup_iters=4
    ).train()
    assert isinstance(model.review, ReviewModule) and not any("teacher" in key for key in model.state_dict())
    batch = random_batch()
    assert model(batch)["loss_review"] == 0  # of the first of four iterations
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    losses = model(batch)
    images, labels = torch.stack([x["image"] for x in batch]), torch.tensor([x["label"] for x in batch])
    logits, stages = model.student(images)  # in training: norms do not depend on running statistics
    with torch.no_grad():
        target, target_stages = teacher(images)
    expected = {
        "loss_class": torch.nn.functional.cross_entropy(logits, labels),
        "loss_review": 2.0 / 4 * hierarchical_context_loss(model.review(stages), target_stages),
        "loss_kd": 3.0 * soft_label_divergence(logits, target, 4.0).mean(),
        "loss_dkd": 0.5 * decoupled_divergence(logits, target, labels, 1.0, 8.0, 4.0).mean(),
    }
    assert losses.keys() == expected.keys()
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key], rtol=1e-4, atol=1e-5)
    sum(losses.values()).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None]
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_the_logits_are_those_of_timm():
    model = Classifier("resnet10t", 7).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images)[0], model.network(images))
    scores = DistilledClassifier(model).eval()([{"image": x} for x in images])
    torch.testing.assert_close(torch.stack([x["scores"] for x in scores]), model.network(images).softmax(1))


def test_top_k():
    evaluator = TopKEvaluator(7)
    evaluator.reset()
    scores = torch.eye(7)[:4] + torch.arange(7, 0, -1) * 0.01
    evaluator.process([{"label": x} for x in (0, 3, 6, 2)], [{"scores": x} for x in scores])
    assert evaluator.evaluate()["classification"] == {"top1": 25.0, "top5": 75.0}
    assert TopKEvaluator(5).ks == [1]


def test_a_folder_of_images_a_class(tmp_path):
    for part, number in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(number):
                pixels = np.random.default_rng().integers(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    train, test = (load_data(f"folder:{tmp_path}", part, 32) for part in (True, False))
    assert (len(train), len(test), train.classes) == (6, 4, ["cat", "dog"])
    assert train[5]["image"].shape == test[3]["image"].shape == (3, 32, 32) and test[3]["label"] == 1
    shutil.rmtree(tmp_path / "val" / "cat")
    arguments = ["--data", f"folder:{tmp_path}", "--student", "test_resnet", "--output", str(tmp_path / "out")]
    with pytest.raises(DistillError, match="has other classes to train on than to test on: cat"):
        main(parser().parse_args(arguments))


def test_the_digits_are_split():
    train, test = load_data("digits", True), load_data("digits", False)
    assert len(train) + len(test) == 1797 and len(train.classes) == 10
    assert train[0]["image"].shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["mnist", "folder", "cifar100:nowhere", "folder:nowhere"])
def test_data_that_is_not_there_is_refused(name):
    with pytest.raises(DistillError, match="unknown: expected digits|holds no"):
        load_data(name, True)


def test_trains_a_teacher_and_a_student_of_it(tmp_path):
    def run(*args):
        common = ["--data", "digits", "--iterations", "4", "--batch-size", "16"]
        return main(parser().parse_args([*common, *args]))

    result = run("--student", "resnet10t", "--output", str(tmp_path / "teacher"))
    assert result.keys() == {"top1", "top5"}
    weights = str(tmp_path / "teacher" / "model_final.pth")
    taught = ["--teacher", "resnet10t", "--teacher-weights", weights, "--methods", "review", "kd"]
    run("--student", "test_resnet", *taught, "--output", str(tmp_path / "student"))
    log = (tmp_path / "student" / "metrics.json").read_text()
    assert "loss_review" in log and "loss_kd" in log
    with pytest.raises(DistillError, match="does not fit resnet18 with 10 classes"):
        run("--student", "test_resnet", "--teacher", "resnet18", *taught[2:], "--output", str(tmp_path / "other"))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Classifier("resnet", 7), "timm has no network 'resnet'"),
        (lambda: DistilledClassifier(Classifier("test_resnet", 7), None, ["kd"]), "kd needs a teacher"),
        (lambda: DistilledClassifier(Classifier("test_resnet", 7), None, ["fgd"]), "'fgd' is unknown"),
    ],
)
def test_bad_input_is_refused(build, message):
    with pytest.raises(DistillError, match=message):
        build()


def test_weights_that_are_none_and_stages_that_differ_are_refused(tmp_path):
    with pytest.raises(DistillError, match="Cannot read the weights .*nowhere.pth"):
        Classifier("test_resnet", 7, weights=str(tmp_path / "nowhere.pth"))
    torch.save(Classifier("test_resnet", 7).network.state_dict(), tmp_path / "timm.pth")
    with pytest.raises(DistillError, match="timm.pth.*expected a checkpoint of train.py"):
        Classifier("test_resnet", 7, weights=str(tmp_path / "timm.pth"))
    model = DistilledClassifier(Classifier("test_vit", 7), Classifier("test_resnet", 7), ["review"]).train()
    with pytest.raises(DistillError, match="test_vit has .*, test_resnet "):
        model(random_batch(size=160))

"""Ramps, measured gradients and the balance, on features that are leaves."""

import itertools
import logging
import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from distill.distillers import Distiller
from distill.errors import DistillError
from distill.modeling.loss_weights import LossWeights


@pytest.mark.parametrize(
    "settings, iteration, expected",
    [
        ({}, 0, 3.0),
        ({}, 99, 3.0),
        ({"warmup_iters": 20}, 0, 0.0),
        ({"warmup_iters": 20}, 5, 0.75),
        ({"warmup_iters": 20}, 20, 3.0),
        ({"decay": 1.0}, 0, 3.0),
        ({"decay": 1.0}, 75, 0.75),
        ({"decay": 0.25}, 75, 3.0),
        ({"decay": 0.25}, 95, 0.6),
        ({"decay": 0.25}, 100, 0.0),
        ({"warmup_iters": 50, "decay": 1.0}, 25, 1.125),
    ],
)
def test_weight_ramps_up_and_decays_linearly(settings, iteration, expected):
    assert Distiller(loss_weight=3.0, **settings).weight_at(iteration, 100) == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings, message", [({"warmup_iters": -1}, "WARMUP_ITERS is -1"), ({"decay": 2}, "DECAY is 2")]
)
def test_ramps_out_of_range_are_refused(settings, message):
    with pytest.raises(DistillError, match=message):
        Distiller(**settings)


def make(*names, loss_weight=1.0, **settings):
    """Distillers and their weights; detection losses and distillers' losses are made by ``step``."""
    distillers = nn.ModuleDict({name: Distiller(loss_weight=loss_weight) for name in names})
    return distillers, LossWeights(distillers, max_iter=1000, **settings)


def test_a_step_of_several_batches_is_measured_once():
    distillers, loss_weights = make("A", period=2, balance=0.5)
    for iteration, expected in ((0, 1), (1, 1), (2, 2)):
        with EventStorage(iteration):
            for _ in range(3):
                x = torch.randn(3, requires_grad=True)
                loss_weights({"loss": x.square().sum()}, {"A": {"loss_a": x.sum()}}, {"p2": x})
        assert distillers["A"].num_measurements == expected


def test_what_the_first_batches_do_not_have_is_measured_in_the_first_that_does():
    distillers, loss_weights = make("A", "B", period=50, balance=1.0)
    for iteration in range(6):
        with EventStorage(iteration):
            for _ in range(2):
                x = torch.randn(3, requires_grad=True)
                scale = float(iteration >= 3)  # as where the others show no object
                losses = {"A": {"loss_a": x.sum()}, "B": {"loss_b": scale * x.sum()}}
                weights = loss_weights({"loss": x.square().sum()}, losses, {"p2": x})
                assert (weights["B"]["loss_b"] > 0) == (iteration >= 3) and weights["A"]["loss_a"] > 0
    assert [distillers[name].num_measurements for name in "AB"] == [1, 1]  # each once


def test_a_loss_may_be_left_out_of_the_decay():
    distillers, loss_weights = make("A", "A/x")
    for distiller in distillers.values():
        distiller.decay, distiller.undecayed = 1.0, ["loss_b"]
    x = torch.randn(3, requires_grad=True)
    losses = {"A": {"loss_a": x.sum(), "loss_b": x.sum()}, "A/x": {"loss_a_x": x.sum(), "loss_b_x": x.sum()}}
    with EventStorage(750):
        weights = loss_weights({"loss": x.sum()}, losses, {"p2": x})
    assert weights == {"A": {"loss_a": 0.25, "loss_b": 1.0}, "A/x": {"loss_a_x": 0.25, "loss_b_x": 1.0}}


def step(loss_weights, distilled, iteration=0, dtype=torch.float32, size=1.0):
    """Weighs losses that are linear in random features; returns the weights and the expected ratios."""
    features = {"p2": torch.randn(2, 3, 8, 8, dtype=dtype), "p3": torch.randn(2, 3, 4, 4, dtype=dtype)}
    for level in features.values():
        level.requires_grad_()
    slopes = {level: torch.randn(x.shape, dtype=torch.float64) for level, x in features.items()}

    def loss(scale, levels=("p2", "p3")):
        return sum((features[k].double() * slopes[k]).sum() * scale for k in levels)

    detection = {"loss_cls": loss(size), "loss_box": loss(size, ["p3"])}
    losses = {name: {"loss_a": loss(scale), "loss_b": loss(scale, ["p2"])} for name, scale in distilled.items()}
    norms = {level: slope.square().sum().item() for level, slope in slopes.items()}
    own = math.sqrt(norms["p2"] + 4 * norms["p3"])  # p3's slope counts twice
    other = math.sqrt(4 * norms["p2"] + norms["p3"])
    with EventStorage(iteration) as storage:
        weights = loss_weights(detection, losses, features)
    assert all(set(weights[name]) == {"loss_a", "loss_b"} for name in distilled)
    weights = {name: own["loss_a"] for name, own in weights.items()}
    ratios = {name: scale * other / (size * own) for name, scale in distilled.items()}
    return weights, ratios, {key: value for key, (value, _) in storage.latest().items()}


def test_measured_ratios_are_those_of_the_gradients_at_the_features():
    distillers, loss_weights = make("A", "B", loss_weight=0.5, period=10)
    weights, ratios, logged = step(loss_weights, {"A": 3.0, "B": 0.1})
    assert weights == {"A": 0.5, "B": 0.5} and logged["weight/loss_a"] == 0.5
    for name in ("A", "B"):
        assert logged[f"gradient_ratio/{name}"] == pytest.approx(0.5 * ratios[name], rel=1e-5)
        assert distillers[name].num_measurements == 1
        assert math.exp(distillers[name].log_gradient_ratio) == pytest.approx(ratios[name], rel=1e-5)


def test_gradients_are_measured_every_period_only(monkeypatch):
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append(1) or grad(*args, **kwargs))
    _, loss_weights = make("A", "B", period=4)
    step(loss_weights, {"A": 1.0, "B": 1.0}, 99)  # the first call checks each loss
    counts = []
    for iteration in range(9):
        calls.clear()
        step(loss_weights, {"A": 1.0, "B": 1.0}, iteration)
        counts.append(len(calls))
    assert counts == [3, 0, 0, 0, 3, 0, 0, 0, 3]
    with torch.no_grad():
        calls.clear()
        step(loss_weights, {"A": 1.0, "B": 1.0}, 12)
    assert not calls


def test_balance_makes_the_ratio_what_is_asked_for_before_the_own_weight():
    _, loss_weights = make("A", "B", loss_weight=0.5, period=10, balance=0.3)
    weights, ratios, logged = step(loss_weights, {"A": 7.0, "B": 0.01})
    for name in ("A", "B"):
        assert weights[name] * ratios[name] == pytest.approx(0.3 * 0.5, rel=1e-5)
        assert logged[f"gradient_ratio/{name}"] == pytest.approx(0.3 * 0.5, rel=1e-5)
    between, _, _ = step(loss_weights, {"A": 1.0, "B": 1.0}, 5)
    assert between == weights


def test_the_scale_follows_a_loss_that_is_multiplied_by_100():
    _, loss_weights = make("A", period=1, balance=1.0)
    before = [step(loss_weights, {"A": 1.0}, i)[0]["A"] for i in range(40)][-1]
    after = [step(loss_weights, {"A": 100.0}, i)[0]["A"] for i in range(40, 140)]
    assert before / after[0] < 2  # one measurement does not make it jump
    assert all(later < earlier * 1.2 for earlier, later in itertools.pairwise(after))
    assert before / after[-1] == pytest.approx(100, rel=0.15)
    back = [step(loss_weights, {"A": 1.0}, i)[0]["A"] for i in range(140, 240)][-1]
    assert back / before == pytest.approx(1, rel=0.15)


def test_the_first_measurements_count_alike():
    distillers, loss_weights = make("A", period=1, balance=1.0)
    ratios = [step(loss_weights, {"A": scale}, i)[1]["A"] for i, scale in enumerate((1.0, 10.0, 100.0))]
    assert distillers["A"].num_measurements == 3
    assert distillers["A"].log_gradient_ratio.item() == pytest.approx(sum(map(math.log, ratios)) / 3, rel=1e-4)


def test_the_balance_goes_on_from_a_checkpoint():
    distillers, loss_weights = make("A", period=10, balance=0.3)
    weights, _, _ = step(loss_weights, {"A": 5.0})
    others, resumed = make("A", period=10, balance=0.3)
    others.load_state_dict(distillers.state_dict())
    assert step(resumed, {"A": 5.0}, 7)[0] == weights
    # a checkpoint without it: measured at once, whatever the iteration
    _, fresh = make("A", period=10, balance=0.3)
    weights, ratios, _ = step(fresh, {"A": 5.0}, 7)
    assert weights["A"] * ratios["A"] == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("size", [1e-9, 1.0, 300.0])
def test_float16_gradients_neither_vanish_nor_overflow(size):
    distillers, loss_weights = make("A", period=1)
    _, ratios, _ = step(loss_weights, {"A": 2 * size}, dtype=torch.float16, size=size)
    rel = 1e-2 if size >= 1e-6 else 0.5  # float16 has few bits down there, but it is not zero
    assert math.exp(distillers["A"].log_gradient_ratio.item()) == pytest.approx(ratios["A"], rel=rel)


def test_float32_features_in_front_of_float16_layers_are_measured_alike():
    # as with group norm in the FPN, which autocast keeps in float32, and heads in float16
    distillers, loss_weights = make("A", period=1)
    conv, x = nn.Conv2d(8, 8, 1), torch.randn(1, 8, 32, 32, requires_grad=True)

    def losses():
        y = conv(x).float()
        return {"loss": 1e-7 * y.square().mean()}, {"A": {"loss_a": 3e-7 * y.mean()}}

    loss_weights(*losses(), {"p2": x})
    expected = distillers["A"].log_gradient_ratio.item()
    distillers["A"].reset()
    with EventStorage(1), torch.autocast("cpu", torch.float16):
        loss_weights(*losses(), {"p2": x})
    assert distillers["A"].num_measurements == 1
    assert math.exp(distillers["A"].log_gradient_ratio.item() - expected) == pytest.approx(1, rel=0.05)


def test_the_logged_ratio_is_that_of_the_weighted_losses():
    distillers, loss_weights = make("A", period=1)
    distillers["A"].decay, distillers["A"].undecayed = 1.0, ["loss_b"]
    x = torch.randn(100, requires_grad=True)
    losses = {"A": {"loss_a": 100 * x[:50].sum(), "loss_b": 2 * x[50:].sum()}}
    with EventStorage(990) as storage:
        loss_weights({"loss": x.sum()}, losses, {"p2": x})
        logged = storage.latest()["gradient_ratio/A"][0]
    assert logged == pytest.approx(math.sqrt((1**2 + 2**2) / 2), rel=1e-5)  # 100 at a weight of 0.01, and 2 at 1


def test_nothing_decays_without_a_known_end_and_no_weight_is_negative():
    distiller = Distiller(decay=0.5)
    assert distiller.weight_at(10**6, None) == 1.0
    assert distiller.weight_at(200, 100) == 0.0


def test_a_loss_without_gradient_is_not_counted():
    distillers, loss_weights = make("A", period=1, balance=1.0)
    x = torch.randn(3, requires_grad=True)
    for _ in range(2):
        weights = loss_weights({"loss": x.sum()}, {"A": {"loss_a": 0 * x.sum()}}, {"p2": x})
        assert weights == {"A": {"loss_a": 0.0}}  # no weight before the scale is known
    assert distillers["A"].num_measurements == 0


def test_a_high_ratio_for_long_is_one_warning(caplog):
    _, loss_weights = make("A", "B", period=1)
    with caplog.at_level(logging.WARNING):
        for i in range(4):
            step(loss_weights, {"A": 50.0, "B": 0.1}, i)
        assert not caplog.records
        for i in range(4, 12):
            step(loss_weights, {"A": 50.0, "B": 0.1}, i)
    (record,) = caplog.records
    assert "A's gradient at the student's features has been more than 3 times" in record.getMessage()
    assert "LOSS_WEIGHT" in record.getMessage() and "DISTILL.BALANCE" in record.getMessage()


@pytest.mark.parametrize("period", [0, 50])
def test_a_loss_that_does_not_reach_the_features_is_refused_in_the_first_step(period):
    _, loss_weights = make("A", period=period)
    x, own = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    losses = {"A": {"loss_a": x.sum(), "loss_b": own.sum()}}
    with pytest.raises(DistillError, match=r"A's loss 'loss_b' does not depend on the student's features"):
        loss_weights({"loss": x.sum()}, losses, {"p2": x})


def test_a_frozen_backbone_can_be_logged_but_not_balanced():
    x, head = torch.randn(3), torch.randn(3, requires_grad=True)
    losses = {"loss": (x * head).sum()}, {"A": {"loss_a": head.sum()}}, {"p2": x}
    _, loss_weights = make("A", period=1)
    assert loss_weights(*losses) == {"A": {"loss_a": 1.0}}
    _, loss_weights = make("A", period=1, balance=1.0)
    with pytest.raises(DistillError, match="its whole backbone is frozen. Set DISTILL.BALANCE 0"):
        loss_weights(*losses)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"balance": 1.0}, "BALANCE is 1.0, but DISTILL.GRADIENT_LOG_PERIOD is 0"),
        ({"balance": -1.0, "period": 5}, "BALANCE is -1.0: expected 0"),
        ({"period": -5}, "GRADIENT_LOG_PERIOD is -5: expected 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(DistillError, match=message):
        make("A", **settings)


def test_high_ratios_that_are_not_in_a_row_are_no_warning(caplog):
    _, loss_weights = make("A", period=1)
    for i in range(12):
        step(loss_weights, {"A": 0.1 if i % 4 == 3 else 50.0}, i)
    assert "more than 3 times" not in caplog.text


def test_an_infinite_gradient_is_not_counted():
    distillers, loss_weights = make("A", period=1, balance=1.0)
    x = torch.ones(3, requires_grad=True)
    loss_weights({"loss": x.sum()}, {"A": {"loss_a": (x * 1e30).sum() * 1e30}}, {"p2": x})
    assert distillers["A"].num_measurements == 0


def test_the_running_mean_is_the_documented_recursion():
    distillers, loss_weights = make("A", period=1, balance=1.0)
    mean = 0.0
    for i in range(25):
        _, ratios, _ = step(loss_weights, {"A": math.exp(torch.randn(()).item())}, i)
        momentum = min(0.9, i / (i + 1))
        mean = momentum * mean + (1 - momentum) * math.log(ratios["A"])
    assert distillers["A"].log_gradient_ratio.item() == pytest.approx(mean, rel=1e-4, abs=1e-4)

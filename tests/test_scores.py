"""The numbers of transfer.py: metrics, heads, which epoch counts, and results.csv."""

import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

from models.probe import linear_heads, neighbour_votes, principal_axes, probabilities
from scores import fraction_metrics, scene_metrics
from scores.results import Results

CLASSES = list("abcdefghij")


# Metrics and heads


def test_fraction_metrics():
    truth = np.array([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]])
    predicted = np.array([[0.8, 0.2, 0], [0, 0.4, 0.6], [0.5, 0.5, 0]])
    found = fraction_metrics(truth, predicted, ["x", "y", "z"])
    per_class = np.sqrt([0.04 / 3, (0.04 + 0.36) / 3, 0.36 / 3])
    assert [found["rmse", c] for c in "xyz"] == pytest.approx(per_class)
    assert per_class == pytest.approx(
        metrics.root_mean_squared_error(truth, predicted, multioutput="raw_values")
    )
    assert found["rmse", "all"] == pytest.approx(metrics.root_mean_squared_error(truth, predicted))
    assert found["rmse_pooled", "all"] == pytest.approx(np.sqrt(((truth - predicted) ** 2).mean()))
    assert found["rmse", "all"] < found["rmse_pooled", "all"] - 0.01  # mean of roots and root of mean differ
    assert found["mae", "all"] == pytest.approx(metrics.mean_absolute_error(truth, predicted))
    assert found["r2", "all"] == pytest.approx(metrics.r2_score(truth, predicted))


def test_scene_metrics():
    found = scene_metrics(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), ["x", "y", "z"])
    assert (
        found["f1", "x"] == pytest.approx(0.8)
        and found["f1", "y"] == pytest.approx(2 / 3)
        and found["f1", "z"] == 0
    )
    assert found["f1_macro", "all"] == pytest.approx((0.8 + 2 / 3) / 3)  # a class that never occurs counts
    assert found["f1_micro", "all"] == 0.75 and found["f1_weighted", "all"] == pytest.approx(
        0.75 * 0.8 + 0.25 * 2 / 3
    )
    truth, predicted = np.random.default_rng(0).integers(0, [[4], [5]], (2, 200))
    found = scene_metrics(truth, predicted, CLASSES)
    for average in ("micro", "macro", "weighted"):
        own = metrics.f1_score(truth, predicted, labels=range(10), average=average, zero_division=0)
        assert found[f"f1_{average}", "all"] == pytest.approx(own)
    own = metrics.f1_score(truth, predicted, labels=range(10), average=None, zero_division=0)
    assert [found["f1", c] for c in CLASSES] == pytest.approx(own)


def test_linear_heads_are_the_minima():
    torch.manual_seed(0)
    x = torch.randn(150, 12) @ torch.randn(12, 12) * 3 + 5
    labels = (x @ torch.randn(12, 4) + 4 * torch.randn(150, 4)).argmax(1)
    targets, axes = F.one_hot(labels, 4).float(), principal_axes(x)
    z = (x - x.mean(0)) / x.std(0)
    for penalty, head in linear_heads(x, targets, axes, "softmax"):
        own = (
            LogisticRegression(C=1 / penalty, max_iter=5000, tol=1e-8)
            .fit(z.numpy(), labels.numpy())
            .predict_proba(z.numpy())
        )
        assert np.abs(own - probabilities(head(x), "softmax").numpy()).max() < 0.02
    soft = torch.softmax(torch.randn(150, 4), 1)
    for penalty, head in linear_heads(x, soft, axes, "bce"):
        weight, bias = head.weight, head.bias
        w, b = (weight * x.std(0)).requires_grad_(), (bias + weight @ x.mean(0)).requires_grad_()
        loss = (
            F.binary_cross_entropy_with_logits(F.linear(z, w, b), soft) * 4 + penalty / 300 * w.square().sum()
        )
        assert max(g.abs().max() for g in torch.autograd.grad(loss, [w, b])) < 5e-3


def test_predictions_are_on_the_simplex():
    logits = 30 * torch.randn(50, 10)
    for loss in ("softmax", "bce"):
        p = probabilities(logits, loss)
        assert (p >= 0).all() and torch.allclose(p.sum(1), torch.ones(50))
    assert torch.allclose(
        probabilities(torch.tensor([[0.0, 0.0, 20]]), "bce"), torch.tensor([[0.25, 0.25, 0.5]]), atol=1e-6
    )


def test_neighbour_votes():
    bank = torch.tensor([[1.0, 0], [2, 0.1], [0, 1], [0.1, 3]])
    votes = neighbour_votes(bank, torch.eye(2)[[0, 0, 1, 1]], torch.tensor([[9.0, 1], [1, 9]]), k=2)
    assert votes.tolist() == [[2, 0], [0, 2]]


# results.csv


def test_a_claim_is_exclusive_and_ends_with_its_process(tmp_path):
    def child(name, act):
        if not (pid := os.fork()):
            with Results(tmp_path).claim(name, wait=False) as mine:
                os._exit(act(mine))
        return pid

    def answer(name):
        return os.waitstatus_to_exitcode(os.waitpid(child(name, int), 0)[1])

    with Results(tmp_path).claim("cell"):
        assert answer("cell") == 0 and answer("another cell") == 1
    assert answer("cell") == 1
    reader, writer = os.pipe()
    holder = child("cell", lambda mine: os.write(writer, b"!") and time.sleep(60) or 0)
    os.read(reader, 1)
    assert answer("cell") == 0
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert answer("cell") == 1

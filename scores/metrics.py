"""Metrics by name, and the one table of tasks: which metric decides, in which direction, and what stands
beside it."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn import metrics

ALL = "all"  # in place of a class: a number over all classes
Metrics = dict[tuple[str, str], float]  # (metric, class) -> value

LOWER_IS_BETTER = {"rmse", "rmse_pooled", "mae"}


class Task(NamedTuple):
    """Which metrics a task has, and which of them decides."""

    metric: str  # over all classes; its best value on val chooses epochs, penalties, settings and models
    sign: int  # of that metric: +1 where higher is better, -1 where lower is
    per_class: str  # its parts, one a class
    overall: tuple[str, ...]  # every metric over all classes, in the order of results.csv
    of_features: tuple[str, ...]  # and of --mode linear alone: the votes of nearest neighbours
    tabled: tuple[str, ...]  # columns of a class-wise table before the classes


TASKS = {
    "fraction": Task(
        metric="rmse",
        sign=-1,
        per_class="rmse",
        overall=("rmse", "rmse_pooled", "mae", "r2"),
        of_features=(),
        tabled=("rmse", "rmse_pooled"),
    ),
    "scene": Task(
        metric="f1_macro",
        sign=+1,
        per_class="f1",
        overall=("f1_micro", "f1_macro", "f1_weighted", "accuracy"),
        of_features=("knn_f1_macro", "knn5_accuracy"),
        tabled=("f1_micro", "f1_macro", "f1_weighted"),
    ),
}


def sign_of(metric: str) -> int:
    """+1 where a higher value of the metric is better, -1 where a lower one is."""
    return -1 if metric in LOWER_IS_BETTER else +1


def is_possible(metric: pd.Series, value: pd.Series) -> pd.Series:
    """Whether values can be of their metrics, which all end at 1 and, but for R2, begin at 0. A spreadsheet
    of another country reads 0.548441 as 548441."""
    return value.isna() | (value <= 1) & ((value >= 0) | (metric == "r2"))


def measure(task: str, truth: np.ndarray, predicted: np.ndarray, classes: list[str]) -> Metrics:
    """Of targets and predictions (n, K): fractions, or one-hot labels and probabilities."""
    if task == "fraction":
        return fraction_metrics(truth, predicted, classes)
    return scene_metrics(truth.argmax(1), predicted.argmax(1), classes)


def fraction_metrics(truth: np.ndarray, predicted: np.ndarray, classes: list[str]) -> Metrics:
    """Of fractions (n, K): RMSE of each class, their mean (`rmse`, the paper's number, section VI), RMSE
    over all entries (`rmse_pooled`), MAE, and R2 as the mean over the classes."""
    error = predicted - truth
    rmse = np.sqrt((error**2).mean(0))  # (K,)
    found = {
        ("rmse", ALL): rmse.mean(),
        ("rmse_pooled", ALL): np.sqrt((error**2).mean()),
        ("mae", ALL): np.abs(error).mean(),
        ("r2", ALL): metrics.r2_score(truth, predicted),
    }
    return found | {("rmse", name): value for name, value in zip(classes, rmse, strict=True)}


def scene_metrics(truth: np.ndarray, predicted: np.ndarray, classes: list[str]) -> Metrics:
    """Of labels (n,): F1 micro, macro and weighted, accuracy, and F1 of each class; a class that is
    neither there nor predicted counts 0.

    All come from one confusion matrix: four calls of scikit-learn's f1_score take longer than a head on
    few images. Each image has one label and one answer, so micro F1 and accuracy are one number under two
    names.
    """
    counts = metrics.confusion_matrix(truth, predicted, labels=range(len(classes)))  # (K, K)
    support = counts.sum(1)
    f1 = 2 * counts.diagonal() / np.maximum(support + counts.sum(0), 1)  # (K,)
    right = counts.trace() / len(truth)
    found = {
        ("f1_micro", ALL): right,
        ("f1_macro", ALL): f1.mean(),
        ("f1_weighted", ALL): (f1 * support).sum() / len(truth),
        ("accuracy", ALL): right,
    }
    return found | {("f1", name): value for name, value in zip(classes, f1, strict=True)}


def rows_of_a_cell(task: str, mode: str, classes: int) -> int:
    """How many rows one epoch of a cell has in results.csv: on val the metrics over all classes, on test
    each class too."""
    overall = TASKS[task].overall + (TASKS[task].of_features if mode == "linear" else ())
    return 2 * len(overall) + classes

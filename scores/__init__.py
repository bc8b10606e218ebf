"""The numbers of transfer.py: metrics and tasks, results.csv, and which epoch counts.

`scores.results` and `scores.printed`, which write and show them, are imported by name.
"""

from scores.choice import at_chosen_epoch, choose_epoch, summarise
from scores.metrics import TASKS, Metrics, Task, fraction_metrics, measure, scene_metrics, sign_of

__all__ = [
    "TASKS",
    "Metrics",
    "Task",
    "at_chosen_epoch",
    "choose_epoch",
    "fraction_metrics",
    "measure",
    "scene_metrics",
    "sign_of",
    "summarise",
]

"""Metrics as tables for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from d2zero.evaluation.metrics import METRICS, metrics_of
from d2zero_runtime import Mode
from d2zero_runtime.errors import printable


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Masks and boxes in rows; seen, unseen and harmonic mean in columns. In percent."""
    table = Table(title=f"{summary['mode']}: {summary['images']} images, {summary['annotations']} instances (percent)")
    table.add_column("")
    metrics = metrics_of(Mode(summary["mode"]))
    for metric in metrics.values():
        table.add_column(metric.label, justify="right")
    for kind, label in (("segm", "masks"), ("bbox", "boxes")):
        table.add_row(label, *(_number(summary[kind].get(key)) for key in metrics))
    return table


def per_class_table(summary: Mapping[str, Any], kind: str = "segm") -> Table:
    """One row per class that has annotations."""
    table = Table(title=f"{summary['mode']}, {'masks' if kind == 'segm' else 'boxes'} (percent)")
    table.add_column("class")
    table.add_column("")
    for column in ("instances", "AP50", "R@100", METRICS["ap"].label):
        table.add_column(column, justify="right")
    for name, row in sorted(summary[kind]["per_class"].items(), key=lambda item: (not item[1]["seen"], item[0])):
        table.add_row(
            Text(printable(name)),
            "seen" if row["seen"] else "[bold]unseen[/bold]",
            str(row["instances"]),
            *(_number(row[key]) for key in ("ap50", "recall50", "ap")),
        )
    return table


def groups_table(summary: Mapping[str, Any]) -> Table:
    """Means of each group of classes, such as LVIS's rare ones; masks and boxes in rows."""
    table = Table(title=f"{summary['mode']}: groups of classes (percent)")
    for column in ("group", ""):
        table.add_column(column)
    for column in ("classes", "AP50", "R@100", METRICS["ap"].label):
        table.add_column(column, justify="right")
    for kind, label in (("segm", "masks"), ("bbox", "boxes")):
        for group, row in summary[kind]["groups"].items():
            metrics = (_number(row[key]) for key in ("ap50", "recall50", "ap"))
            table.add_row(Text(printable(group)), label, str(row["classes"]), *metrics)
    return table

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


def comparison_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """Several vocabularies in one mode: one row per vocabulary, masks, in percent; the best is marked.

    The best has the highest harmonic mean of AP50, or AP50 of unseen classes in a mode that has no seen ones.
    """
    first = next(iter(summaries.values()))
    metrics = metrics_of(Mode(first["mode"]))
    judged = "hm_ap50" if "hm_ap50" in metrics else "unseen_ap50"
    best = max((summary["segm"][judged] or 0.0 for summary in summaries.values()), default=0.0)
    table = Table(title=f"{first['mode']}, masks: {first['images']} images (percent; best by {metrics[judged].label})")
    table.add_column("vocabulary")
    for metric in metrics.values():
        table.add_column(metric.label, justify="right")
    table.add_column("")
    for name, summary in summaries.items():
        found = summary["segm"]
        is_best = found[judged] is not None and found[judged] == best
        row = (_number(found.get(key)) for key in metrics)
        table.add_row(Text(printable(name)), *row, "best" if is_best else "", style="bold" if is_best else None)
    return table


def per_class_comparison(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """AP50 of masks by class, in percent: one row per class that has annotations, one column per vocabulary."""
    rows = [summary["segm"]["per_class"] for summary in summaries.values()]
    known = {name: row for found in reversed(rows) for name, row in found.items()}
    table = Table(title=f"{next(iter(summaries.values()))['mode']}, masks: AP50 (percent)")
    for column in ("class", ""):
        table.add_column(column)
    for column in ("instances", *map(printable, summaries)):
        table.add_column(Text(column), justify="right")
    for name, row in sorted(known.items(), key=lambda item: (not item[1]["seen"], item[0])):
        values = (_number(found[name]["ap50"] if name in found else None) for found in rows)
        table.add_row(Text(printable(name)), _seen(row), str(row["instances"]), *values)
    return table


def _seen(row: Mapping[str, Any]) -> str:
    return "seen" if row["seen"] else "[bold]unseen[/bold]"


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
            _seen(row),
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

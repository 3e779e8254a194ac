"""The paper's table with our numbers beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm.tasks.settings import Row, Task, Tasks

Report = dict[str, Any]
_HEADINGS = ("task", "metric", "paper", "ours", "difference")


def report(
    settings: Tasks, metrics: Mapping[str, Mapping[str, float]], absent: Mapping[str, Sequence[str]], compare: str
) -> Report:
    """Rows and averages, in percent, rounded to two digits.

    Args:
      metrics: {task: {"evaluation/metric": share}} of the tasks that have results.
      absent: {task: paths that it expects}.
      compare: whose published numbers stand in the column of the paper.

    Returns:
      {"compare", "rows": [{task, name, group, metric, paper, ours, difference, note}], "averages": [{group, paper,
      ours, difference, rows, of}], "absent"}; None where there is no number. An average over some of the rows compares
      with the paper's average over the same rows; `macro` is the mean of the groups' averages.
    """
    every = [(name, task, row) for name, task in settings.tasks.items() for row in task.rows]
    rows = [_row(name, task, row, metrics.get(name), compare) for name, task, row in every]
    averages = [_average(group, [row for row in rows if row["group"] == group]) for group in settings.averages]
    if len(averages) > 1:
        averages.append(_macro(averages))
    return {"compare": compare, "rows": rows, "averages": averages, "absent": {k: list(v) for k, v in absent.items()}}


def shown(report: Report) -> str:
    """The report as text: the table, group by group with its average, then the data that is absent."""
    lines: list[Sequence[str]] = [(*_HEADINGS[:2], f"{report['compare']} (paper)", *_HEADINGS[3:]), ()]
    averages = {average["group"]: average for average in report["averages"]}
    for group in dict.fromkeys(row["group"] for row in report["rows"]):
        for row in (row for row in report["rows"] if row["group"] == group):
            name = f"{row['name']} ({row['note']})" if row["note"] else row["name"]
            lines.append((name, row["metric"], *_numbers(row)))
        if group in averages:
            lines += [_average_line(averages[group]), ()]
    if "macro" in averages:
        lines += [(), _average_line(averages["macro"])]
    text = _aligned(lines)
    if report["absent"]:
        text += "\n\nabsent data:"
        text += "".join(f"\n  {task}: {', '.join(paths)}" for task, paths in report["absent"].items())
    return text


def summary(report: Report) -> dict[str, Any]:
    """One JSON object: ours by task and metric, averages, tasks without data."""
    ours = {f"{row['task']}/{row['metric']}": row["ours"] for row in report["rows"] if row["ours"] is not None}
    averages = {row["group"]: row["ours"] for row in report["averages"] if row["ours"] is not None}
    return {"ours": ours, "averages": averages, "absent": list(report["absent"])}


def _row(name: str, task: Task, row: Row, metrics: Mapping[str, float] | None, compare: str) -> dict[str, Any]:
    found = None if metrics is None else [metrics.get(of) for of in row.of]  # undefined ones are not among them
    ours = None if not found or None in found else _rounded(100 * sum(x for x in found if x is not None) / len(found))
    paper = row.paper.get(compare)
    about = {"task": name, "name": task.name, "group": task.group, "metric": row.metric, "note": task.note}
    return about | _compared(paper, ours)


def _average(group: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over the rows that both have; without any of ours, the paper's over all."""
    published = [row for row in rows if row["paper"] is not None]
    both = [row for row in published if row["ours"] is not None]
    values = _compared(_mean([row["paper"] for row in both or published]), _mean([row["ours"] for row in both]))
    return {"group": group, **values, "rows": len(both), "of": len(rows)}


def _macro(averages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    complete = all(average["ours"] is not None for average in averages)
    ours = _mean([average["ours"] for average in averages]) if complete else None
    values = _compared(_mean([average["paper"] for average in averages]), ours)
    return {"group": "macro", **values, "rows": sum(a["rows"] for a in averages), "of": sum(a["of"] for a in averages)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _compared(paper: float | None, ours: float | None) -> dict[str, Any]:
    difference = None if paper is None or ours is None else _rounded(ours - paper)
    return {"paper": _rounded(paper), "ours": _rounded(ours), "difference": difference}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _average_line(average: Mapping[str, Any]) -> Sequence[str]:
    count = f"{average['rows']} of {average['of']} numbers" if average["rows"] else f"{average['of']} numbers"
    return (f"{average['group']} average", count, *_numbers(average))


def _numbers(row: Mapping[str, Any]) -> list[str]:
    signs = {"paper": "", "ours": "", "difference": "+"}
    return ["–" if row[name] is None else f"{row[name]:{sign}.2f}" for name, sign in signs.items()]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of one width, numbers to the right."""
    widths = [max(len(line[column]) for line in lines if line) for column in range(len(_HEADINGS))]
    text = []
    for line in lines:
        sides = [str.ljust] * 2 + [str.rjust] * 3
        cells = [side(cell, width) for cell, width, side in zip(line, widths, sides, strict=False)]
        text.append("  ".join(cells).rstrip())
    return re.sub("\n{3,}", "\n\n", "\n".join(text))

"""Tables (Markdown) and plots (PNG) from result files of `harness.Recorder`; the files are the only source."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
_UNITS = (("chips", "chips/s", 1.0), ("pixels", "Mpixel/s", 1e6), ("bytes", "GB/s", 1e9), ("flop", "TFLOP/s", 1e12))
_CEILINGS = {"bytes": "copy_bytes_per_s", "flop": "matmul_flop_per_s"}


def read(path: Path | str) -> list[dict[str, Any]]:
    """The records of a result file, as they were written: what and where first."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def render_file(path: Path | str) -> str:
    """Write PATH's table beside it as .md and its plot as .png; returns the table."""
    path = Path(path)
    records = read(path)
    text = table(records)
    path.with_suffix(".md").write_text(text + f"\n![{path.stem}]({path.stem}.png)\n")
    plot(records, path.with_suffix(".png"))
    return text


def table(records: Sequence[Record]) -> str:
    """Where it was measured, a table for every group, then the notes."""
    groups: dict[str, list[Record]] = {}
    for record in records[1:]:
        if "group" in record:
            groups.setdefault(record["group"], []).append(record)
    parts = [_heading(records[0])]
    parts += [f"### {title}\n\n{_group(rows, records[0]['ceilings'])}" for title, rows in groups.items()]
    notes = [f"- {r['note']}: {', '.join(f'{name} {_short(value)}' for name, value in r['values'].items())}"
             for r in records[1:] if "note" in r]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])]) + "\n"


def _heading(first: Record) -> str:
    e = first["environment"]
    machine = f"{e['gpu']['name']}, driver {e['gpu']['driver']}; " if "gpu" in e else ""
    commit = f"{(e['commit'] or 'unknown')[:10]}{' with changes' if e['dirty'] else ''}"
    lines = [
        f"## {first['benchmark']}, {e['when']}",
        f"- Machine: {machine}{e['cpu']}, {e['cores']} cores, {e['memory'] / 2**30:.0f} GiB, load {e['load']:.1f} at "
        f"the start",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in e['versions'].items() if version)}; commit "
        f"{commit}",
        f"- Settings: {', '.join(f'{name} {_value(value)}' for name, value in first['settings'].items())}",
    ]
    ceilings = first["ceilings"]
    if ceilings:
        lines.append(f"- Ceilings measured here: copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s (read + written), "
                     f"matrix product {ceilings['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s")
    return "\n".join([lines[0], "", *lines[1:], "",
                      "Median of n repeats (10th to 90th percentile); × is the first variant's time over this one's, "
                      "round by round; % is of the ceiling; `of floor` is the time over the shortest that the ceilings "
                      "allow."])


def _group(rows: Sequence[Record], ceilings: Mapping[str, float]) -> str:
    """A table with the columns that any row has something for."""
    columns: list[tuple[str, Callable[[Record], str]]] = [("variant", lambda r: r["variant"])]
    columns += [(name, lambda r, name=name: f"{r['x'][name]:g}" if name in r.get("x", {}) else "")  # type: ignore[misc]
                for name in dict.fromkeys(name for r in rows for name in r.get("x", {}))]
    columns += [("n", lambda r: str(r["n"])), ("time, ms", lambda r: _spread(r.get("time"), 1e3)),
                ("×", lambda r: _spread(r.get("ratio"), 1))]
    columns += [(unit, lambda r, w=work, s=scale: _rate(r, w, s, ceilings))  # type: ignore[misc]
                for work, unit, scale in _UNITS]
    columns.append(("of floor", lambda r: _short(r["time"]["median"] / r["floor"]) if "floor" in r else ""))
    columns.append(("peak GiB", lambda r: f"{r['peak'] / 2**30:.3g}" if r.get("peak") else ""))
    columns.append(("of first", lambda r: f"{r['peak_ratio']:.2f}" if "peak_ratio" in r else ""))
    columns += [(name, lambda r, name=name: _spread(r.get("extra", {}).get(name), 1))  # type: ignore[misc]
                for name in dict.fromkeys(name for r in rows for name in r.get("extra", {}))]
    columns.append(("error", lambda r: r.get("error", "")))
    used = [(name, cells) for name, of in columns if any(cells := [of(r) for r in rows])]
    header = ["| " + " | ".join(name for name, _ in used) + " |", "|" + " --- |" * len(used)]
    return "\n".join(header + ["| " + " | ".join(line) + " |" for line in zip(*(cells for _, cells in used))])


def _rate(row: Record, work: str, scale: float, ceilings: Mapping[str, float]) -> str:
    if "time" not in row or work not in row["work"]:
        return ""
    rate = row["work"][work] / row["time"]["median"]
    ceiling = ceilings.get(_CEILINGS.get(work, ""))
    return _short(rate / scale) + (f" ({rate / ceiling:.0%})" if ceiling else "")


def _spread(values: Mapping[str, float] | None, scale: float) -> str:
    if values is None:
        return ""
    median, low, high = (values[key] * scale for key in ("median", "low", "high"))
    return f"{_short(median)} ({_short(low)}–{_short(high)})"


def _short(number: float) -> str:
    """Three digits, never in powers of ten."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# Plots ---------------------------------------------------------------------------------------------------------


def plot(records: Sequence[Record], path: Path) -> None:
    """One panel a group: bars of the medians with their spread, or curves where a group has several x."""
    from matplotlib.figure import Figure  # half a second that a table does not need

    groups: dict[str, list[Record]] = {}
    for record in records[1:]:
        if "time" in record:
            groups.setdefault(record["group"], []).append(record)
    columns = min(3, max(1, len(groups)))
    rows = max(1, -(-len(groups) // columns))
    figure = Figure(figsize=(5.5 * columns, 0.8 + 2.6 * rows), layout="constrained")
    for place, (title, members) in enumerate(groups.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        curves = len({tuple(r.get("x", {}).values()) for r in members}) > 1
        (_curves if curves else _bars)(axes, members)
    e = records[0]["environment"]
    figure.suptitle(f"{records[0]['benchmark']}: {e['gpu']['name'] if 'gpu' in e else e['cpu']}, {e['cores']} cores",
                    fontsize=10)
    figure.savefig(path, dpi=110)


def _curves(axes: Any, rows: Sequence[Record]) -> None:
    for name in dict.fromkeys(r["variant"] for r in rows):
        own = sorted((r for r in rows if r["variant"] == name and "x" in r), key=lambda r: next(iter(r["x"].values())))
        x = [next(iter(r["x"].values())) for r in own]
        axes.errorbar(x, *_measured(own), fmt="o-", capsize=3, markersize=4, label=name)
    axes.set_xlabel(next(iter(rows[0]["x"])), fontsize=8)
    axes.set_ylabel(_axis(rows), fontsize=8)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


def _bars(axes: Any, rows: Sequence[Record]) -> None:
    values, errors = _measured(rows)
    axes.barh([r["variant"] for r in rows], values, xerr=errors, capsize=3, color="tab:green")
    axes.invert_yaxis()
    axes.set_xlabel(_axis(rows), fontsize=8)


def _by_chips(rows: Sequence[Record]) -> bool:
    return all("chips" in r["work"] for r in rows)


def _axis(rows: Sequence[Record]) -> str:
    return "chips/s" if _by_chips(rows) else "ms"


def _measured(rows: Sequence[Record]) -> tuple[list[float], list[list[float]]]:
    """Chips/s where all rows count chips, else ms; and how far the spread reaches to either side."""
    def of(row: Record, key: str) -> float:
        return row["work"]["chips"] / row["time"][key] if _by_chips(rows) else row["time"][key] * 1e3

    medians = [of(r, "median") for r in rows]
    sides = zip(medians, (sorted((of(r, "low"), of(r, "high"))) for r in rows))
    below, above = zip(*((m - low, high - m) for m, (low, high) in sides))
    return medians, [list(below), list(above)]

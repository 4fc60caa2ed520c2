"""One self-contained HTML page of one or several runs: curves, pictures, arguments.

    python -m tools.report runs/demo
    python -m tools.report runs/paper/pretrain runs/other/pretrain --output report.html

A section for each stage: the curves of its runs over one another, from log.jsonl, the pictures that
they wrote, what was evaluated, and what their arguments differ in.
"""
import base64
import html
import json
import math
from pathlib import Path

import commandline
import runtime
from runtime import InputError

COLOURS = (                     # of a stage's runs, in their order; to be seen on white and black
    "#2f7ed8", "#e8590c", "#2b8a3e", "#ae3ec9", "#e64980", "#0c8599", "#a17f00", "#868e96")
NO_CURVE = {"step", "epoch", "time", "images"}              # numbers of a line of the log
WIDTH, HEIGHT = 420, 210        # of a chart, pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 8, 22                     # its margins, pixels
STYLE = """
:root { color-scheme: light dark;
  --ink: #1a1a1a; --soft: #667; --paper: #fff; --card: #f5f6f8; --line: #d8dbe0 }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e8e8ea; --soft: #9aa; --paper: #15171a; --card: #1f2226; --line: #383c42 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.4rem }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; padding-top: .6rem;
  border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.5rem 0 .6rem }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none }
.legend i { display: inline-block; width: 1.4em; height: .25em; margin-right: .4em;
  vertical-align: middle }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
figure { margin: 0; padding: .7rem; background: var(--card); border-radius: .5rem }
figcaption { color: var(--soft); overflow-wrap: anywhere }
figcaption b { color: var(--ink) }
figcaption i { font-style: normal; white-space: nowrap }
svg { width: 100%; height: auto; display: block }
svg text { fill: var(--soft); font-size: 11px }
svg .axis { stroke: var(--line) }
svg polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round }
.pictures img { width: 100%; height: auto; image-rendering: pixelated; border-radius: .25rem }
.scroll { overflow-x: auto }
summary { margin: 1rem 0 .4rem; cursor: pointer }
table { border-collapse: collapse; font-size: .9em }
td, th { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; min-width: 7rem; vertical-align: top }
td:first-child { white-space: nowrap }
tr.differs td { font-weight: 600 }
"""


def escape(text):
    return html.escape(str(text))


def number(value):
    """Three digits that count."""
    if 1e3 <= abs(value) < 1e5:
        return f"{value:,.0f}"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.3g}"
    return f"{value:.1e}"


class Run:
    """What log.jsonl of a stage's output folder says.

    Attributes: args and about, the arguments and the hardware ({} and "": of an evaluation alone);
    curves, {name: {step: value}}; evaluations, rows of what was measured outside training; begun.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.args, self.about = {}, ""
        self.curves, self.evaluations = {}, []
        self.begun = math.inf                               # seconds, as time.time()
        for line in (self.folder / "log.jsonl").read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:                    # a run that died wrote half of it
                continue
            self.begun = min(self.begun, row["time"])
            if "args" in row:
                self.args, self.about = row["args"], f"{row['hardware']} · {row['torch']}"
            elif "step" in row:
                self.add(row)
            else:
                self.evaluations.append(row)
        self.stage = self.args.get("stage", "evaluations")

    def add(self, row):
        for key, value in row.items():
            if key not in NO_CURVE and isinstance(value, (int, float)):
                name = f"{key} ({row['split']})" if "split" in row else key
                curve = self.curves.setdefault(name, {})
                curve[row["step"]] = value                  # a resumed run's later line counts


def find_runs(folders):
    """The runs in these folders or anywhere below, by stage: {stage: [Run, …]}. InputError: none.

    Those below a folder are in the order in which they began.
    """
    stages = {}
    for folder in folders:
        logs = Path(folder).rglob("log.jsonl")
        found = sorted((Run(log.parent) for log in logs), key=lambda run: (run.begun, run.folder))
        if not found:
            raise InputError(f"{folder}: no log.jsonl in it or below: name a stage's output folder "
                             "or one with several")
        for run in found:
            stages.setdefault(run.stage, []).append(run)
    return stages


# ------------------------------------------------------------------------------------------------
# Curves

def chart(name, curves):
    """A figure of {number of the run: {step: value}}; a curve of one point is a dot."""
    finite = {}                                             # (step, value) of each run, by step
    for i, curve in curves.items():
        finite[i] = [pair for pair in sorted(curve.items()) if math.isfinite(pair[1])]
    steps = [step for pairs in finite.values() for step, _ in pairs]
    values = [value for pairs in finite.values() for _, value in pairs]
    if not values:
        return ""
    end = max(*steps, 1)
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0

    def x(step):
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * step / end:.1f}"

    def y(value):
        return f"{TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / span):.1f}"

    parts = []
    for value in sorted({low, (low + high) / 2, high}):
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>'
            f'<text x="{LEFT - 6}" y="{y(value)}" text-anchor="end" dominant-baseline="middle">'
            f"{number(value)}</text>")
    for step, anchor in ((0, "start"), (end / 2, "middle"), (end, "end")):
        parts.append(f'<text x="{x(step)}" y="{HEIGHT - 6}" text-anchor="{anchor}">'
                     f"{step:,.0f}</text>")
    for i, pairs in finite.items():
        colour = COLOURS[i % len(COLOURS)]
        if len(pairs) == 1:
            step, value = pairs[0]
            parts.append(f'<circle cx="{x(step)}" cy="{y(value)}" r="3" fill="{colour}"/>')
        elif pairs:
            places = " ".join(f"{x(step)},{y(value)}" for step, value in pairs)
            parts.append(f'<polyline stroke="{colour}" points="{places}"/>')
    values = []
    for i, curve in curves.items():
        last = number(curve[max(curve)])
        values.append(f'<i style="color:{COLOURS[i % len(COLOURS)]}">{last}</i>')
    return (f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">'
            f'{"".join(parts)}</svg>'
            f"<figcaption><b>{escape(name)}</b>, at the end {', '.join(values)}</figcaption>"
            "</figure>")


def charts(runs):
    figures = []
    for name in dict.fromkeys(name for run in runs for name in run.curves):
        curves = {i: run.curves[name] for i, run in enumerate(runs) if name in run.curves}
        figures.append(chart(name, curves))
    return f'<div class="grid">{"".join(figures)}</div>'


def legend(runs):
    items = []
    for i, run in enumerate(runs):
        items.append(f'<li><i style="background:{COLOURS[i % len(COLOURS)]}"></i>'
                     f"{escape(run.folder)} <span>{escape(run.about)}</span></li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


# ------------------------------------------------------------------------------------------------
# Pictures

def picture(png, caption):
    """A figure with the bytes of a PNG file inside the page."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return (f'<figure><img alt="{escape(caption)}" src="{source}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def pictures(runs):
    figures = []
    for run in runs:
        for path in sorted(run.folder.glob("*.png")):
            figures.append(picture(path.read_bytes(), f"{run.folder}: {path.stem}"))
    if not figures:
        return ""
    return f'<h3>Pictures</h3><div class="grid pictures">{"".join(figures)}</div>'


# ------------------------------------------------------------------------------------------------
# Tables

def table_row(cells, kind="td", attributes=""):
    inner = "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells)
    return f"<tr{attributes}>{inner}</tr>"


def rounded(value):
    """A value of the log to read: numbers by number(), lists of them too."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return " ".join(rounded(item) for item in value)
    return "" if value is None else str(value)


def evaluations(runs):
    """What was measured outside training, a line each."""
    rows = []
    for run in runs:
        for row in run.evaluations:
            shown = (f"{key} {rounded(value)}" for key, value in row.items() if key != "time")
            rows.append(table_row([run.folder, ", ".join(shown)]))
    if not rows:
        return ""
    return ('<h3>Evaluations and probes</h3>'
            f'<div class="scroll"><table>{"".join(rows)}</table></div>')


def arguments(runs):
    """What each run was given, first what differs."""
    runs = [run for run in runs if run.args]                # an evaluation alone has none
    if not runs:
        return ""
    differing, same = [], []
    for key in sorted({key for run in runs for key in run.args}):
        values = [run.args.get(key) for run in runs]
        cells = [rounded(value) for value in values]
        if any(value != values[0] for value in values):
            differing.append(table_row([key, *cells], attributes=" class=differs"))
        else:
            same.append(table_row([key, *cells]))
    head = table_row(["", *(run.folder for run in runs)], "th")
    rows = "".join([head, *differing, *same])
    return ("<details><summary>Arguments</summary>"
            f'<div class="scroll"><table>{rows}</table></div></details>')


def section(stage, runs):
    return (f"<section><h2>{escape(stage)}</h2>{legend(runs)}{charts(runs)}{pictures(runs)}"
            f"{evaluations(runs)}{arguments(runs)}</section>")


def page(stages):
    """The page of {stage: its runs}."""
    sections = "".join(section(stage, runs) for stage, runs in stages.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>PeCo runs</title><style>{STYLE}</style><h1>PeCo runs</h1>{sections}</html>\n")


def main(argv=None):
    p = commandline.Parser("tools.report", __doc__)
    p.add_argument("runs", nargs="+",
                   help="output folders of any stages, or folders with several below")
    p.add_argument("--output", type=Path, default=Path("report.html"),
                   help="file to write; default: %(default)s")
    args = p.parse_args(argv)
    text = page(find_runs(args.runs))
    args.output.write_text(text, encoding="utf-8")
    runtime.say(str(args.output))


if __name__ == "__main__":
    runtime.launch_tool("report", main)

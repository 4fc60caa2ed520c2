"""One self-contained HTML page of one or several runs: curves, pictures, arguments.

    python -m tools.report runs/paper/tokenizer runs/paper/pretrain --output report.html

Curves are drawn from log.jsonl, runs over one another; pictures are those that the runs wrote. For a pretrain.py run
whose tokenizer and data are there, masked images with the codes it predicts, decoded, are drawn now.
"""
import argparse
import base64
import contextlib
import html
import io
import json
import math
import random
import sys
from pathlib import Path

import torch
from PIL import Image

import data
from model import block_mask, load
from runtime import InputError, load_checkpoint

COLOURS = ("#2f7ed8", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#8a6d00", "#495057")
SKIP = {"step", "epoch", "time", "images", "split", "init", "probe"}
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #667; --paper: #fff; --card: #f5f6f8; --line: #d8dbe0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --soft: #9aa; --paper: #15171a; --card: #1f2226; --line: #383c42 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem } p, figcaption { color: var(--soft) }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none }
.legend i { display: inline-block; width: 1.4em; height: .25em; margin-right: .4em; vertical-align: middle }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem }
figure { margin: 0; padding: .7rem; background: var(--card); border-radius: .5rem }
figcaption { overflow-wrap: anywhere } figcaption b { color: var(--ink) }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font-size: 11px }
svg .axis { stroke: var(--line) } svg polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round }
.pictures img { width: 100%; height: auto; image-rendering: pixelated; border-radius: .25rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9em } td, th { text-align: left; padding: .15rem .8rem .15rem 0;
border-bottom: 1px solid var(--line); overflow-wrap: anywhere; min-width: 7rem; vertical-align: top } td:first-child { white-space: nowrap } tr.differs td { font-weight: 600 }
"""


class Run:
    def __init__(self, folder):
        self.folder, log = Path(folder), Path(folder) / "log.jsonl"
        if not log.exists():
            raise InputError(f"{folder}: no log.jsonl in it; name a stage's output folder")
        rows = []
        for line in log.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a run that died wrote half of its last line
                rows.append(json.loads(line))
        starts = [row for row in rows if "args" in row]
        self.args = starts[-1]["args"] if starts else {}
        self.about = " · ".join(str(starts[-1][key]) for key in ("hardware", "torch") if key in starts[-1]) if starts else ""
        self.series = {}                                   # name → {step: value}: a resumed run's later line wins
        self.evaluations = [row for row in rows if "args" not in row and "step" not in row]  # of --eval and --probe
        for row in rows:
            if "args" in row or "step" not in row:
                continue
            for key, value in row.items():
                if key not in SKIP and isinstance(value, (int, float)):
                    name = f"{key} ({row['split']})" if "split" in row else key
                    self.series.setdefault(name, {})[row["step"]] = value


def number(value):
    if 1e3 <= abs(value) < 1e5:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.1e}"


def chart(name, lines):
    """An SVG of {run's number: {step: value}}; a line of one point is a dot."""
    width, height, left, bottom = 420, 210, 52, 22
    points = [(step, value) for line in lines.values() for step, value in line.items() if math.isfinite(value)]
    if not points:
        return ""
    steps, values = zip(*points)
    low, high, end = min(values), max(values), max(max(steps), 1)
    span = (high - low) or abs(high) or 1.0

    def place(step, value):
        return f"{left + (width - left - 8) * step / end:.1f},{8 + (height - bottom - 16) * (1 - (value - low) / span):.1f}"
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(name)}">']
    for value in sorted({low, (low + high) / 2, high}):
        y = place(0, value).split(",")[1]
        parts.append(f'<line class="axis" x1="{left}" x2="{width - 8}" y1="{y}" y2="{y}"/>'
                     f'<text x="{left - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">{number(value)}</text>')
    for step in (0, end / 2, end):
        x = place(step, low).split(",")[0]
        anchor = "end" if step == end else "middle" if step else "start"
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="{anchor}">{step:,.0f}</text>')
    for index, line in lines.items():
        colour, pairs = COLOURS[index % len(COLOURS)], sorted((s, v) for s, v in line.items() if math.isfinite(v))
        if len(pairs) == 1:
            x, y = place(*pairs[0]).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        elif pairs:
            parts.append(f'<polyline stroke="{colour}" points="{" ".join(place(*pair) for pair in pairs)}"/>')
    last = ", ".join(number(line[max(line)]) for line in lines.values())
    return f'<figure>{"".join(parts)}</svg><figcaption><b>{html.escape(name)}</b>, at the end {last}</figcaption></figure>'


def embedded(image, caption):
    """An image (path or PIL) as a figure, inside the page."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        raw = buffer.getvalue()
    else:
        raw = Path(image).read_bytes()
    return (f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(raw).decode()}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def masked_predictions(run, number=8):
    """Columns of a validation image, the image as the ViT saw it, the codes it predicts there and the true ones, decoded."""
    state = load_checkpoint(run.folder, ["pretrain"])
    args, vit, tokenizer = state["args"], load(run.folder), load(run.args["tokenizer"])
    dataset = data.load_dataset(args["data"], "val", args["image_size"])
    random.seed(0)
    chosen = random.sample(range(len(dataset)), min(number, len(dataset)))
    images = torch.stack([vit.preprocess(data.read(dataset, index)[0]) for index in chosen])
    count = round(args["mask_ratio"] * vit.grid ** 2)
    masks = torch.stack([block_mask(vit.grid, count, args["mask_block"]) for _ in chosen])
    with torch.no_grad():
        true = tokenizer.encode(images, vit.grid)
        predicted = true.clone()
        predicted[masks] = vit(images, masks).argmax(1)
        rows = [tokenizer.decode(codes) for codes in (predicted, true)]
    rows = [torch.nn.functional.interpolate(row, images.shape[2:]) for row in rows]
    grey = torch.nn.functional.interpolate(masks[:, None].float(), images.shape[2:])
    rows = [images, torch.where(grey > 0, 0.0, images), *rows]
    sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1)                 # (3, 4·H, number·W)
    return Image.fromarray(((sheet.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy())


def pictures(runs):
    figures = []
    for run in runs:
        for path in sorted(run.folder.glob("*.png")):
            figures.append(embedded(path, f"{run.folder}: {path.stem}"))
        if run.args.get("stage") == "pretrain":
            try:
                figures.append(embedded(masked_predictions(run), f"{run.folder}: validation images, masked, with the predicted codes "
                                        "decoded in the masked places, with the true codes decoded"))
            except InputError as error:                    # its tokenizer or data are elsewhere now
                figures.append(f"<figure><figcaption>{html.escape(f'{run.folder}: no masked predictions: {error}')}</figcaption></figure>")
    return figures


def arguments(runs):
    """What each run was given; blank where its stage has no such argument. An evaluation alone writes none down."""
    runs, rows = [run for run in runs if run.args], []
    for key in sorted({key for run in runs for key in run.args}):
        values = [json.dumps(run.args[key]) if key in run.args else "" for run in runs]
        rows.append((len(set(values) - {""}) == 1, key, values))
    rows.sort(key=lambda row: row[0])                      # what differs comes first
    head = "".join(f"<th>{html.escape(str(run.folder))}</th>" for run in runs)
    body = "".join(f'<tr{"" if alike else " class=differs"}><td>{key}</td>' + "".join(f"<td>{html.escape(v)}</td>" for v in values) + "</tr>"
                   for alike, key, values in rows)
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'


def evaluations(runs):
    """What was measured outside training, a line each."""
    rows = "".join(f"<tr><td>{html.escape(str(run.folder))}</td><td>"
                   + html.escape(", ".join(f"{key} {number(value) if isinstance(value, float) else value}" for key, value in row.items()
                                           if key != "time")) + "</td></tr>" for run in runs for row in run.evaluations)
    return f'<h2>Evaluations and probes</h2><div class="scroll"><table>{rows}</table></div>' if rows else ""


def page(runs):
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    charts = [chart(name, {i: run.series[name] for i, run in enumerate(runs) if name in run.series}) for name in names]
    legend = "".join(f'<li><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{html.escape(str(run.folder))} <span>'
                     f"{html.escape(run.about)}</span></li>" for i, run in enumerate(runs))
    shown = pictures(runs)
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(', '.join(str(run.folder) for run in runs))}</title><style>{STYLE}</style>"
            f'<h1>PeCo runs</h1><ul class="legend">{legend}</ul><h2>Curves, over steps</h2><div class="grid">{"".join(charts)}</div>'
            + (f'<h2>Pictures</h2><div class="grid pictures">{"".join(shown)}</div>' if shown else "")
            + f"{evaluations(runs)}<h2>Arguments</h2>{arguments(runs)}</html>\n")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("runs", nargs="+", help="output folders of any stages")
    p.add_argument("--output", type=Path, default=Path("report.html"))
    args = p.parse_args(argv)
    args.output.write_text(page([Run(folder) for folder in args.runs]))
    print(args.output)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"tools.report: {error}", file=sys.stderr)
        sys.exit(2)

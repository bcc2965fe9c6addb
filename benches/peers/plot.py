#!/usr/bin/env python3
"""Draws a run: speed against error, one point for each library, kind of arithmetic and of weights, as SVG.

    ./plot.py run.json > plot.svg [--threads 1] [--memory cache|dram] [--all]

Of records of one library with errors of the same kind (that of 8-bit inputs, of 16-bit ones, of f32) and weights of the
same kind (int4 or NF4), the fastest is drawn; all of them with --all. Only weights of at most 6 bits are.
"""

import argparse
import json
import math
import sys
from html import escape

WIDTH, HEIGHT = 820, 520
LEFT, RIGHT, TOP, BOTTOM = 76, 30, 64, 64
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"
# Colors on a light and on a dark page, as the reader's system prefers.
COLORS = {
    "paper": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "faint": ("#59636e", "#9198a1"),
    "grid": ("#d8dee4", "#2d333b"),
    "ours": ("#c2410c", "#ff9259"),
    "other": ("#2f6299", "#79b8ff"),
}


def style():
    """Each color as a class for text and dots, and as one for lines, whose name starts with `line-`."""

    def rules(index):
        colors = {name: pair[index] for name, pair in COLORS.items()}
        fills = [f".{name} {{ fill: {color} }} .line-{name} {{ stroke: {color} }}" for name, color in colors.items()]
        return " ".join(fills + [f".halo {{ stroke: {colors['paper']} }}"])

    return f"<style>{rules(0)} @media (prefers-color-scheme: dark) {{ {rules(1)} }}</style>"


def kind(error):
    return 0 if error < 1e-5 else 1 if error < 1e-3 else 2


def chosen(run, threads, memory, everything):
    records = [r for r in run["records"] if r["threads"] == threads and r.get(memory) and r.get("error_rms")]
    records = sorted((r for r in records if r["bits"] <= 6), key=lambda r: -r[memory])
    if everything:
        return records
    best = {}
    for r in records:
        best.setdefault((r["library"], kind(r["error_rms"]), "NF4" in r["name"]), r)
    return list(best.values())


class Axis:
    """A logarithmic axis from `low` to `high`, both powers of ten or steps 1, 2, 5 of them."""

    def __init__(self, low, high, start, end):
        self.low, self.high, self.start, self.end = math.log10(low), math.log10(high), start, end

    def __call__(self, value):
        return self.start + (math.log10(value) - self.low) / (self.high - self.low) * (self.end - self.start)


def step(value, up):
    """The next of 1, 2, 5, 10, ... above or below."""
    power = 10 ** math.floor(math.log10(value))
    steps = [power * k for k in (1, 2, 5, 10)]
    return next(s for s in steps if s >= value) if up else max(s for s in steps if s <= value)


def ticks(low, high, steps):
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [k * 10.0**e for e in exponents for k in steps]
    return [v for v in values if low * 0.999 <= v <= high * 1.001]


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def place(points):
    """A box and an anchor for the label of each point: of some places around it, the one that covers least of what is
    there. The anchor is the side of the box that is near the point: how wide text is depends on the reader's font."""
    dots = [(x - 7, y - 7, x + 7, y + 7) for x, y, _ in points]
    frame = (LEFT + 4, TOP + 4, WIDTH - RIGHT - 4, HEIGHT - BOTTOM - 4)
    boxes, anchors = [], []
    for index, (x, y, text) in enumerate(points):
        width, best = 6.6 * len(text), None
        for distance in (0, 14, 28, 42, 56):
            for dx, dy in [(1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)]:
                left = x - width / 2 + dx * (width / 2 + 11 + (distance if dy == 0 else 0))
                middle = y + dy * (15 + distance)
                box = (left, middle - 8, left + width, middle + 8)
                inside = overlap(box, frame)
                cost = sum(overlap(box, other) for other in boxes + dots[:index] + dots[index + 1:])
                cost += 3 * (width * 16 - inside) + distance
                if best is None or cost < best[0]:
                    best = (cost, box, {1: "start", -1: "end", 0: "middle"}[dx])
        boxes.append(best[1])
        anchors.append(best[2])
    return zip(boxes, anchors)


def draw(run, threads, memory, everything):
    records = chosen(run, threads, memory, everything)
    if not records:
        raise SystemExit("no records to draw")
    errors, speeds = [r["error_rms"] for r in records], [r[memory] for r in records]
    limit = next((r[memory] for r in run["records"] if r["library"] == "read" and r["threads"] == threads), None)
    low, high = step(min(speeds) / 1.3, False), step(max(speeds) * 1.3, True)
    left, right = step(min(errors) / 1.5, False), step(max(errors) * 1.3, True)
    x_axis, y_axis = Axis(left, right, LEFT, WIDTH - RIGHT), Axis(low, high, HEIGHT - BOTTOM, TOP)
    place_name = {"cache": "in cache", "dram": "from memory"}[memory]
    title = "4-bit weights times one f32 vector: speed and error"
    of_threads = f"{threads} thread{'s' if threads > 1 else ''}"
    subtitle = f"{run['rows']} x {run['cols']} {place_name}, {of_threads}, {run['cpu']}"
    out = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}' "
        f"role='img' {FONT} font-size='12'>",
        f"<title>{escape(title)}</title>",
        style(),
        f"<rect width='{WIDTH}' height='{HEIGHT}' class='paper'/>",
        f"<text x='{LEFT}' y='26' font-size='16' font-weight='600' class='ink'>{escape(title)}</text>",
        f"<text x='{LEFT}' y='46' class='faint'>{escape(subtitle)}</text>",
    ]
    for value in ticks(left, right, [1]):
        x = x_axis(value)
        exponent = round(math.log10(value))
        out.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{TOP}' y2='{HEIGHT - BOTTOM}' class='line-grid'/>")
        out.append(
            f"<text x='{x:.1f}' y='{HEIGHT - BOTTOM + 20}' text-anchor='middle' class='faint'>10"
            f"<tspan dy='-5' font-size='9'>{exponent}</tspan></text>"
        )
    for value in ticks(low, high, [1, 2, 5]):
        y = y_axis(value)
        out.append(f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}' class='line-grid'/>")
        out.append(f"<text x='{LEFT - 8}' y='{y + 4:.1f}' text-anchor='end' class='faint'>{value:g}</text>")
    if limit and low < limit < high:
        y = y_axis(limit)
        out.append(f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}' class='line-faint' "
                   "stroke-dasharray='5 4'/>")
        out.append(f"<text x='{LEFT + 6}' y='{y - 5:.1f}' class='faint'>a pure read of 4.5 bits per weight</text>")
    out.append(
        f"<text x='{(LEFT + WIDTH - RIGHT) / 2}' y='{HEIGHT - 16}' text-anchor='middle' class='ink'>"
        "root mean square error, relative to that of the outputs (left is more exact)</text>"
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(
        f"<text x='20' y='{middle}' text-anchor='middle' class='ink' transform='rotate(-90 20 {middle})'>"
        "GMAC/s (up is faster)</text>"
    )
    points = [(x_axis(r["error_rms"]), y_axis(r[memory]), f"{r['name']}  {r[memory]:.3g}") for r in records]
    for record, (x, y, text), (box, anchor) in zip(records, points, place(points)):
        color, weight = ("ours", 600) if record["library"] == "nf4" else ("other", 400)
        text_x = {"start": box[0], "end": box[2], "middle": (box[0] + box[2]) / 2}[anchor]
        if math.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3])) > 16:
            edge_x = min(max(x, box[0]), box[2])
            edge_y = min(max(y, box[1] + 3), box[3] - 3)
            out.append(f"<line x1='{x:.1f}' y1='{y:.1f}' x2='{edge_x:.1f}' y2='{edge_y:.1f}' class='line-{color}' "
                       "stroke-opacity='0.5'/>")
        out.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5.5' class='{color}' fill-opacity='0.85'/>")
        out.append(
            f"<text x='{text_x:.1f}' y='{(box[1] + box[3]) / 2 + 4:.1f}' text-anchor='{anchor}' class='{color} halo' "
            f"font-weight='{weight}' paint-order='stroke' stroke-width='3'>{escape(text)}</text>"
        )
    out.append("</svg>")
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="what --json wrote")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", choices=["cache", "dram"], default="cache")
    parser.add_argument("--all", action="store_true", help="draw all records")
    args = parser.parse_args()
    with open(args.run) as file:
        run = json.load(file)
    sys.stdout.write(draw(run, args.threads, args.memory, args.all))


if __name__ == "__main__":
    main()

"""Draw word error rate against speed, a bubble per configuration, sized by the bytes of the decoder.

    python benchmarks/plot.py benchmarks/results/wer_*.jsonl --output benchmarks/results/wer

Takes rows of `wer.py`, of any number of machines, and writes `<output>.png`, and `<output>.html`: one page without
outside parts, which shows what is known of a point that the mouse is on. Short and long form have a panel each. Models
have a colour each, and what ran on a CPU is a square.
"""

import argparse
import html
import itertools
import json
import math
from pathlib import Path


COLORS = ("#1b6ca8", "#c8553d", "#4a7c59", "#7b5ea7", "#b8860b")
STYLES = ("short", "long")
WIDTH, HEIGHT, MARGIN = 760, 560, 70
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
SPEED, ERRORS = "times real time (higher is faster)", "WER, % (lower is better)"
FACTS = (
    "wer",
    "real_time_factor",
    "bits_per_weight",
    "decoder_bytes",
    "method",
    "solved_on",
    "engine",
    "gpu",
    "cpu",
    "threads",
    "batch",
)
NOTE = (
    "Circles ran on a GPU, squares on a CPU: compare speeds of one kind only. * quantised on the GPU, where hqq\n"
    "solves in half precision; else on the CPU, and the GPU, if it ran on one, was shared while timed."
)


def read_rows(paths):
    """Rows of all files; the last of several for one model, configuration, style, machine and place of solving."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    keys = ("model", "configuration", "style", "gpu", "solved_on")
    return list({tuple(row.get(key) for key in keys): row for row in rows}.values())


def colors(rows):
    """Model -> colour."""
    return dict(zip(sorted({row["model"] for row in rows}), COLORS * len(rows)))


def label(row):
    """A configuration in a few characters; where its integers were solved for, if that was a GPU."""
    return row["configuration"] + ("*" if row.get("solved_on") == "cuda" else "")


def heading(rows):
    machines = dict.fromkeys(row["gpu"] or f"{row['cpu']} CPU, {row['threads']} thread(s)" for row in rows)
    sets = ", ".join(dict.fromkeys(row["set"] for row in rows))
    batches = ", ".join(dict.fromkeys(str(row["batch"]) for row in rows))
    return f"WER against speed, {sets}, batch {batches}; {'; '.join(machines)}"


def limits(rows, key):
    """Ends of a logarithmic axis that holds all rows with some room."""
    values = [max(row[key], 0.01) for row in rows]
    return min(values) / 1.35, max(values) * 1.5


def place_labels(points, sizes, width, height):
    """Where labels go so that they cover neither one another nor, if it can be helped, a bubble.

    Args:
        points: ``(x, y, radius)`` of every bubble, y growing downwards.
        sizes: ``(width, height)`` of every label.
        width, height: of the panel.

    Returns:
        ``(x, y)`` of every label's left upper corner.
    """
    placed = []
    for (x, y, radius), (w, h) in zip(points, sizes):
        best = None
        for distance, angle in itertools.product((2, 8, 16, 28, 42), range(0, 360, 30)):
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            left = x + (radius + distance + w / 2) * dx - w / 2
            top = y - (radius + distance + h / 2) * dy - h / 2
            if left < 0 or top < 0 or left + w > width or top + h > height:
                continue
            cost = distance / 4
            for l2, t2, w2, h2 in placed:
                if left < l2 + w2 and l2 < left + w and top < t2 + h2 and t2 < top + h:
                    cost += 100
            for x2, y2, r2 in points:
                inside = abs(x2 - left - w / 2) < r2 + w / 2 and abs(y2 - top - h / 2) < r2 + h / 2
                cost += 10 * inside
            if best is None or cost < best[0]:
                best = (cost, left, top)
        _, left, top = best or (0, x, y)
        placed.append((left, top, w, h))
    return [(left, top) for left, top, _, _ in placed]


def position(row, spans, width, height):
    """``(x, y)`` of a row in a panel, y growing downwards."""
    shares = []
    for key, (low, high) in zip(("real_time_factor", "wer"), spans):
        shares.append(math.log(max(row[key], 0.01) / low) / math.log(high / low))
    return shares[0] * width, (1 - shares[1]) * height


def layout(rows, spans, width, height, area, character):
    """Bubbles and labels of a panel: ``(row, x, y, radius, label_x, label_y)``, large bubbles first."""
    rows = sorted(rows, key=lambda row: -row["decoder_bytes"])
    points = [(*position(row, spans, width, height), math.sqrt(row["decoder_bytes"] / area)) for row in rows]
    sizes = [(character[0] * len(label(row)), character[1]) for row in rows]
    places = place_labels(points, sizes, width, height)
    return [(row, *point, *at) for row, point, at in zip(rows, points, places)]


def draw_png(rows, path):
    """The scatter as an image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = [style for style in STYLES if any(row["style"] == style for row in rows)]
    figure, panels = plt.subplots(1, len(styles), figsize=(7.2 * len(styles), 6), dpi=130, squeeze=False)
    palette, spans = colors(rows), [limits(rows, key) for key in ("real_time_factor", "wer")]
    for style, axes in zip(styles, panels[0]):
        mine = [row for row in rows if row["style"] == style]
        axes.set(xscale="log", yscale="log", xlabel=SPEED, ylabel=ERRORS, xlim=spans[0], ylim=spans[1])
        axes.set_title(f"{style} form", fontsize=10)
        axes.grid(alpha=0.3)
        for axis, span in ((axes.xaxis, spans[0]), (axes.yaxis, spans[1])):
            axis.set_ticks([tick for tick in TICKS if span[0] <= tick <= span[1]])
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
    figure.suptitle(heading(rows), fontsize=10)
    figure.text(0.01, 0.01, NOTE, fontsize=7)
    figure.tight_layout(rect=(0, 0.05, 1, 0.98))
    for style, axes in zip(styles, panels[0]):
        mine = [row for row in rows if row["style"] == style]
        box = axes.get_window_extent()
        width, height = box.width * 72 / figure.dpi, box.height * 72 / figure.dpi
        for row, x, y, radius, label_x, label_y in layout(mine, spans, width, height, 2.2e6, (4.8, 8)):
            color = palette[row["model"]]
            at = (row["real_time_factor"], row["wer"])
            marker = "o" if row["gpu"] else "s"
            axes.scatter(*at, s=math.pi * radius**2, c=color, alpha=0.5, marker=marker, edgecolors=color)
            offset = (label_x - x, y - label_y - 8)
            axes.annotate(label(row), at, xytext=offset, textcoords="offset points", fontsize=8, color=color)
    points = [plt.Line2D([], [], marker="o", linestyle="", color=color, label=name) for name, color in palette.items()]
    for name, marker in (("on a GPU", "o"), ("on a CPU", "s")):
        points.append(plt.Line2D([], [], marker=marker, linestyle="", color="#888", label=name))
    panels[0][-1].legend(handles=points, title="area: bytes of the decoder", loc="upper right", fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def draw_page(rows, path):
    """The scatter as a page of its own, inline SVG and a few lines of script."""
    palette, spans = colors(rows), [limits(rows, key) for key in ("real_time_factor", "wer")]
    width, height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    panels = []
    for style in STYLES:
        mine = [row for row in rows if row["style"] == style]
        shapes = []
        for row, x, y, radius, label_x, label_y in layout(mine, spans, width, height, 6e5, (6.2, 12)):
            facts = [
                f"{row['model']} {label(row)}",
                *(f"{key}: {row[key]}" for key in FACTS if row.get(key) is not None),
            ]
            color = palette[row["model"]]
            common = (
                f'fill="{color}" fill-opacity="0.5" stroke="{color}" data-facts="{html.escape(chr(10).join(facts))}"'
            )
            if row["gpu"]:
                shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" {common}/>')
            else:
                side = 2 * radius
                corner = f'x="{x - radius:.1f}" y="{y - radius:.1f}"'
                shapes.append(f'<rect {corner} width="{side:.1f}" height="{side:.1f}" {common}/>')
            name = html.escape(label(row))
            shapes.append(f'<text x="{label_x:.1f}" y="{label_y + 10:.1f}" fill="{color}">{name}</text>')
        for value in TICKS:
            x, y = position({"real_time_factor": value, "wer": value}, spans, width, height)
            if 0 <= x <= width:
                shapes.append(f'<text x="{x:.1f}" y="{height + 18}" text-anchor="middle">{value}</text>')
            if 0 <= y <= height:
                shapes.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
        panels.append(
            f'<svg width="{WIDTH}" height="{HEIGHT}"><g transform="translate({MARGIN} {MARGIN})">'
            f'<rect width="{width}" height="{height}" fill="none" stroke="#ccc"/>{"".join(shapes)}'
            f'<text x="{width // 2}" y="-12" text-anchor="middle">{style} form</text>'
            f'<text x="{width // 2}" y="{height + 42}" text-anchor="middle">{SPEED}</text>'
            f'<text transform="translate(-46 {height // 2}) rotate(-90)" text-anchor="middle">{ERRORS}</text>'
            "</g></svg>"
        )
    legend = " ".join(f'<b style="color:{color}">{html.escape(model)}</b>' for model, color in palette.items())
    title = html.escape(heading(rows))
    path.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px sans-serif; margin: 2em; }} svg text {{ font-size: 11px; pointer-events: none; }}
#facts {{ position: fixed; display: none; padding: 6px 9px; background: #fff; border: 1px solid #999;
  white-space: pre; pointer-events: none; }}
</style>
<h1 style="font-size:16px">{title}</h1>
<p>{legend}. Area: bytes of the decoder. {html.escape(NOTE)} Point at a bubble.</p>
{"".join(panels)}
<div id="facts"></div>
<script>
const box = document.getElementById("facts");
for (const shape of document.querySelectorAll("[data-facts]")) {{
  shape.addEventListener("mousemove", event => {{
    box.textContent = shape.dataset.facts;
    box.style.display = "block";
    box.style.left = event.clientX + 14 + "px";
    box.style.top = event.clientY + 14 + "px";
  }});
  shape.addEventListener("mouseleave", () => {{ box.style.display = "none"; }});
}}
</script></html>
"""
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="files of JSON lines of wer.py")
    parser.add_argument("--output", type=Path, required=True, help="without .png and .html")
    options = parser.parse_args()
    rows = read_rows(options.rows)
    draw_png(rows, options.output.with_suffix(".png"))
    draw_page(rows, options.output.with_suffix(".html"))


if __name__ == "__main__":
    main()

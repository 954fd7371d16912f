"""Draw word error rate against speed, a bubble per configuration, sized by the bytes of the decoder.

    python benchmarks/plot.py benchmarks/results/wer_h100.jsonl --style short --output benchmarks/results/wer_h100

Takes rows of `wer.py` and writes `<output>.png`, and `<output>.html`: one page without outside parts, which shows what
is known of a point that the mouse is on.
"""

import argparse
import html
import json
import math
from pathlib import Path


COLORS = ("#1b6ca8", "#c8553d", "#4a7c59", "#7b5ea7", "#b8860b")
WIDTH, HEIGHT, MARGIN = 900, 560, 70
FACTS = (
    "wer",
    "real_time_factor",
    "bits_per_weight",
    "decoder_bytes",
    "method",
    "solved_on",
    "engine",
    "gpu",
    "batch",
)


NOTE = "* quantised on the GPU, where hqq solves in half precision; else on the CPU, and the GPU shared while timed."


def read_rows(path, style):
    """Rows of one style; the last of several for one model, configuration and place of solving counts."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = {(r["model"], r["configuration"], r.get("solved_on")): r for r in rows if r["style"] == style}
    if not chosen:
        raise SystemExit(f"{path} holds no row with style={style!r}: run benchmarks/wer.py with --styles {style}.")
    return list(chosen.values())


def colors(rows):
    """Model -> colour."""
    return dict(zip(dict.fromkeys(row["model"] for row in rows), COLORS * len(rows)))


def label(row):
    """A configuration in a few characters; where its integers were solved for, if that was a GPU."""
    return row["configuration"] + ("*" if row.get("solved_on") == "cuda" else "")


def title(row, style):
    return f"WER against speed, {row['set']}, {style} form, {row['gpu'] or row['cpu']}, batch {row['batch']}"


def draw_png(rows, style, path):
    """The scatter as an image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.6), dpi=130)
    for model, color in colors(rows).items():
        mine = [row for row in rows if row["model"] == model]
        axes.scatter(
            [row["real_time_factor"] for row in mine],
            [row["wer"] for row in mine],
            s=[row["decoder_bytes"] / 4e5 for row in mine],
            c=color,
            alpha=0.55,
            label=model,
        )
        for row in mine:
            point = (row["real_time_factor"], row["wer"])
            axes.annotate(label(row), point, xytext=(5, 5), textcoords="offset points", fontsize=8, color=color)
    axes.set(
        xscale="log", yscale="log", xlabel="times real time (higher is faster)", ylabel="WER, % (lower is better)"
    )
    axes.set_title(title(rows[0], style), fontsize=10)
    axes.set_ylim(top=1.6 * max(row["wer"] for row in rows))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    legend = axes.legend(title="area: bytes of the decoder", loc="upper right")
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    figure.text(0.01, 0.01, NOTE, fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path)


def draw_page(rows, style, path):
    """The scatter as a page of its own, inline SVG and a few lines of script."""
    spans = [[math.log10(max(row[key], 0.01)) for row in rows] for key in ("real_time_factor", "wer")]

    def place(value, values, size):
        low, high = min(values), max(values)
        share = (math.log10(max(value, 0.01)) - low) / ((high - low) or 1.0)
        return MARGIN + share * (size - 2 * MARGIN)

    shapes = []
    palette = colors(rows)
    for row in sorted(rows, key=lambda row: -row["decoder_bytes"]):
        x = place(row["real_time_factor"], spans[0], WIDTH)
        y = HEIGHT - place(row["wer"], spans[1], HEIGHT)
        facts = [f"{row['model']} {label(row)}", *(f"{key}: {row[key]}" for key in FACTS if row.get(key) is not None)]
        color, radius = palette[row["model"]], math.sqrt(row["decoder_bytes"] / 4e5)
        shapes.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{color}" fill-opacity="0.55" '
            f'data-facts="{html.escape(chr(10).join(facts))}"/>'
            f'<text x="{x + radius:.1f}" y="{y - 4:.1f}" fill="{color}">{html.escape(label(row))}</text>'
        )
    for value in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if min(spans[0]) <= math.log10(value) <= max(spans[0]):
            x = place(value, spans[0], WIDTH)
            shapes.append(f'<text x="{x:.1f}" y="{HEIGHT - 30}" text-anchor="middle">{value}</text>')
        if min(spans[1]) <= math.log10(value) <= max(spans[1]):
            y = HEIGHT - place(value, spans[1], HEIGHT)
            shapes.append(f'<text x="{MARGIN - 30}" y="{y:.1f}" text-anchor="end">{value}</text>')
    legend = " ".join(f'<b style="color:{color}">{html.escape(model)}</b>' for model, color in palette.items())
    heading = html.escape(title(rows[0], style))
    path.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{heading}</title>
<style>
body {{ font: 14px sans-serif; margin: 2em; }} svg text {{ font-size: 11px; pointer-events: none; }}
#facts {{ position: fixed; display: none; padding: 6px 9px; background: #fff; border: 1px solid #999;
  white-space: pre; pointer-events: none; }}
</style>
<h1 style="font-size:16px">{heading}</h1>
<p>{legend}. Area: bytes of the decoder. {html.escape(NOTE)} Point at a bubble.</p>
<svg width="{WIDTH}" height="{HEIGHT}" style="border:1px solid #ccc">{"".join(shapes)}
<text x="{WIDTH // 2}" y="{HEIGHT - 10}" text-anchor="middle">times real time (higher is faster)</text>
<text transform="translate(14 {HEIGHT // 2}) rotate(-90)" text-anchor="middle">WER, % (lower is better)</text></svg>
<div id="facts"></div>
<script>
const box = document.getElementById("facts");
for (const circle of document.querySelectorAll("circle")) {{
  circle.addEventListener("mousemove", event => {{
    box.textContent = circle.dataset.facts;
    box.style.display = "block";
    box.style.left = event.clientX + 14 + "px";
    box.style.top = event.clientY + 14 + "px";
  }});
  circle.addEventListener("mouseleave", () => {{ box.style.display = "none"; }});
}}
</script></html>
"""
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON lines of wer.py")
    parser.add_argument("--style", choices=("short", "long"), default="short")
    parser.add_argument("--output", type=Path, required=True, help="without .png and .html")
    options = parser.parse_args()
    rows = read_rows(options.rows, options.style)
    draw_png(rows, options.style, options.output.with_suffix(".png"))
    draw_page(rows, options.style, options.output.with_suffix(".html"))


if __name__ == "__main__":
    main()

"""The part of the page to play with that shows images: HTML in which all that a user or a config wrote is escaped."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from ctrl.play import Reading

CSS = """
.play-line { margin: 0 0 .6rem; font-size: 1.05rem; overflow-wrap: anywhere; }
.play-hint, .play-error { margin: 0 0 .6rem; padding: .5rem .75rem; border-radius: .5rem; overflow-wrap: anywhere; }
.play-hint { background: #fff4d6; color: #5c4300; }
.play-error { background: #fbdcdc; color: #7d1010; font-weight: 600; }
.play-totals { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem; margin-bottom: .75rem; }
.play-total, .play-pair { border: 1px solid var(--border-color-primary); border-radius: .6rem; }
.play-total { padding: .6rem .9rem; background: var(--background-fill-secondary); }
.play-total b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.play-pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: .75rem; }
.play-pair { padding: .6rem .7rem .7rem; }
.play-seed { margin-bottom: .35rem; font-size: .8rem; opacity: .75; }
.play-sides { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; }
.play-side { margin: 0; min-width: 0; }
.play-side img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: .4rem; background: #000; margin: 0; }
.play-small img { image-rendering: pixelated; }
.play-name { display: block; margin-top: .35rem; font-size: .8rem; opacity: .75; }
.play-reading { display: flex; flex-wrap: wrap; align-items: baseline; gap: .1rem .4rem; font-variant-numeric: tabular-nums; }
.play-verdict { padding: 0 .45rem; border-radius: 1rem; font-size: .8rem; line-height: 1.6; white-space: nowrap; }
.play-verdict { background: #e4e4e7; color: #333; }
.play-verdict.met { background: #1a7f37; color: #fff; }
.play-verdict.missed { background: #c8102e; color: #fff; }
"""
SIDES = ("pretrained", "with the label")


def error_html(message: object) -> str:
    """One clear line."""
    return f'<p class="play-error" role="alert">{escape(str(message))}</p>'


def data_uri(image: Image.Image) -> str:
    """The image itself, as PNG: nothing is written to disk, and what is shown is what was measured."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def results_html(
    prompt: str, asked: str, strength: float, seed: int, hints: Sequence[str], met_means: str,
    sides: Sequence[Sequence[tuple[Image.Image, Sequence[Reading]]]],
) -> str:  # fmt: skip
    """Pairs of images of the pretrained model and of the adapter, each with its readings; `sides` has the two lists."""
    line = f"“{escape(prompt)}”, asked for <b>{escape(asked)}</b> at strength {strength:g}"
    notes = "".join(f'<p class="play-hint">{escape(hint)}</p>' for hint in hints)
    totals = "".join(total_html(name, met_means, [readings for _, readings in side]) for name, side in zip(SIDES, sides, strict=True))
    pairs = "".join(
        f'<div class="play-pair"><div class="play-seed">seed {seed + k}</div><div class="play-sides">'
        + "".join(image_html(name, image, readings) for name, (image, readings) in zip(SIDES, pair, strict=True))
        + "</div></div>"
        for k, pair in enumerate(zip(*sides, strict=True))
    )
    return f'<p class="play-line">{line}</p>{notes}<div class="play-totals">{totals}</div><div class="play-pairs">{pairs}</div>'


def total_html(name: str, met_means: str, readings: Sequence[Sequence[Reading]]) -> str:
    """How many images are all that was asked for."""
    asked = [[reading.met for reading in image if reading.met is not None] for image in readings]
    count = f"{sum(map(all, asked))} of {len(asked)}" if any(asked) else "–"
    return f'<div class="play-total">{escape(name)}<b>{count}</b>{escape(met_means)}</div>'


def image_html(name: str, image: Image.Image, readings: Sequence[Reading]) -> str:
    """An image over what the oracles measured on it; small ones are shown in their own pixels."""
    small = " play-small" if max(image.size) <= 128 else ""
    told = "".join(reading_html(reading, len(readings) > 1) for reading in readings)
    picture, caption = f'<img src="{data_uri(image)}" alt="{escape(name)}">', f'<span class="play-name">{escape(name)}</span>{told}'
    return f'<figure class="play-side{small}">{picture}<figcaption>{caption}</figcaption></figure>'


def reading_html(reading: Reading, named: bool) -> str:
    """The measured score, and beside it the bin in green where it is the one that was asked for, else in red."""
    kind, sign = {True: (" met", "✓ "), False: (" missed", "✗ "), None: ("", "")}[reading.met]
    verdict = f'<span class="play-verdict{kind}">{sign}{escape(reading.verdict)}</span>' if reading.verdict else ""
    name = f'<span class="play-name">{escape(reading.name)}</span>' if named else ""
    return f'<div class="play-reading">{name}<b>{escape(reading.score)}</b>{verdict}</div>'

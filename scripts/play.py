"""A local page to play with an adapter: prompt, label, strength, seed; pretrained and controlled images, with what the oracle measures."""

import argparse
import os
import traceback
from pathlib import Path

import torch

import ctrl
from ctrl import errors, judged, play, play_page
from ctrl.adapter import escaped
from ctrl.figures.style import label_name, oracle_name
from ctrl.io import read_json
from ctrl.labels import factors_of
from scripts.common import DEFAULTS, add_config_argument, load_config

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # both are read by the import
try:
    import gradio as gr
except ImportError:
    gr = None

ADAPTER = Path("results/compressibility/adapters/ctrl")
ANY = -1  # the choice that leaves a factor free


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="folder of the trained adapter (default: %(default)s)")
    parser.add_argument("--base", help="diffusers folder or name on the hub (default: the one the adapter was made for)")
    parser.add_argument("--dataset", type=Path, help="folder with report.json, the labels' bins (default: the experiment's)")
    parser.add_argument("--cells", type=Path, help="cells.json: which labels a subject can take (default: the experiment's)")
    add_config_argument(parser)
    parser.set_defaults(config=None)  # that of the adapter's experiment: whose prompts were trained
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; another one lets others in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    experiment = args.adapter.parent.parent
    args.dataset = args.dataset or experiment / "dataset"
    args.cells = args.cells or experiment / "cells.json"
    args.config = args.config or [experiment / "config.json" if (experiment / "config.json").is_file() else DEFAULTS]
    return args


def load(args: argparse.Namespace) -> dict:
    """The pipeline, and what the page says about its labels and prompts."""
    if not (args.adapter / "adapter.json").is_file():
        raise errors.UserError(f"there is no adapter in {args.adapter}: `make demo` trains {ADAPTER}; or name another by --adapter")
    if gr is None:
        raise errors.UserError("gradio is not installed: `make play` installs it")
    described, report = read_json(args.adapter / "adapter.json"), read_json(args.dataset / "report.json")
    play.check_agree(described, report, str(args.dataset / "report.json"))
    torch.set_num_threads(args.num_threads)
    base, where = (args.base, {}) if args.base else (described["base"], described.get("base_files", {}))
    return {
        "about": "\n\n".join([f"`{args.adapter}` on `{base}`", *map(escaped, judged.words(judged.figures(factors_of(report))))]),
        "prompts": load_config(args)["prompts"],
        "report": report,
        "cells": read_json(args.cells) if args.cells.is_file() else {},
        "pipe": ctrl.load(base, args.adapter, "cuda" if torch.cuda.is_available() else "cpu", **where),
    }


def label_controls(report: dict, asked: list[play.Label], info: str | None) -> list:
    """A control for each factor, set to what is `asked`: the names of its labels, or a number."""
    if report.get("kind") == "continuous":
        return [gr.Number(asked[0], label=oracle_name(report), info=info, elem_id="label")]
    factors = factors_of(report)
    free = [("any", ANY)] if len(factors) > 1 else []
    names = [[(label_name(factor, y), y) for y in range(factor["num_classes"])] + free for factor in factors]
    starts = [ANY if y is None else y for y in asked]
    return [gr.Radio(n, value=y, label=oracle_name(f, with_unit=False)) for f, n, y in zip(factors, names, starts, strict=True)]


def answer(pieces: dict, prompt: str, strength: float, seed: int, num: int, *label: float) -> str:
    """What the page shows: images and readings, or one line on what is wrong."""
    prompts, report, cells, prompt = pieces["prompts"], pieces["report"], pieces["cells"], (prompt or "").strip()
    asked = [None if y == ANY and report.get("kind") != "continuous" else y for y in label]
    try:
        sides = play.draw(pieces["pipe"], prompt, asked, strength, seed, num)
        read = [[(image, play.read(image, report, asked)) for image in images] for images in sides]
        hints = play.hints(prompt, asked, prompts, report, cells)
        return play_page.results_html(prompt, play.name_of(report, asked), strength, int(seed), hints, play.met_means(report), read)
    except errors.UserError as error:
        return play_page.error_html(error)
    except Exception as error:  # out of memory, say: the page stays, and the terminal has the rest
        traceback.print_exc()
        return play_page.error_html(f"the images could not be drawn: {(str(error).splitlines() or [type(error).__name__])[0]}")


def page(pieces: dict) -> "gr.Blocks":
    """The page, which draws once when it is opened and then whenever it is asked to."""
    prompts, report, cells = pieces["prompts"], pieces["report"], pieces["cells"]
    first, asked = play.first_request(prompts, report, cells)
    with gr.Blocks(title="CTRL: play") as blocks:
        gr.Markdown("# CTRL\nThe pretrained model with and without a label, from the same noise; the oracle measures each image.")
        gr.Markdown(pieces["about"])
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                prompt = gr.Textbox(first, label="Prompt", max_length=play.MAX_PROMPT, elem_id="prompt")
                gr.Examples([[prompts["templates"]["train"][0].format(s)] for s in prompts["subjects"]], prompt, label="Subjects")
                continuous = report.get("kind") == "continuous"
                label = label_controls(report, asked, play.range_hint(first, prompts, report, cells) if continuous else None)
                strength = gr.Slider(0, 2, 1, step=0.1, label="Strength", info="0: pretrained, 1: as trained", elem_id="strength")
                with gr.Row():
                    seed = gr.Number(0, label="Seed", min_width=100, elem_id="seed")
                    num = gr.Number(4, label=f"Images (1 to {play.MAX_IMAGES})", min_width=100, elem_id="num")
                button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=3, min_width=300):
                shown = gr.HTML(elem_id="results", js_on_load=None)
        if continuous:
            told = lambda text: gr.update(info=play.range_hint(text, prompts, report, cells))  # noqa: E731
            prompt.change(told, prompt, label[0], show_progress="hidden", api_visibility="private")
        given = [prompt, strength, seed, num, *label]
        gr.on(
            [blocks.load, button.click, prompt.submit], lambda *values: answer(pieces, *values), given, shown, api_visibility="private"
        )  # one event: its queue draws one request at a time
    return blocks


def main() -> None:
    args = parse()
    blocks = page(load(args))
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no font from elsewhere
    try:
        blocks.launch(
            server_name=args.host, server_port=args.port, share=False, ssr_mode=False, quiet=True, prevent_thread_lock=True,
            footer_links=[], run_history=False, enable_monitoring=False, theme=theme, css=play_page.CSS,
        )  # fmt: skip
    except OSError as error:
        raise errors.UserError(f"cannot listen on {args.host}:{args.port} ({error}); give another --port, or --host") from error
    print(f"http://{args.host}:{args.port}/  (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    errors.main(main)

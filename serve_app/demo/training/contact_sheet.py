"""Draws the README's contact sheet: `python -m serve_app.demo.training.contact_sheet --out docs/contact-sheet.png`."""

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from serve_app.demo.training.evaluate import HERE, draw, load

PROMPTS = (
    "a red circle on a white background",
    "a large blue star on a cream background",
    "a small yellow square on a navy background",
    "a green triangle on a gray background",
    "a large pink cross on a black background",
    "a purple outlined star on a brown background",
    "a large orange striped circle on a navy background",
    "a cyan dotted square on a black background",
    "a large green dotted circle on a white background",
    "a blue outlined triangle on a cream background",
    "a red striped square on a gray background",
    "a large yellow outlined cross on a brown background",
    "a red circle left of a blue square on a white background",
    "a yellow star right of a purple circle on a navy background",
    "a green triangle above an orange square on a cream background",
    "a pink cross below a cyan star on a black background",
    "a large purple striped square left of a small yellow star on a gray background",
    "a small orange circle above a large green triangle on a brown background",
    "a cyan dotted circle right of a red outlined triangle on a white background",
    "a blue striped star below a pink outlined square on a cream background",
    "a yellow circle above a blue circle on a black background",
    "a large red dotted cross left of a cyan square on a navy background",
    "a purple triangle right of a green star on a gray background",
    "an orange outlined circle below a large pink dotted triangle on a white background",
)
COLUMNS = 6
GAP_PX = 12
CAPTION_PX = 46


def contact_sheet(pictures: list[Image.Image], captions: list[str]) -> Image.Image:
    """Pictures of one size in rows of `COLUMNS`, each above its caption."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // COLUMNS)
    cell = (width + GAP_PX, height + CAPTION_PX)
    sheet = Image.new("RGB", (COLUMNS * cell[0] + GAP_PX, rows * cell[1] + GAP_PX), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    for index, (picture, text) in enumerate(zip(pictures, captions, strict=True)):
        left, top = GAP_PX + index % COLUMNS * cell[0], GAP_PX + index // COLUMNS * cell[1]
        sheet.paste(picture, (left, top))
        pen.rectangle((left - 1, top - 1, left + width, top + height), outline=(200, 200, 200))
        pen.multiline_text((left, top + height + 3), textwrap.fill(text, 27), fill="black", font=font, spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--folder", type=Path, default=HERE, help="where base and refiner stand")
    args = parser.parse_args()
    base, refiner = load(args.folder / "base"), load(args.folder / "refiner")
    pictures = draw(base, PROMPTS, range(len(PROMPTS)), args.guidance, refiner=refiner)
    contact_sheet(pictures, list(PROMPTS)).save(args.out)


if __name__ == "__main__":
    main()

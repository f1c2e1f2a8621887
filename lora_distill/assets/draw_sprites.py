"""Draw `sprites.png` from the two emoji packages it comes from (needs resvg-py; run once, by hand).

npm install @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji-flat@1.2.6
python draw_sprites.py node_modules/@iconify-json
"""

import io
import json
import sys
from pathlib import Path

import resvg_py
from PIL import Image

SIZE = 48
PACKAGES = {"noto": "noto", "fluent": "fluent-emoji-flat"}
ICONS = [
    *("lion", "frog", "panda", "pig-face", "owl", "octopus", "butterfly", "penguin", "whale"),
    *("red-apple", "watermelon", "pineapple", "hamburger", "doughnut"),
    *("automobile", "bus", "house", "soccer-ball", "umbrella", "evergreen-tree", "cactus", "mushroom", "crown"),
    "wrapped-gift",
]


def sprite(package: dict, icon: str) -> Image.Image:
    """One icon as a SIZE x SIZE picture with transparency."""
    body = package["icons"][icon]["body"]
    side = package.get("width", 16)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {side} {side}" width="{SIZE}" height="{SIZE}">{body}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def main(packages: Path) -> None:
    sheet = Image.new("RGBA", (SIZE * len(ICONS), SIZE * len(PACKAGES)))
    for row, name in enumerate(PACKAGES.values()):
        package = json.loads((packages / name / "icons.json").read_text(encoding="utf-8"))
        for column, icon in enumerate(ICONS):
            sheet.paste(sprite(package, icon), (column * SIZE, row * SIZE))
    sheet.save(Path(__file__).with_name("sprites.png"), optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The pictures of README.md and docs/quickstart.md and the demo's output that both quote, from two runs of the demo.

    python docs/make_screenshot.py

One run shows the whole story. The other one ends at the warning, so that its heatmap is that of the warning.
Writes docs/assets/demo.png and docs/assets/demo_losses.png, and the text between the two comments of each page:

    <!-- demo output -->
    <!-- end -->
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from textwrap import wrap

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "docs" / "assets"
PAGES = ("README.md", "docs/quickstart.md")
QUOTED = re.compile(r"(<!-- demo output -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 100  # columns of the quoted output
COLOURS = 256  # a palette makes the files a third as large
FONT_SIZE, MARGIN = 15, 16  # pixels


def demo(folder: Path, *options: str) -> str:
    """What `hnf-attention demo` prints; its files go into the folder."""
    command = [sys.executable, "-m", "hnf_attention", "demo", "--out", str(folder), *options]
    # A run that ends at the warning keeps no promise of the demo, and says so by its exit code.
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    if done.returncode > 1:
        raise SystemExit(f"expected the demo to run, got exit code {done.returncode}")
    return done.stdout


def block(output: str, title: str) -> list[str]:
    """The first line that contains the title and the indented lines after it, without the console's line breaks."""
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if title in line)
    indented = []
    for line in lines[start + 1 :]:
        if not line.startswith(" "):
            break
        indented.append(line.strip())
    return [lines[start].strip(), *indented]


def alert(output: str, title: str, width: int) -> list[str]:
    """A warning of the demo as lines of that many columns: title, issue and evidence."""
    first, issue, *evidence = block(output, title)
    text = wrap(" ".join(evidence), width, initial_indent="    ", subsequent_indent="    ")
    return [first, f"    {issue}", *text]


def quoted(output: str) -> str:
    """The demo's output in short."""
    verdict = [f"  {line}" for line in block(output, "Verdict")[1:]]
    warning, alarm = (alert(output, title, WIDTH) for title in ("EARLY WARNING", "ALARM"))
    if alarm[2:] == warning[2:]:  # one issue gave both
        del alarm[2:]
    lines = ["$ hnf-attention demo", *warning, *alarm]
    lines += ["...", *(part for line in verdict for part in wrap(line, WIDTH, subsequent_indent="    "))]
    return "\n".join(["```text", *lines, "```", ""])


def captioned(picture: Path, lines: list[str]) -> Image.Image:
    """The picture with lines of text below it."""
    image = Image.open(picture).convert("RGB")
    font = ImageFont.truetype(findfont("DejaVu Sans Mono"), FONT_SIZE)
    step = FONT_SIZE + 6
    width = max(image.width, *(int(font.getlength(line)) + 2 * MARGIN for line in lines))
    sheet = Image.new("RGB", (width, image.height + step * len(lines) + 2 * MARGIN), "white")
    sheet.paste(image, ((width - image.width) // 2, 0))
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((0, image.height, width, sheet.height), fill="#1e1e2e")
    for number, line in enumerate(lines):
        pen.text((MARGIN, image.height + MARGIN + step * number), line, fill="#e6e6e6", font=font)
    return sheet


def save(image: Image.Image, name: str) -> None:
    image.quantize(COLOURS).save(ASSETS / name, optimize=True)
    print(f"docs/assets/{name}: {(ASSETS / name).stat().st_size / 1e3:.0f} kB")


def main() -> None:
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as begun:
        output = demo(Path(whole))
        warning = block(output, "EARLY WARNING")[0]
        step = re.search(r"step (\d+)", warning)[1]
        demo(Path(begun), "--steps", step)
        save(captioned(Path(begun, "untreated_entropy.png"), alert(output, "EARLY WARNING", 88)), "demo.png")
        save(Image.open(Path(whole, "losses.png")).convert("RGB"), "demo_losses.png")
    for name in PAGES:
        page = ROOT / name
        text, places = QUOTED.subn(
            lambda match: match[1] + quoted(output) + match[2], page.read_text(encoding="utf-8")
        )
        if places != 1:
            raise SystemExit(f"expected one place for the demo's output in {name}, got {places}")
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

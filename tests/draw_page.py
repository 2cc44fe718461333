"""Draw docs/pictures/page*.png: the page of `llamacli serve` with the small model, in Chromium. `python tests/draw_page.py`."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "serve"))

from browser import Browser  # noqa: E402

OUT = ROOT / "docs" / "pictures"
PICTURE = ROOT / "models" / "scout-tiny" / "pictures" / "three-red-squares.png"
STILL = "!document.querySelector('[aria-busy]')"


def ask(tab, question, n):
    tab.click("#question")
    tab.type(question)
    tab.js("document.querySelector('#ask').requestSubmit()")
    tab.wait(f"document.querySelectorAll('article.answer').length === {n} && {STILL}", seconds=120)


def keep(tab, name):
    tab.js("document.activeElement.blur()")
    image = Image.open(BytesIO(tab.picture())).convert("RGB").quantize(96, dither=Image.Dither.NONE)
    image.save(OUT / name, optimize=True)


def main():
    command = [sys.executable, "-m", "llamacli", "serve", "--port", "0", "--ctx", "8K", "-m", "scout-tiny"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    browser = Browser()
    try:
        url = process.stdout.readline().strip()
        tab = browser.tab(url, width=1000, height=640)
        settings = {"system": "", "temperature": 0, "longest": 200}
        tab.js(f"localStorage.setItem('llamacli.settings', {json.dumps(json.dumps(settings))})")
        tab.reload()
        for question in ("What do elephants eat?", "Name a planet."):
            ask(tab, question, 1)
            tab.click("#new")
        for n, question in enumerate(("What is the capital of France?", "And of Italy?"), 1):
            ask(tab, question, n)
        keep(tab, "page.png")
        tab.look(390, 700, dark=True, phone=True, scale=1.5)
        tab.tap("#open")
        tab.wait("document.querySelector('#side').getBoundingClientRect().x === 0")
        tab.tap("#new")
        tab.wait("document.querySelector('#side').getBoundingClientRect().x < -200")
        tab.files("#file", PICTURE)
        tab.wait("document.querySelectorAll('#attached img').length === 1")
        ask(tab, "What is in this picture?", 1)
        ask(tab, "What is the opposite of left?", 2)
        keep(tab, "page-phone.png")
        tab.close()
    finally:
        browser.close()
        process.kill()
        process.communicate()


main()

"""A picture of the page that `hymba serve` has at /, after a message and its answer.

python benchmarks/chat_page.py [--model runs/tiny] [--picture FILE]

The demo was not trained on conversations: its template is their text alone, so that it continues
what is written. Needs the package playwright, and Chromium on the path.
"""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from playwright.sync_api import expect, sync_playwright
from serving import server

from hymba_jax.checkpoint.load import load_model
from hymba_jax.checkpoint.save import save_model
from hymba_jax.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@dataclass(frozen=True)
class Options:
    """What to show.

    Attributes:
      seed: of the answer.
    """

    model: Path = Path("runs/tiny")
    message: str = (
        'class Parser:\n    """Reads a file and returns its lines."""\n\n    def __init__(self'
    )
    seed: int = 1
    max_tokens: int = 90
    picture: Path = Path("chat.png")


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "demo")
        given = Tokenizer.load(options.model)
        tokenizer = Tokenizer(given.model, given.bos, given.eos, TEMPLATE, given.named_tokens)
        save_model(model, load_model(options.model), tokenizer)
        with server(model, "--context", "512") as (url, _), sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 720, "height": 560})
            page.goto(url.removesuffix("v1"))
            expect(page.locator("#model")).to_have_value("demo")
            page.fill("#seed", str(options.seed))
            page.fill("#max_tokens", str(options.max_tokens))
            page.fill("#text", options.message)
            page.click("#send")
            expect(page.locator("#send")).to_be_enabled(timeout=60_000)
            expect(page.locator("#speed")).to_have_text(re.compile("tokens/s"))
            page.screenshot(path=options.picture)
            browser.close()


if __name__ == "__main__":
    main(tyro.cli(Options))

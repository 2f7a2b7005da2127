"""The page at /, in Chromium: what a person does there.

Nothing here evaluates text in the page, which its content security policy forbids.
"""

import re
import shutil
import time

import pytest
from serving.served import model, serving, wait_until

from hymba_jax.serving.served_model import ApiOptions

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def served():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with serving(ApiOptions(("secret",), max_tokens=40)) as (url, thread):
        thread.script = {"SAY": "Hello <b>you</b>"}
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            # As Safari has it.
            page.add_init_script("delete ReadableStream.prototype[Symbol.asyncIterator]")
            errors = []
            page.on("pageerror", lambda error: errors.append(error))
            page.goto(url)
            yield page, thread, sync_api.expect
            browser.close()
        assert errors == []


@pytest.mark.slow
def test_a_conversation(served):
    """A key that is missing, an answer as text and not as HTML, speed, and a new chat."""
    page, _, expect = served
    page.fill("#text", "SAY")
    page.keyboard.press("Enter")
    expect(page.locator(".error")).to_contain_text("API key")
    page.click("#reset")
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    expect(page.locator("#model")).to_have_value("tiny")
    page.fill("#text", "SAY")
    page.keyboard.press("Enter")
    expect(page.locator(".assistant")).to_have_text("Hello <b>you</b>")
    expect(page.locator("#send")).to_be_enabled()
    page.fill("#max_tokens", "40")
    page.fill("#seed", "3")
    page.click("#reset")
    page.fill("#text", "x")
    page.click("#send")
    expect(page.locator("#speed")).to_have_text(re.compile(r"^\d+ tokens, [0-9.]+ tokens/s$"))
    expect(page.locator("#send")).to_be_enabled()
    assert page.locator("#messages p").count() == 2


@pytest.mark.slow
def test_stop(served, monkeypatch):
    """The slot is free at once; the answer so far stays, and is part of the next prompt."""
    page, thread, expect = served
    scheduler, completed = thread.scheduler, thread.scheduler.num_completed
    decode = scheduler._decode

    def slowly():
        time.sleep(0.5)  # twenty seconds for an answer
        decode()

    monkeypatch.setattr(scheduler, "decode_steps", 1)
    monkeypatch.setattr(scheduler, "_decode", slowly)
    page.click("#reset")
    page.fill("#text", "x")
    page.click("#send")
    expect(page.locator(".assistant")).to_have_text(re.compile(r"\S"))
    page.click("#stop")
    expect(page.locator("#send")).to_be_enabled()
    wait_until(lambda: not scheduler.has_work, seconds=5)
    assert scheduler.num_completed == completed
    answer = page.locator(".assistant").text_content()
    assert page.locator(".error").count() == 0
    page.fill("#text", "SAY")
    page.click("#send")
    expect(page.locator(".assistant").last).to_have_text("Hello <b>you</b>")
    assert f"[u]x[a]{answer}[u]SAY[a]" in model().tokenizer.decode(list(thread.asked[-1].prompt))

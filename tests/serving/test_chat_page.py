"""The page at /, in Chromium: what a person does there."""

import shutil

import pytest
from serving.served import serving

from hymba_jax.serving.served_model import ApiOptions

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with serving(ApiOptions(("secret",), max_tokens=40)) as (url, thread):
        thread.script = {"SAY": "Hello <b>you</b>"}
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            errors = []
            page.on("pageerror", lambda error: errors.append(error))
            page.goto(url)
            yield page
            browser.close()
        assert errors == []


@pytest.mark.slow
def test_a_conversation(page):
    """A key that is missing, an answer as text and not as HTML, speed, stop, and a new chat."""
    page.fill("#text", "SAY")
    page.keyboard.press("Enter")
    page.wait_for_selector(".error")
    assert "API key" in page.inner_text(".error")
    page.click("#reset")
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    page.wait_for_selector("#model option", state="attached")
    assert page.input_value("#model") == "tiny"
    page.fill("#text", "SAY")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.assistant')?.textContent.endsWith('</b>')")
    assert page.inner_text(".assistant") == "Hello <b>you</b>"
    page.wait_for_function("!document.getElementById('send').disabled")
    page.fill("#max_tokens", "40")
    page.fill("#seed", "3")
    page.click("#reset")
    page.fill("#text", "x")
    page.click("#send")
    page.wait_for_function("/[0-9] tokens\\/s/.test(document.getElementById('speed').textContent)")
    page.wait_for_function("!document.getElementById('send').disabled")
    assert page.locator("#messages p").count() == 2


@pytest.mark.slow
def test_stop(page):
    """The answer so far stays, and the slot is free for the next message."""
    page.click("#reset")
    page.evaluate(
        """() => {
            const fetched = window.fetch;
            window.fetch = (url, options) => url.includes("chat")
                ? new Promise((_, reject) => options.signal.addEventListener("abort",
                    () => reject(new DOMException("stopped", "AbortError"))))
                : fetched(url, options);
        }"""
    )
    page.fill("#text", "x")
    page.click("#send")
    page.wait_for_selector("#stop:not([disabled])")
    page.click("#stop")
    page.wait_for_selector("#send:not([disabled])")
    assert page.locator(".error").count() == 0

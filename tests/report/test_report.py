"""The page of `hymba report`, read by Python's own HTML parser and by a browser."""

import argparse
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from inference.models import byte_tokenizer, make_model

from hymba_jax import cli
from hymba_jax.checkpoint.save import save_model
from hymba_jax.errors import HymbaError
from hymba_jax.inference import LanguageModel
from hymba_jax.report.costs import Speed, measure_speed
from hymba_jax.report.page import Section
from hymba_jax.report.training import read_metrics

LENGTH, SEQUENCES = 48, 2
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
VOID = {"meta", "br", "hr", "img", "input", "link"}

METRICS = [
    {"step": 5, "loss": 0.5, "tokens_seen": 240, "stage": "first"},
    {"step": 10, "loss": 5.5, "tokens_seen": 480, "learning_rate": 0.1, "grad_norm": None},
    {"step": 20, "loss": 4.25, "tokens_seen": 960, "learning_rate": 0.05, "grad_norm": 1.5},
]
METRICS[-1] |= {"validation_loss": 4.5, "validation_bits_per_byte": 2.3456}

TASKS = {
    "piqa": {"alias": "piqa", "acc,none": 0.53125, "acc_stderr,none": 0.0125},
    "gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"},
}
MEASURED = {"nats_per_token": 2.5, "perplexity": 12.1825, "bits_per_byte": 3.6067}
DOCUMENTS = {
    **{name: {"value": value, "standard_error": 0.125} for name, value in MEASURED.items()},
    "data": "texts",
    "documents": 3,
    "tokens": 600,
    "window": 64,
    "text_bytes": 600,
    "by_position": [
        {"start": 1 + 16 * i, "stop": 17 + 16 * i, "bits_per_byte": 4.0 - i} for i in range(2)
    ],
}

NEEDLES = {
    "data": "texts",
    "trials": 4,
    "lengths": [64, 128],
    "depths": [0.0, 1.0],
    "accuracy": [[0.25, 1.0], [0.0, 0.5]],
    "nats_per_token": [[2.0, 0.125], [3.0, 1.5]],
    "nats_per_token_without_needle": [4.0, 4.5],
}

# Objects that `hymba evaluate` does not write.
OTHERS = [
    NEEDLES | {"accuracy": [0.5]},
    {},
    {"by_position": []},
    {"results": {"piqa": 0.5}},
    DOCUMENTS | {"bits_per_byte": {"value": "low"}},
    DOCUMENTS | {"by_position": [{"start": 1}]},
    DOCUMENTS | {"by_position": [{"start": 1, "stop": 2, "bits_per_byte": "low"}] * 2},
]


class Page(HTMLParser):
    """What a page has, by tag; an element that is not closed is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts, self.rows = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *each) for each in attrs]
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *each) for each in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open:
            self.texts[tag][-1] += data
        if set(self.open) & {"td", "th"}:
            self.rows[-1][-1] += data

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def model():
    return make_model(layers="W-")  # without an MLP: it compiles faster


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    """A model with the metrics of a run, and three files of evaluations."""
    path = tmp_path_factory.mktemp("report")
    save_model(path / "model", model, byte_tokenizer())
    lines = "".join(json.dumps(line) + "\n" for line in METRICS)
    (path / "model/metrics.jsonl").write_text(lines)
    (path / "a<b>.json").write_text(json.dumps({"results": TASKS}))
    (path / "documents.json").write_text(json.dumps(DOCUMENTS))
    (path / "needles.json").write_text(json.dumps(NEEDLES))
    return path


def command(directory, *options):
    usual = {
        "--model": str(directory / "model"),
        "--output": str(directory / "report.html"),
        "--length": str(LENGTH),
        "--sequences": str(SEQUENCES),
    }
    others = (pair for pair in usual.items() if pair[0] not in options)
    return ["report", *itertools.chain(*others, options)]


@pytest.fixture(scope="module")
def html(directory):
    """The page, with a speed that needs no programs."""
    files = [str(directory / name) for name in ("a<b>.json", "documents.json", "needles.json")]
    with pytest.MonkeyPatch.context() as patch:
        speeds = [Speed(8, 256, 98765.4, 1234.5)]
        patch.setattr("hymba_jax.report.command.measure_speed", lambda model, tokens: speeds)
        cli.main(command(directory, "--evaluations", *files))
    return (directory / "report.html").read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_all_is_in_the_page(html, page):
    assert not {"script", "link", "iframe", "img"} & {tag for tag, *_ in page.attributes}
    for name in ("href", "src", "xlink:href"):
        assert all(value.startswith(("#", "data:")) for value in page.values(name))
    assert "@import" not in html
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    targets = [value[1:] for name in ("href", "xlink:href") for value in page.values(name)]
    targets += re.findall(r"url\(#([^)]*)\)", html)
    assert {each for each in targets if not each.startswith("ata:")} <= set(ids)
    assert all(each.startswith("#") for each in re.findall(r"url\(([^)]*)\)", html))


def test_sections_and_figures(page):
    names = ["Training", "Evaluations", "Looking inside", "Memory and speed", "Configuration"]
    assert page.texts["h2"] == names
    for tag in ("figure", "svg", "figcaption"):
        assert len(page.texts[tag]) == 10
    assert all(page.texts["figcaption"])
    assert len([value for value in page.values("aria-label") if value]) == 1 + 10
    figures = " ".join(page.texts["svg"])
    for label in ("nats per token", "depth of the needle", "share of attention", "entropy, nats"):
        assert label in figures
    for label in ("without SSM heads", "from position", "|beta|", "mean |output|", "tokens back"):
        assert label in figures
    assert "window KV" in figures


def test_numbers_are_those_of_the_model(page, model):
    """Parameters, cache and loss from the model itself; the loss in float64."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert ["in all", f"{parameters:,}", "100.0%"] in page.rows
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(model.init_state(1, 512).layers))
    assert ["cache of a sequence of 512 tokens", f"{cache / 1e6:.1f} MB"] in page.rows
    tokens = byte_tokenizer().encode(inspect.getsource(argparse))[: (LENGTH - 1) * SEQUENCES]
    tokens = np.array(tokens).reshape(SEQUENCES, LENGTH - 1)
    tokens = np.pad(tokens, ((0, 0), (1, 0)), constant_values=byte_tokenizer().bos_id)
    logits = np.asarray(jax.jit(lambda tokens: model(tokens))(jnp.asarray(tokens)), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], -1).mean()
    (shown,) = re.findall(
        r"The loss on this text is ([\d.]+) nats",
        " ".join(page.texts["p"] + page.texts["figcaption"]),
    )
    assert float(shown) == pytest.approx(nats, abs=6e-4)  # three decimals, of float32


def test_numbers_are_those_of_the_files(page):
    for row in (
        ["steps", "20"],
        ["training loss", "4.2500"],
        ["validation, bits per byte", "2.3456"],
        ["piqa", "acc", "0.5312", "0.0125"],
        ["gsm8k", "exact_match, strict-match", "0.5000", ""],
        ["perplexity per token", "12.1825", "0.1250"],
        ["128", "100%", "50%", "1.5000"],
        ["8", "256", "98,765", "1,234"],
    ):
        assert row in page.rows
    assert page.texts["dd"][1:3] == ["2.346", "960"]
    assert "Tasks: a<b>.json" in page.texts["h3"]
    assert 'layers = "W-"' in page.texts["pre"][0]


@pytest.mark.slow
def test_speeds_count_the_tokens_of_all_sequences(model, monkeypatch):
    """By a clock that is a second later at each look; prompts are as short as the context asks."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("hymba_jax.report.costs.time", clock)
    speeds = measure_speed(LanguageModel(model, byte_tokenizer(), context=100), [*range(60, 120)])
    assert speeds == [Speed(1, 35, 35, 64), Speed(8, 35, 8 * 35, 8 * 64)]
    assert measure_speed(LanguageModel(model, byte_tokenizer(), context=64), [5] * 64) == []


def test_speeds_are_of_as_many_sequences_as_fit(model, monkeypatch):
    language_model = LanguageModel(model, byte_tokenizer(), context=100)
    sizes = [language_model.engine.memory_bytes(rows, 100) for rows in (1, 2, 4)]
    monkeypatch.setattr("hymba_jax.report.costs._measure", lambda model, prompt, batch: batch)
    for memory, expected in ((sizes[2], [1, 4]), (sizes[2] - 1, [1, 2]), (sizes[0], [1])):
        monkeypatch.setattr("hymba_jax.parallel.memory.device_memory", lambda _, size=memory: size)
        assert measure_speed(language_model, [*range(60, 120)]) == expected
    monkeypatch.setattr("hymba_jax.parallel.memory.device_memory", lambda _: sizes[0] - 1)
    with pytest.raises(HymbaError, match=r"^1 sequences of \d+ tokens beside .*: reduce"):
        measure_speed(language_model, [*range(60, 120)])


def test_a_model_without_a_run_has_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n')
    with pytest.raises(HymbaError, match=r"metrics.jsonl: a line is damaged"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluations", "{0}/model/metrics.json"], "metrics.json: no such file"),
        *(
            (["--evaluations", f"{{0}}/other{i}.json"], f"other{i}.json: not a file that `hymba ev")
            for i in range(len(OTHERS))
        ),
        (["--length", "513"], "length is 513, the model's context is 512: give less"),
        (["--length", "8"], "length is 8, below 32"),
        (["--text", "{0}/short.txt"], r"short.txt: 5 tokens, 2 sequences of 48 take 94"),
        (["--output", "/no/where.html"], "there is no directory /no"),
        (["--model", "{0}"], "no model found"),
    ],
)
def test_errors_are_one_line(directory, options, message):
    for i, other in enumerate(OTHERS):
        (directory / f"other{i}.json").write_text(json.dumps(other))
    (directory / "short.txt").write_text("short")
    with pytest.raises(SystemExit, match=message) as error:
        cli.main(command(directory, *(each.format(directory) for each in options)))
    assert "\n" not in str(error.value)


def test_what_takes_a_while_is_announced(directory, monkeypatch, capsys):
    parts = {"measure_speed": [], "analyses_section": Section("Looking inside")}
    for name, result in parts.items():
        monkeypatch.setattr(f"hymba_jax.report.command.{name}", lambda *_, it=result: it)
    output = str(directory / "announced.html")
    cli.main(command(directory, "--output", output))
    assert capsys.readouterr().out.splitlines() == [
        "loading the model…",
        "measuring the speed…",
        "analyzing the model on Python's module argparse…",
        output,
    ]


def test_it_takes_an_extra(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r'pip install "hymba_jax\[plots\]"'):
        cli.main(command(directory))


PROBE = """<script>
addEventListener("load", () => {
  const boxes = [...document.querySelectorAll("figure svg")].map(e => e.getBoundingClientRect());
  const ink = element => getComputedStyle(element).color;
  document.body.dataset.probe = JSON.stringify({
    overflow: document.documentElement.scrollWidth - innerWidth,
    boxes: boxes.map(box => [box.width, box.height]),
    requests: performance.getEntriesByType("resource").map(e => e.name)
      .filter(name => !name.startsWith("data:")),
    ink: [ink(document.body), ink(document.querySelector("svg text"))],
    ground: getComputedStyle(document.body).backgroundColor,
  });
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no browser is installed: chromium or google-chrome")
class TestBrowser:
    def run(self, tmp_path, *options):
        headless = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/browser",
        ]
        result = subprocess.run(
            [BROWSER, *headless, *options], capture_output=True, text=True, timeout=120, check=True
        )
        return result.stdout

    @pytest.mark.parametrize("width", [500, 1200])
    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_it_fits_and_follows_the_theme(self, html, tmp_path, width, theme):
        (tmp_path / "page.html").write_text(html.replace("</body>", PROBE + "</body>"))
        options = [f"--window-size={width},900", "--dump-dom", f"file://{tmp_path}/page.html"]
        options += ["--force-dark-mode"] * (theme == "dark")
        dom = self.run(tmp_path, *options)
        (probe,) = re.findall(r'data-probe="([^"]*)"', dom)
        probe = json.loads(probe.replace("&quot;", '"'))
        assert probe["overflow"] <= 0
        assert len(probe["boxes"]) == html.count("<figure") > 5
        assert all(w > 0.7 * width - 100 or w > 700 for w, _ in probe["boxes"])
        assert all(h > w / 5 for w, h in probe["boxes"])
        assert probe["requests"] == []
        brightness = [
            sum(map(int, re.findall(r"\d+", color)[:3])) / 3
            for color in (*probe["ink"], probe["ground"])
        ]
        dark = theme == "dark"
        assert [each > 128 for each in brightness] == [dark, dark, not dark]

    def test_it_prints(self, html, tmp_path):
        (tmp_path / "page.html").write_text(html)
        self.run(tmp_path, f"--print-to-pdf={tmp_path}/page.pdf", f"file://{tmp_path}/page.html")
        pages = (tmp_path / "page.pdf").read_bytes().count(b"/Type /Page\n")
        assert 4 <= pages <= 12

"""The page about runs: written by hand, hostile, broken, one that was trained; seen by a browser if there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import fiddle as fdl
import numpy as np
import pytest
import tiny

from jentropy import cli
from jentropy.base import Rollouts
from jentropy.data.tokenizer import char_tokenizer
from jentropy.report import atlas as atlas_lib
from jentropy.report.atlas import choose, levels
from jentropy.report.report import report
from jentropy.report.tokens import Decoder, load_tokens
from jentropy.train import kept, loop
from jentropy.train.ledger import Ledger
from jentropy.train.quarantine import Batch

CONFIG = {
    "name": "'law_grpo'",
    "seed": "0",
    "stages.0": "jentropy.train.experiment.Supervised(...)",
    "stages.0.seed": "0",
    "stages.1": "jentropy.train.experiment.Reinforce(...)",
    "stages.1.steps": "40",
    "stages.1.objective.mechanisms.clip_range.high": "0.2",
}
HOSTILE = "</script><img src=x onerror=alert(1)>\u202egnp.exe\u202c \"'&\x1b[2J\u200b"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def lines(num_steps=40, offset=0.0, final=True, every=4):
    """A run that follows the law."""
    found = []
    for step in range(num_steps + 1):
        entropy = 0.8 * np.exp(-step / 15) + offset
        held_out = {"val/entropy": entropy, "val/reward/mean@8": 1.48 - 0.5 * np.exp(entropy), "val/pass@8": 0.9}
        line = {"step": step, "stage": "law"}
        if step == num_steps:
            found += [{**line, **held_out, "val/reward/greedy": 0.97, "final": True}] if final else []
            continue
        found += [{**line, **held_out}] if step % every == 0 else []
        found.append({**line, "actor/entropy": entropy, "actor/pg_clipfrac": 0.01, "response_length/mean": 5.0})
    return found


def ledger(num_steps=40):
    found = []
    for step in range(num_steps):
        change = -0.01 * np.exp(-step / 10)
        parts = {"0": 0.25, "1-": 0.75}
        line = {"step": step, "stage": "law", "ledger/entropy_change": change, "ledger/lemma1": 1.1 * change}
        line |= {f"ledger/difficulty/{p}/entropy_change": s * change for p, s in parts.items()}
        line |= {f"ledger/difficulty/{p}/lemma1": s * change * 1.1 for p, s in parts.items()}
        line |= {f"ledger/difficulty/{p}/covariance": s * 0.2 * s for p, s in parts.items()}
        line |= {f"ledger/difficulty/{p}/fraction": s for p, s in parts.items()}
        line |= {f"ledger/mechanism.<b>cov/{p}/entropy_change": change / 2 for p in ("touched", "untouched")}
        line |= {f"ledger/mechanism.<b>cov/{p}/fraction": 0.5 for p in ("touched", "untouched")}
        found.append(line | ({"ledger/first_order": 0.9 * change} if step % 10 == 0 else {}))
    return found


def as_text(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path):
    """Writes a run's folder."""

    def write(folder, metrics, changes=(), ledger=None):
        path = tmp_path / folder
        path.mkdir()
        (path / "metrics.jsonl").write_text(as_text(metrics))
        (path / "config.txt").write_text("".join(f"{k} = {v}\n" for k, v in {**CONFIG, **dict(changes)}.items()))
        if ledger is not None:
            (path / "ledger.jsonl").write_text(as_text(ledger))
        return path

    return write


def save_rollout(run, step=12, text=HOSTILE, rows=4, token_data=()):
    """Keeps a rollout whose responses are all of `text`, one character a token, after a prompt of two tokens."""
    tokenizer = char_tokenizer([text])
    ids = np.concatenate([[2, 3], tokenizer.encode(text), [tokenizer.eos_id, 0]]).astype(np.int32)
    tokens = np.tile(ids, (rows, 1))
    mask = np.zeros(tokens.shape, bool)
    mask[:, 2:-1] = True
    rng = np.random.default_rng(0)
    rollouts = Rollouts(
        tokens=tokens, loss_mask=mask, logp_sampler=np.zeros(tokens.shape, np.float32),
        logp_old=np.where(mask, -rng.exponential(size=tokens.shape), np.nan).astype(np.float32),
        rewards=np.arange(rows, dtype=np.float32)[:, None] % 2, row_id=np.arange(rows, dtype=np.int32),
        group=np.arange(rows, dtype=np.int32) // 2, parent=np.full(rows, -1, np.int32),
        fork=np.full(rows, 2, np.int32), token_data={k: np.broadcast_to(v, tokens.shape) for k, v in token_data},
    )  # fmt: skip
    what = {"step": step, "stage": "law", "stage_index": 1, "seed": 0, "rewards": ["right"]}
    kept.save_rollouts(run / "rollouts", Batch(rollouts, np.arange(rows // 2)), what)
    return tokenizer


def page(tmp_path, runs, name="report.html", **options):
    report(runs, tmp_path / name, **options)
    return (tmp_path / name).read_text(encoding="utf-8")


class _Reader(HTMLParser):
    """Tags with their attributes, text, and whether tags are closed in order."""

    VOID = ("meta", "input", "br")

    def __init__(self):
        super().__init__()
        self.tags, self.words, self._open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def done(self, content):
        self.feed(content)
        self.close()
        assert not self._open
        return self


def read(content):
    """The page as parsed; whatever is in it, it is well-formed, needs nothing from outside and runs nothing."""
    reader = _Reader().done(content)
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "img", "iframe", "link", "object", "embed", "base", "form", "foreignobject", "use"}
    attributes = [(name, value) for _, attrs in reader.tags for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "style", "xmlns")]
    assert all(value.startswith("#") for name, value in attributes if name == "href")
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids)) and "http" not in content.replace("http-equiv", "")
    return reader


def section(content, name):
    return content.partition(f'<section id="{name}">')[2].partition("</section>")[0]


def test_a_page_of_two_methods(write, tmp_path):
    runs = [write(f"grpo{s}", lines(offset=s / 100), {"seed": s, "name": f"'grpo_{s}'"}) for s in range(3)]
    higher = {"stages.1.objective.mechanisms.clip_range.high": "0.28", "name": "'clip_higher'"}
    runs.append(write("higher", lines(), higher))
    content = page(tmp_path, runs)
    read(content)
    assert "<h1>2 methods, 4 runs</h1>" in content
    methods = section(content, "methods")
    assert "0.010 [" not in methods  # the interval of the last rollouts' entropies is over seeds
    assert re.search(r"grpo</td><td>3</td><td>0\.9\d\d \[0\.9\d\d, 0\.9\d\d\]</td>", methods)
    assert re.search(r"clip_higher</td><td>1</td><td>0\.9\d\d</td>", methods)
    curves = section(content, "curves")
    assert curves.count('class="b c0"') >= 3 and 'class="b c1"' not in curves
    assert "95 % bootstrap interval" in curves
    configs = section(content, "configs")
    differences = configs.partition("<tbody>")[2].partition("</table>")[0]
    assert "clip_range.high" in differences and "0.28" in differences and "seed" not in differences
    assert "seed = 1; " in configs or "name = &#x27;grpo_1&#x27;; seed = 1" in configs
    law = section(content, "law")
    assert re.search(r"<td>0\.500 \[0\.500, 0\.500\]</td><td>1\.480 \[1\.480, 1\.480\]</td>", law)
    assert law.count('class="b c1"') == 2  # the forecast of one run of each method


def test_a_band_of_two_runs_is_a_range(write, tmp_path):
    runs = [write(f"r{s}", lines(offset=s / 10), {"seed": s}) for s in range(2)]
    methods = section(page(tmp_path, runs), "methods")
    assert re.search(r"<td>2</td><td>0\.\d{3} \(0\.\d{3} to 0\.\d{3}\)</td>", methods)


def test_equal_runs_give_equal_bytes(write, tmp_path):
    def runs(name):
        run = write(name, lines(), ledger=ledger())
        save_rollout(run)
        return run

    first = page(tmp_path, [runs("a")], "one.html")
    (tmp_path / "b").mkdir()
    again = page(tmp_path, [shutil.move(runs("c"), tmp_path / "b" / "a")], "two.html")
    assert first.encode() == again.encode()
    assert str(tmp_path) not in first


def test_sections_say_what_is_missing(write, tmp_path):
    content = page(tmp_path, [write("a", lines(3, final=False, every=99))])
    read(content)
    assert "It is written when the field `ledger` of a stage is set" in section(content, "ledger")
    assert "`keep_rollouts` names" in section(content, "atlas") and "<input" not in content
    assert "Stage law: no fit of law_grpo: the law needs at least 3 points, got 1." in section(content, "law")
    assert "No run of this method has finished" in section(content, "methods")
    assert "a: not finished: 3 of 40 rollouts." in content


@pytest.mark.parametrize("metrics", [[], [{"step": 0}], [{"step": 0, "stage": "law", "actor/entropy": 0.5}]])
def test_a_run_that_has_just_begun(write, tmp_path, metrics):
    content = page(tmp_path, [write("a", metrics)])
    read(content)
    assert "a: no evaluation." in content and "Nothing recorded" not in content
    assert "nothing recorded" in section(content, "curves")
    assert "nothing to fit" in section(content, "law")


def test_runs_with_different_metrics_stand_side_by_side(write, tmp_path):
    finished = write("a", lines())
    other = [
        {**{k: v for k, v in line.items() if "@8" not in k}, "val/reward/mean@4": 0.5, "siren/peaks": 0.1}
        for line in lines(20, final=False)
    ]
    torn = write("b", other, {"name": "'other'", "stages.1.steps": "50"})
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    content = page(tmp_path, [finished, torn])
    read(content)
    assert "b: metrics.jsonl: the last line was torn and is left out." in content
    assert "b: not finished: 20 of 50 rollouts." in content
    assert "What mechanisms report" in content and "siren/peaks" in content
    assert "1 †" in section(content, "methods")


def test_the_ledger_compares_and_adds_up(write, tmp_path):
    runs = [write("a", lines(), ledger=ledger()), write("b", lines(), {"seed": 1}, ledger=ledger())]
    runs.append(write("c", lines(), {"name": "'without'", "stages.1.steps": "41"}))
    content = section(page(tmp_path, runs), "ledger")
    total = sum(row["ledger/entropy_change"] for row in ledger())
    lemma = next(row for row in content.split("<tr>") if "Lemma 1</td>" in row)
    assert "<td>80</td><td>1.0000</td>" in lemma
    assert f"{1.1 * total:.3f}".replace("-", "\u2212") in lemma and f"{total:.3f}".replace("-", "\u2212") in lemma
    assert re.search(r"75 to 100 %</td><td>75\.00 %</td>" + f'<td class="num">\u2212{-0.75 * total:.3f}', content)
    assert "Covariance by difficulty, mean over tokens" in content
    assert "<title>0.05</title>" in content and "<title>0.15</title>" in content  # 0.2 times the share
    assert "By mechanism: &lt;b&gt;cov" in content
    assert "Without a ledger: without." in content


def test_text_of_the_model_is_only_text(write, tmp_path, monkeypatch):
    run = write("a", lines(), {"name": f"'{HOSTILE}'"})
    tokenizer = save_rollout(run)
    monkeypatch.setattr(atlas_lib, "run_tokenizer", lambda path: tokenizer)
    content = page(tmp_path, [run])
    reader = read(content)
    boxes = re.findall(r'<span class="t[^>]*>(.*?)</span>', section(content, "atlas"))
    assert len(boxes) == 4 * (len(HOSTILE) + 1)
    shown = ["&lt;", "/", "&#x27;", "&quot;", "&amp;", "‹U+202E›", "‹U+202C›", "‹U+200B›", "‹ESC›", "‹end›"]
    assert set(shown) <= set(boxes)
    raw = set("\u202e\u202c\u200b\x1b")
    assert not raw & set(content)
    assert "<h1>&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;‹U+202E›gnp.exe" in content
    assert not [word for tag, _ in reader.tags for word in tag if word in "<>\"'"]


def test_ids_stand_for_tokens_without_a_tokenizer(write, tmp_path):
    run = write("a", lines())
    save_rollout(run)
    content = section(page(tmp_path, [run]), "atlas")
    assert "Tokens are shown by their ids" in content and ">[2]" in content
    assert "The entropy is not known: instead, minus the log-probability of the token." in content
    assert "advantage: not known" in content


def test_the_atlas_colours_and_marks(write, tmp_path, monkeypatch):
    run = write("a", lines())
    advantage = np.linspace(-1, 1, 8, dtype=np.float32)
    touched = np.arange(8) % 2
    stored = {"entropy": 0.5 + np.abs(advantage), "advantage": advantage, "touched/clip <cov>": touched}
    tokenizer = save_rollout(run, text="abcd", token_data=stored.items())
    monkeypatch.setattr(atlas_lib, "run_tokenizer", lambda path: tokenizer)
    content = section(page(tmp_path, [run]), "atlas")
    found = re.findall(r'<span class="(t[^"]*)" title="([^"]*)">(.*?)</span>', content)[:5]
    assert [text for *_, text in found] == [*"abcd", "‹end›"]
    kinds = [re.fullmatch(r"t e(\d) v\d a(\d)( k0)?", kind).groups() for kind, *_ in found]
    assert [int(a) for _, a, _ in kinds] == sorted(int(a) for _, a, _ in kinds)
    assert [bool(k) for *_, k in kinds] == [False, True, False, True, False]
    assert found[0][1].startswith("entropy 0.929; advantage -0.429; covariance ")
    assert '<label for="mark-0">clip &lt;cov&gt;</label>' in content
    assert "clip &lt;cov&gt; 40.0 %" in content
    assert re.findall(r'id="([^"]*)"', content) == [
        "by-entropy",
        "by-covariance",
        "by-advantage",
        "mark-none",
        "mark-0",
    ]


def test_the_number_of_responses_is_capped_and_told(write, tmp_path):
    run = write("a", lines())
    for step in (2, 7, 12):
        save_rollout(run, step, rows=12)
    content = section(page(tmp_path, [run], num_responses=5), "atlas")
    assert content.count('<div class="response">') == 5
    assert "a, step 2: 3 of 12 responses" in content and "a, step 12: 2 of 12 responses" in content
    assert "Also kept: step 2, 7." in content
    content = section(page(tmp_path, [run], num_responses=0), "atlas")
    assert "Left out: no responses were asked for." in content and "response" in content and "<span" not in content


def test_damaged_rollouts_are_told_and_the_page_is_written(write, tmp_path):
    run = write("a", lines())
    save_rollout(run)
    (run / "rollouts" / "step-00000012.safetensors").write_bytes(b"no")
    assert "is damaged" in section(page(tmp_path, [run]), "atlas")


def test_responses_are_chosen_over_the_range_of_rewards(write, tmp_path):
    run = write("a", lines())
    save_rollout(run, rows=12)
    tokens = load_tokens(run, 12)
    tokens = tokens._replace(rewards=np.array([1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1.0])[:, None])
    assert choose(tokens, 100) == [2, 3, 8, 9, 4, 5, 10, 11, 0, 1, 6, 7]
    assert choose(tokens, 6) == [2, 3, 4, 5, 6, 7]
    assert choose(tokens, 1) == [2]
    assert choose(tokens, 0) == []


def test_levels_of_the_scales():
    values = np.array([[np.nan, 0.0, 0.5, 1.0, 9.0, np.inf]])
    assert levels(values, 1.0, signed=False).tolist() == [[-1, 0, 4, 7, 7, 7]]
    signed = np.array([[np.nan, -2.0, -0.5, 0.0, 0.1, 1.0]])
    assert levels(signed, 1.0, signed=True).tolist() == [[-1, 0, 2, 4, 4, 8]]


def test_ids_that_no_tokenizer_knows():
    decode = Decoder(char_tokenizer(["ab"]))
    assert [decode(i) for i in (2, 3, 0, 1, 99, -1)] == ["a", "b", "‹pad›", "‹end›", "[99]", "[-1]"]
    assert Decoder(None)(5) == "[5]"


def test_the_command_line(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)
    run, out = str(write("a", lines())), tmp_path / "page.html"
    assert cli.main(["report", run, run, "--out", str(out), "--responses", "2"]) == 0
    assert capsys.readouterr().out == f"Report: {out}\n" and "<h1>law_grpo</h1>" in out.read_text()
    bad = [
        ([run, "--out", str(tmp_path / "page.txt")], "a file that ends in .html"),
        ([run, "--out", str(tmp_path / "no" / "page.html")], "No such file or directory"),
        ([str(tmp_path), "--out", str(out)], "is no run"),
        ([run, "--out", str(out), "--responses", "-1"], "num_responses must be at least 0, got -1"),
    ]
    for arguments, message in bad:
        assert cli.main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("jentropy: ") and error.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        cli.main(["report"])
    assert stop.value.code == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the tiny experiment with a ledger and kept rollouts."""
    with tiny.own_folders(tmp_path_factory.getbasetemp()):
        config = tiny.tiny()
        warm_start, rl, _ = config.stages
        rl.steps, rl.num_minibatches, rl.num_epochs = 4, 1, 1
        rl.ledger = fdl.Config(Ledger, first_order_every=2)
        config.stages, config.keep_rollouts = (warm_start, rl), (2,)
        out = tmp_path_factory.mktemp("report") / "run"
        loop.train(config, out, quiet=True)
        yield out


def test_a_run_that_was_trained_has_every_section(trained, tmp_path):
    content = page(tmp_path, [trained])
    read(content)
    atlas = section(content, "atlas")
    assert "step 2: 16 of 16 responses" in atlas and "minus the log-probability" not in atlas
    assert "clip_range 100.0 %" in atlas and "by their ids" not in atlas and "could not be used" not in atlas
    tokens = load_tokens(trained, 2)
    line = next(x for x in (json.loads(r) for r in (trained / "ledger.jsonl").open()) if x["step"] == 2)
    assert tokens.values["entropy"][tokens.mask].mean() == pytest.approx(line["ledger/entropy_before"], rel=1e-5)
    assert tokens.values["covariance"][tokens.mask].mean() == pytest.approx(line["ledger/covariance"], abs=1e-6)
    assert "Lemma 1" in section(content, "ledger") and "By mechanism: clip_range" in section(content, "ledger")
    assert page(tmp_path, [trained], "again.html") == content


def browse(path, tmp_path):
    """What headless Chromium logs about a page: lines of its console, and the addresses that the page asked for."""
    log = tmp_path / "net.json"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = {e["url"] for e in events if "url" in e and e.get("initiator", "not an origin") != "not an origin"}
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (Debian: apt-get install chromium)")
def test_a_browser_finds_nothing_wrong(write, tmp_path, monkeypatch):
    run = write("a", lines(), ledger=ledger())
    tokenizer = save_rollout(run)
    monkeypatch.setattr(atlas_lib, "run_tokenizer", lambda path: tokenizer)
    page(tmp_path, [run])
    seen, console, asked = browse(tmp_path / "report.html", tmp_path)
    assert console == [] and asked == set()
    assert "<h1>law_grpo</h1>" in seen and seen.rstrip().endswith("</html>") and "<img" not in seen


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (Debian: apt-get install chromium)")
def test_a_browser_would_find_scripts_and_requests(tmp_path):
    path = tmp_path / "bad.html"
    path.write_text('<img src="http://example.invalid/x.png"><script>nothing()</script>')
    _, console, asked = browse(path, tmp_path)
    assert len(console) == 1 and "nothing is not defined" in console[0]
    assert asked == {"http://example.invalid/x.png"}

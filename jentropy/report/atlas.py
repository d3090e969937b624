"""The token atlas: sampled responses, each token in a box coloured by its entropy, covariance or advantage.

What a token is coloured by, and which mechanism's tokens are marked, is chosen by radio buttons and the page's style
alone. All text of the model is escaped, and what one could not see of it is made visible.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from jentropy.config import ConfigError
from jentropy.report import html
from jentropy.report.curves import Group, Run
from jentropy.report.style import MAX_MARKED, NUM_LEVELS, NUM_SIGNED, VIEWS
from jentropy.report.tokens import Decoder, FloatArray, Tokens, kept_steps, load_tokens, run_tokenizer
from jentropy.train.kept import KeptError

MAX_BATCHES = 4
"""Methods of which responses are shown."""
MAX_TOKENS = 1000
"""Tokens that are shown of one response."""
PER_PROMPT = 4
HIGH = 0.98
"""The quantile of the shown tokens at which a scale ends."""
HOW = (
    "No run has kept rollouts. Those of the steps that the experiment's field `keep_rollouts` names, such as (0, 100), "
    "are kept in the folder `rollouts` of the run."
)
LETTERS = {"entropy": "e", "covariance": "v", "advantage": "a"}
UNITS = {"entropy": "nats", "surprise": "nats", "covariance": "nats", "advantage": ""}


def atlas(groups: Sequence[Group], num_responses: int = 16) -> str:
    """The switches, and responses of the newest kept rollout of some methods, or of the first and newest of one.

    Args:
      groups: of runs.
      num_responses: responses in all; 0 for none.
    """
    batches = _batches(groups)
    if not batches:
        return html.paragraph(HOW)
    if not num_responses:
        return html.paragraph("Left out: no responses were asked for.")
    shown = batches[: min(MAX_BATCHES, num_responses)]
    shares = [num_responses // len(shown) + (i < num_responses % len(shown)) for i in range(len(shown))]
    blocks, mechanisms = [], {}
    for (group, run, step), share in zip(shown, shares):
        try:
            tokens = load_tokens(run.path, step)
        except KeptError as error:
            blocks.append(html.paragraph(f"{run.folder}: {_without_path(error, run)}"))
            continue
        for name in tokens.touched:
            mechanisms.setdefault(name, len(mechanisms))
        blocks.append(_block(group, run, tokens, share, mechanisms))
    sentence = (
        "Every box is a token. The colour is its entropy (of the whole next-token distribution), its part of the "
        "covariance of log π and advantage over the rollout, or its advantage; pointing at a token shows the numbers."
    )
    remarks = []
    left = [f"{group.label}, step {step}" for group, _, step in batches[len(shown) :]]
    if left:
        remarks.append(f"Not shown, more than {len(shown)} rollouts: {'; '.join(left)}.")
    unmarked = [name for name, i in mechanisms.items() if i >= MAX_MARKED]
    if unmarked:
        remarks.append(f"Tokens are not outlined, more than {MAX_MARKED} mechanisms: {', '.join(unmarked)}.")
    content = f'<div class="atlas">{"".join(blocks)}</div>'
    return html.paragraph(sentence, "soft") + _switches(mechanisms) + content + html.notes(remarks)


def _batches(groups: Sequence[Group]) -> list[tuple[Group, Run, int]]:
    """Of every method the newest kept rollout of the first run that has any; of a single method also the first."""
    found = []
    for group in groups:
        run = next((run for run in group.runs if kept_steps(run.path)), None)
        if run is not None:
            steps = kept_steps(run.path)
            chosen = [steps[0], steps[-1]] if len(groups) == 1 else [steps[-1]]
            found += [(group, run, step) for step in dict.fromkeys(chosen)]
    return found


def _switches(mechanisms: Mapping[str, int]) -> str:
    """Radio buttons, then their labels: the style needs the buttons before what they switch."""
    marks = {f"mark-{i}": name for name, i in mechanisms.items() if i < MAX_MARKED}
    rows = [("Colour", "view", {f"by-{view}": view for view in VIEWS})]
    rows += [("Outline", "mark", {"mark-none": "nothing", **marks})] if marks else []
    buttons, labels = [], []
    for what, name, choices in rows:
        for i, choice in enumerate(choices):
            checked = " checked" if i == 0 else ""
            buttons.append(f'<input class="switch" type="radio" name="{name}" id="{choice}"{checked}>')
        tabs = "".join(f'<label for="{choice}">{html.text(label)}</label>' for choice, label in choices.items())
        labels.append(f'<div class="tabs"><span>{what}</span>{tabs}</div>')
    return "".join(buttons + labels)


def _block(group: Group, run: Run, tokens: Tokens, share: int, mechanisms: Mapping[str, int]) -> str:
    """Responses of one rollout."""
    rows = choose(tokens, share)
    try:
        decoder, remarks = Decoder(run_tokenizer(run.path)), list(tokens.remarks)
    except (ConfigError, OSError, ImportError) as error:
        decoder, remarks = Decoder(None), [*tokens.remarks, f"tokens are shown by their ids ({error})"]
    classes, keys = _coloured(tokens, rows)
    if "surprise" in tokens.values:
        remarks.append("the entropy is not known: instead, minus the log-probability of the token")
    marks = {mechanisms[name]: touched for name, touched in tokens.touched.items() if mechanisms[name] < MAX_MARKED}
    total = int(tokens.mask.sum())
    told = [f"{name} {100 * touched.sum() / total:.1f} %" for name, touched in tokens.touched.items() if total]
    if told:
        remarks.append(f"tokens that each mechanism changes, of all of the rollout: {', '.join(told)}")
    others = [str(step) for step in kept_steps(run.path) if step != tokens.step]
    sentence = (
        f"{run.folder}, step {tokens.step}: {len(rows)} of {len(tokens.mask)} responses, to prompts from the least to "
        f"the most often solved, at most {PER_PROMPT} to one."
    )
    if others:
        sentence += f" Also kept: step {', '.join(others)}."
    prompts = [_prompt(tokens, row, decoder) for row in rows]
    body = []
    for i, row in enumerate(rows):
        if not i or (tokens.group[row], prompts[i]) != (tokens.group[rows[i - 1]], prompts[i - 1]):
            body.append(f'<div class="asked"><p>prompt {tokens.group[row]}</p>{prompts[i]}</div>')
        body.append(_response(tokens, row, decoder, classes, marks))
    remarks = [_without_path(remark, run) for remark in remarks]
    return (
        f"<h3>{html.text(group.label)}</h3>{html.paragraph(sentence, 'soft')}"
        + html.notes([f"{remark[0].upper()}{remark[1:]}." for remark in remarks]) + "".join(keys) + "".join(body)
    )  # fmt: skip


def _without_path(message: object, run: Run) -> str:
    """A message without the place of the run's folder on this machine."""
    text = str(message)
    for path in (run.path.resolve(), run.path.absolute(), run.path):
        text = text.replace(str(path), run.folder)
    return text


def choose(tokens: Tokens, number: int) -> list[int]:
    """Rows to show: the first `PER_PROMPT` of prompts evenly spaced in the order of their mean reward."""
    total = np.nan_to_num(tokens.rewards).sum(axis=1)
    order = sorted(np.unique(tokens.group).tolist(), key=lambda g: (float(total[tokens.group == g].mean()), g))
    largest = max((int((tokens.group == g).sum()) for g in order), default=1)
    wanted = min(len(order), -(-number // min(PER_PROMPT, largest)))
    places = np.linspace(0, len(order) - 1, wanted).round().astype(int) if wanted else []
    chosen = [np.flatnonzero(tokens.group == order[place])[:PER_PROMPT].tolist() for place in places]
    return list(itertools.chain.from_iterable(chosen))[:number]


def _coloured(tokens: Tokens, rows: Sequence[int]) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """The level of every token by the letter of its class, and the legends of the scales."""
    classes, keys = {}, []
    for view in VIEWS:
        name = "surprise" if view == "entropy" and "surprise" in tokens.values else view
        if name not in tokens.values:
            keys.append(f'<div class="key of-{view}"><span>{html.text(view)}: not known</span></div>')
            continue
        values = tokens.values[name]
        found = np.abs(values[rows][np.isfinite(values[rows])])
        top = float(np.quantile(found, HIGH)) if found.size else 0.0
        top = top or float(found.max(initial=0.0)) or 1.0
        classes[LETTERS[view]] = levels(values, top, signed=view != "entropy")
        label = "minus log-probability" if name == "surprise" else view
        keys.append(_key(view, f"{label}{', ' if UNITS[name] else ''}{UNITS[name]}", top))
    return classes, keys


def levels(values: FloatArray, top: float, *, signed: bool) -> NDArray[np.int64]:
    """The level of each value on a scale that ends at `top`; -1 where there is no value.

    A signed scale has its middle at `NUM_SIGNED` and reaches from -top to top; the other one begins at 0.
    """
    count, low = (NUM_SIGNED, -NUM_SIGNED) if signed else (NUM_LEVELS - 1, 0)
    scaled = np.clip(np.round(np.nan_to_num(values / top, posinf=1.0, neginf=-1.0) * count), low, count)
    return np.where(np.isnan(values), -1, scaled - low).astype(np.int64)


def _key(view: str, label: str, top: float) -> str:
    """The legend of a scale."""
    signed = view != "entropy"
    low, count = (-NUM_SIGNED, NUM_SIGNED) if signed else (0, NUM_LEVELS - 1)
    letter = "v" if signed else "e"
    boxes = []
    for level in range(low, count + 1):
        number = f"{level / count * top:.2g}".replace("-", "\u2212")
        prefix = "≤ " if signed and level == low else "≥ " if level == count else ""
        boxes.append(f'<b class="{letter}{level - low}">{prefix}{number}</b>')
    return f'<div class="key of-{view}"><span>{html.text(label)}</span>{"".join(boxes)}</div>'


def _response(
    tokens: Tokens, row: int, decoder: Decoder, classes: Mapping[str, NDArray[np.int64]],
    marks: Mapping[int, NDArray[np.bool_]],
) -> str:  # fmt: skip
    """A response: its rewards, then its tokens."""
    columns = np.flatnonzero(tokens.mask[row])
    boxes = []
    for column in columns[:MAX_TOKENS].tolist():
        names = [f"{letter}{level[row, column]}" for letter, level in classes.items() if level[row, column] >= 0]
        names += [f"k{i}" for i, touched in marks.items() if touched[row, column]]
        token = int(tokens.tokens[row, column])
        shown = decoder(token)
        broken = "<br>" if "\n" in shown else ""
        title = "; ".join(
            [f"{name} {values[row, column]:.3g}" for name, values in tokens.values.items()] + [f"token {token}"]
        )
        boxes.append(f'<span class="{" ".join(["t", *names])}" title="{title}">{html.text(shown)}</span>{broken}')
    left = columns.size - MAX_TOKENS
    more = f' <span class="prompt">… {left} more tokens</span>' if left > 0 else ""
    rewards = zip(tokens.graders, tokens.rewards[row], strict=True)
    graded = ", ".join(f"{name} {'not graded' if np.isnan(value) else f'{value:.3g}'}" for name, value in rewards)
    head = f"response {row}: {graded}; {columns.size} token{'s'[: columns.size != 1]}"
    return f'<div class="response">{html.paragraph(head)}<div class="tokens">{"".join(boxes)}{more}</div></div>'


def _prompt(tokens: Tokens, row: int, decoder: Decoder) -> str:
    """The text before a response, its last `MAX_TOKENS` tokens."""
    columns = np.flatnonzero(tokens.mask[row])
    first = int(columns[0]) if columns.size else tokens.tokens.shape[1]
    shown = "".join(decoder(int(token)) for token in tokens.tokens[row, max(first - MAX_TOKENS, 0) : first])
    return (
        f'<div class="tokens"><span class="prompt">{"… " if first > MAX_TOKENS else ""}{html.text(shown)}</span></div>'
    )

"""Which fields of a config may change when a run is resumed.

Configs are compared as `config.flatten` prints them. Each path has one of three rules:

  allowed: the rollouts and updates to come are the same, bit for bit; names, intervals, tolerances and places.
  allowed with --allow-change: the run goes on, but is not the one that was begun; batch sizes, devices, the loss.
  refused: the checkpoint would not fit, would silently overrule the new value, or would mean something else.

Why learning rates and the numbers of a method are refused: they are arrays in the training state, so that the
checkpoint brings the old ones back. A stage that is over admits no change, one that has not begun admits any.
"""

import enum
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jentropy.config_tree import ConfigError

LINEAGE = "lineage.jsonl"


class Rule(enum.StrEnum):
    """What becomes of a change on resume."""

    ALLOWED = "allowed"
    WITH_FLAG = "allowed with --allow-change"
    REFUSED = "refused"


class Change(NamedTuple):
    """A line that differs: its path, the values (None: the line is absent), the rule and the reason for it."""

    path: str
    old: str | None
    new: str | None
    rule: Rule
    reason: str

    def __str__(self) -> str:
        old, new = ("absent" if value is None else value for value in (self.old, self.new))
        return f"  {self.path}: {old} -> {new} ({self.reason})"


_RULES: dict[tuple[Rule, str], str] = {
    (Rule.ALLOWED, "a label"): "name",
    (Rule.ALLOWED, "rollouts and updates do not depend on it"): """
        checkpoint_every sampler_tolerance hang_limit evaluation.every evaluation.final_num_prompts task.data_dir
        keep_rollouts keep_rollouts.*
    """,
    (Rule.WITH_FLAG, "evaluations before and after it do not compare"): """
        evaluation.mixture evaluation.mixture.* evaluation.num_prompts evaluation.num_samples evaluation.hard_from
        eval_batch
    """,
    (Rule.WITH_FLAG, "the same up to rounding"): """
        mesh.data mesh.fsdp mesh.tensor policy.remat policy.scan_unroll policy.dtype reinforce.num_microbatches
        reinforce.ledger reinforce.ledger.* prefer.num_microbatches
    """,
    (Rule.WITH_FLAG, "other rollouts"): """
        reinforce.mixture reinforce.mixture.* reinforce.num_prompts reinforce.num_generations
        reinforce.dynamic_sampling reinforce.dynamic_sampling.* reinforce.strategy reinforce.strategy.*
        reinforce.objective.temperature task.max_new_tokens task.prompt_columns task.thought_end task.exit_inducer
    """,
    (Rule.WITH_FLAG, "other pairs"): "prefer.mixture prefer.mixture.* prefer.batch_size",
    (Rule.WITH_FLAG, "other rewards"): """
        task.reward task.rewards task.rewards.** reinforce.shaping reinforce.shaping.**
    """,
    (Rule.WITH_FLAG, "other updates"): """
        reinforce.num_minibatches reinforce.num_epochs reinforce.eos_in_loss reinforce.mask_truncated
        reinforce.objective.surrogate reinforce.objective.surrogate.**
        reinforce.objective.normaliser reinforce.objective.normaliser.**
        reinforce.optimizer.b1 reinforce.optimizer.b2 reinforce.optimizer.epsilon reinforce.optimizer.weight_decay
        reinforce.optimizer.clip_norm reinforce.optimizer.warmup_steps reinforce.optimizer.decay_steps
        reinforce.optimizer.final_fraction
        prefer.optimizer.b1 prefer.optimizer.b2 prefer.optimizer.epsilon prefer.optimizer.weight_decay
        prefer.optimizer.clip_norm prefer.optimizer.warmup_steps prefer.optimizer.decay_steps
        prefer.optimizer.final_fraction
    """,
    (Rule.WITH_FLAG, "a longer, shorter or renamed stage"): "reinforce.steps reinforce.name prefer.steps prefer.name",
    (Rule.REFUSED, "the checkpoint holds the old value and would bring it back"): """
        reinforce.optimizer.learning_rate
        reinforce.objective.estimator reinforce.objective.estimator.**
        reinforce.objective.mechanisms reinforce.objective.mechanisms.** reinforce.sampler reinforce.sampler.**
        reinforce.learners reinforce.learners.** prefer.optimizer.learning_rate prefer.loss prefer.loss.**
    """,
    (Rule.REFUSED, "the checkpoint's state has another structure"): """
        . reinforce supervised reinforce.objective reinforce.optimizer reinforce.reference evaluation mesh
        prefer prefer.optimizer
    """,
    (Rule.REFUSED, "another model"): """
        policy policy.vocab_size policy.width policy.num_layers policy.num_heads policy.num_kv_heads policy.head_size
        policy.mlp_width policy.rope_theta policy.norm_epsilon policy.tied policy.attention_bias policy.qk_norm
        policy.sliding_window policy.embedding_std
    """,
    (Rule.REFUSED, "all randomness hangs on it"): "seed",
    (Rule.REFUSED, "other data, other tokens, or held-out prompts in training"): """
        task task.path task.tokenizer task.heldout_fraction task.preferences
    """,
    (Rule.REFUSED, "the parameters are what that stage left"): "supervised.**",
}
"""Patterns of paths by rule and reason: `*` is one name, `**` one or more; a stage is named by its kind."""


def _pattern(text: str) -> re.Pattern[str]:
    parts = {"*": r"[^.]+", "**": r".+"}
    names = [text] if text == "." else text.split(".")
    return re.compile(r"\.".join(parts.get(name, re.escape(name)) for name in names))


_PATTERNS = [
    (_pattern(pattern), rule, reason) for (rule, reason), patterns in _RULES.items() for pattern in patterns.split()
]

_OFF = ("None", "()")
_UNCLASSIFIED = (Rule.REFUSED, "a field that jentropy does not know")


def classify(path: str, kinds: Mapping[str, str]) -> tuple[Rule, str] | None:
    """The rule of a path and its reason; None for a field that has none.

    Args:
      path: as `config.flatten` prints it.
      kinds: "reinforce", "supervised" or "prefer" by the path of each stage, such as `stages.0`; see `stage_kinds`.
    """
    match = re.match(r"stages\.\d+", path)
    if match is not None:
        path = kinds.get(match[0], match[0]) + path[match.end() :]
    return next(((rule, reason) for pattern, rule, reason in _PATTERNS if pattern.fullmatch(path)), None)


def stage_kinds(lines: Mapping[str, str]) -> dict[str, str]:
    """Of each stage in a config's `{path: value}` of which kind of learning it is."""
    names = {"jentropy.train.experiment.Reinforce(...)": "reinforce"}
    names |= {"jentropy.train.experiment.Supervised(...)": "supervised"}
    names |= {"jentropy.train.preference_stage.Prefer(...)": "prefer"}
    return {path: names[value] for path, value in lines.items() if path.startswith("stages.") and value in names}


def split_lines(lines: Sequence[str]) -> dict[str, str]:
    """`{path: value}` of a flattened config."""
    return {path: value for path, _, value in (line.partition(" = ") for line in lines)}


def _rule(path: str, kinds: Mapping[str, str], stage: int | None) -> tuple[Rule, str]:
    match = re.match(r"stages\.(\d+)", path)
    if match is not None and stage is not None and int(match[1]) < stage:
        return Rule.REFUSED, "that stage is over"
    if match is not None and stage is not None and int(match[1]) > stage:
        return Rule.WITH_FLAG, "a stage that has not begun"
    return classify(path, kinds) or _UNCLASSIFIED


def find_changes(old_lines: Sequence[str], new_lines: Sequence[str], stage: int | None = None) -> list[Change]:
    """What differs between two flattened configs, in the order of the old one, then of the new one.

    A field that the old config does not know yet, and that is off in the new one, does not count.

    Args:
      old_lines: the config the run was begun or last resumed with.
      new_lines: the config it shall be resumed with.
      stage: index of the stage that the checkpoint lies in; None to go by the fields alone.
    """
    old, new = split_lines(old_lines), split_lines(new_lines)
    kinds = stage_kinds(new) | stage_kinds(old)
    paths = [path for path in old | new if old.get(path) != new.get(path)]
    paths = [path for path in paths if path in old or new[path] not in _OFF]
    return [Change(path, old.get(path), new.get(path), *_rule(path, kinds, stage)) for path in paths]


def check_resume(
    old_lines: Sequence[str], new_lines: Sequence[str], allow_change: bool, stage: int | None = None
) -> dict[str, Any]:
    """Whether a run may be resumed with a changed config; returns the record of it for the run's lineage.

    Args:
      old_lines: the config the run was begun or last resumed with, flattened.
      new_lines: the config it shall be resumed with.
      allow_change: whether `--allow-change` was given.
      stage: index of the stage that the checkpoint lies in; None to go by the fields alone.

    Returns:
      `{"allow_change": bool, "changes": [{"path", "old", "new", "rule", "reason"}, ...]}`; equal configs have none.

    Raises:
      ConfigError: a change is refused, or needs `allow_change`; all of them are listed.
    """
    changes = find_changes(old_lines, new_lines, stage)
    refused = [change for change in changes if change.rule == Rule.REFUSED]
    if refused:
        raise ConfigError(_listed("a run cannot be resumed with these changes; start a new one:", refused))
    flagged = [change for change in changes if change.rule == Rule.WITH_FLAG]
    if flagged and not allow_change:
        raise ConfigError(_listed("to resume with these changes needs --allow-change:", flagged))
    return {"allow_change": allow_change, "changes": [change._asdict() for change in changes]}


def _listed(title: str, changes: Sequence[Change]) -> str:
    return "\n".join([title, *map(str, changes)])


def write_lineage(out: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Appends a record, one JSON line, to `lineage.jsonl` in the run's folder; it is on disk on return."""
    with (Path(out) / LINEAGE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(record), sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())

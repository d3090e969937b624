"""Evaluation of a policy on fixed held-out prompts: reward, pass@k, entropy, length."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jentropy import evaluation
from jentropy.base import Array, Policy, Rollouts
from jentropy.data.source import Prompts
from jentropy.data.task import Task
from jentropy.rewards.answers import answer_ids
from jentropy.rewards.base import TextReward, grade_text
from jentropy.rollout.iid import GREEDY_TOKENS, RolloutSpec
from jentropy.train.programs import make_rollout
from jentropy.train.sharding import replicated, row_sharding

_DEVICE_DTYPES = ("int32", "float32", "bool")

_CALLS = 1024
"""Most calls of the sampler in one evaluation: the stride of its random streams."""


def put_prompts(prompts: Prompts, mesh: Mesh) -> tuple[Array, Array, dict[str, Array]]:
    """Tokens, lengths and those fields of `prompts` that are numbers of a device's types, on the devices, by rows."""
    fields = {name: field for name, field in prompts.fields.items() if field.dtype.name in _DEVICE_DTYPES}
    arrays = (prompts.tokens, prompts.length, fields)
    return jax.device_put(arrays, row_sharding(mesh))


def _grade_texts(
    task: Task, prompts: Prompts, prompt_of: np.ndarray, completions: list[str], shown: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Values and whether they were given, `[N]` each, by column of the text rewards.

    `prompt_of` `[N]` are indices. Graders see the rows that are `shown` `[N]` bool; to the others they give nothing.
    """
    index = np.flatnonzero(shown)
    prompt_of, completions = prompt_of[index], [completions[row] for row in index]
    in_prompt = np.arange(prompts.tokens.shape[1])[None, :] < prompts.length[:, None]
    decoded = task.tokenizer.decode_rows(prompts.tokens, in_prompt)
    texts = [decoded[index] for index in prompt_of]
    fields = {name: value[prompt_of].tolist() for name, value in prompts.fields.items()}
    graders = {i: reward for i, reward in enumerate(task.rewards) if isinstance(reward, TextReward)}
    found = {i: (np.zeros(len(shown), np.float32), np.zeros(len(shown), bool)) for i in graders}
    for i, reward in graders.items() if len(index) else ():
        found[i][0][index], found[i][1][index] = grade_text(reward, texts, completions, fields)
    return found


def _on_host(rollouts: Rollouts) -> tuple[np.ndarray, ...]:
    """Tokens, the mask of the whole responses (as `forks.response_columns`), rewards, and which rows are valid."""
    names = ("tokens", "loss_mask", "rewards", "fork")
    arrays = [getattr(rollouts, name) for name in names] + [rollouts.row_data["is_valid"]]
    tokens, mask, rewards, fork, real = jax.device_get(arrays)
    if "prefix_length" in rollouts.row_data:
        column, prefix = np.arange(tokens.shape[1])[None, :], jax.device_get(rollouts.row_data["prefix_length"])
        mask = mask | ((column >= (fork - prefix)[:, None]) & (column < fork[:, None]))
    return tokens, mask, rewards, real


def grade_on_host(
    task: Task, rollouts: Rollouts, prompts: Prompts, prompt_of: np.ndarray | None = None
) -> Rollouts:  # fmt: skip
    """Fills in what the rollout program left to the host: columns of text rewards, answers of texts.

    A row is valid if at least one reward function of the task did not abstain; what columns there are besides, of
    rewards that shape, does not count. In `greedy_reward` one that abstains counts as 0. Rows that are not valid to
    begin with stay so, and graders are not shown what they hold.

    Args:
      task: its tokenizer and graders.
      rollouts: B rows, whose whole responses are graded, a reused prefix included.
      prompts: P prompts.
      prompt_of: `[B]` the prompt of each row; None: of row b prompt b // (B / P).
    """
    graded = any(isinstance(reward, TextReward) for reward in task.rewards)
    extract = None if task.answer_id is not None or "answer_id" not in rollouts.row_data else task.final_answer
    if not graded and extract is None:
        return rollouts
    tokens, mask, rewards, real = _on_host(rollouts)
    completions = task.tokenizer.decode_rows(tokens, mask)
    token_data, found = dict(rollouts.token_data), {}
    if extract is not None:
        found["answer_id"] = answer_ids([extract(completion) for completion in completions])
    if graded:
        num_rows, num_prompts = len(tokens), len(prompts.tokens)
        rewards, valid = np.array(rewards), np.repeat(real[:, None], len(task.rewards), axis=1)
        if prompt_of is None:
            prompt_of = np.repeat(np.arange(num_prompts), num_rows // num_prompts)
        greedy, shown = token_data.pop(GREEDY_TOKENS, None), real
        if greedy is not None:
            greedy = jax.device_get(greedy)[:: num_rows // num_prompts]
            shown = np.append(real, [True] * num_prompts)
            prompt_of = np.concatenate([prompt_of, np.arange(num_prompts)])
            completions = [*completions, *task.tokenizer.decode_rows(greedy, greedy >= 0)]
            found["greedy_reward"] = np.array(jax.device_get(rollouts.row_data["greedy_reward"]))
        for i, (value, is_given) in _grade_texts(task, prompts, prompt_of, completions, shown).items():
            rewards[:, i], valid[:, i] = value[:num_rows], is_given[:num_rows]
            if greedy is not None:
                weighted = np.float32(task.rewards[i].weight) * value[num_rows:]
                found["greedy_reward"] += np.repeat(weighted, num_rows // num_prompts)
        found["is_valid"] = valid.any(axis=1)
        shaping = np.ones((num_rows, rewards.shape[1] - valid.shape[1]), bool)
        found["reward_is_valid"] = np.concatenate([valid, shaping], axis=1)
    rewards = jax.device_put(rewards, rollouts.rewards.sharding)
    row_data = {
        name: jax.device_put(found[name], value.sharding) if name in found else value
        for name, value in rollouts.row_data.items()
    }
    return rollouts.replace(rewards=rewards, row_data=row_data, token_data=token_data)


def total_reward(task: Task, rewards: np.ndarray) -> np.ndarray:
    """The weighted sum `[B]` of reward columns `[B, R]`."""
    return rewards @ np.array([reward.weight for reward in task.rewards], rewards.dtype)


def _rows(prompts: Prompts, start: int, stop: int) -> Prompts:
    return jax.tree.map(lambda x: x[start:stop], prompts)


class Evaluator:
    """Samples and scores a fixed set of prompts with one compiled program.

    Args:
      policy: the model.
      task: its tokenizer and graders; correct means that the first reward function gives more than one half.
      prompts: held-out prompts; their number is rounded down to whole batches.
      num_samples: responses per prompt, n.
      temperature: of sampling.
      batch: prompts per call.
      hard_from: difficulty from which prompts count as hard.
      mesh: devices.
    """

    def __init__(
        self, policy: Policy, task: Task, prompts: Prompts, *,
        num_samples: int, temperature: float, batch: int, hard_from: int, mesh: Mesh,
    ) -> None:  # fmt: skip
        self._calls = len(prompts.length) // batch
        if not 1 <= self._calls <= _CALLS:
            raise ValueError(f"{len(prompts.length)} prompts are not 1 to {_CALLS} batches of eval_batch = {batch}")
        self._task, self._prompts, self._batch, self._mesh = task, prompts, batch, mesh
        self._policy, self._num_samples, self._hard_from = policy, num_samples, hard_from
        self._temperature = temperature

    def _spec(self, greedy: bool) -> RolloutSpec:
        task = self._task
        return RolloutSpec(
            1 if greedy else self._num_samples, task.max_new_tokens, task.tokenizer.eos_id, task.tokenizer.pad_id,
            self._temperature, task.rewards, greedy,
        )  # fmt: skip

    def _sample(self, params: Any, key: Array, step: int, greedy: bool) -> tuple[np.ndarray, ...]:
        """Rewards, entropy sums, lengths and truncation, `[P, n]` each."""
        rollout = make_rollout(self._policy, self._spec(greedy), self._mesh)
        found = []
        for call in range(self._calls):
            part = _rows(self._prompts, call * self._batch, (call + 1) * self._batch)
            index = jax.device_put(np.int32(step * _CALLS + call), replicated(self._mesh))
            rows, entropy = rollout(params, key, index, *put_prompts(part, self._mesh))
            rows = grade_on_host(self._task, rows, part)
            mask, rewards, entropy, truncated = jax.device_get(
                (rows.loss_mask, rows.rewards, entropy, rows.row_data["truncated"])
            )
            correct = rewards[:, 0] > 0.5
            total = total_reward(self._task, rewards)
            found.append((total, correct, np.where(mask, entropy, 0).sum(1), mask.sum(1), truncated))
        return tuple(np.concatenate(column).reshape(self._calls * self._batch, -1) for column in zip(*found))

    def __call__(self, params: Any, key: Array, step: int, *, greedy: bool = False) -> dict[str, float]:
        """Metrics of the policy at `step`, all under `val/`.

        Returns:
          `val/reward/mean@n` (all, hard, and by difficulty), `val/pass@k` for k = 1, 2, 4 ... n (unbiased), 95 %
          bootstrap intervals over prompts of `val/reward/mean@n` and `val/pass@n`, `val/entropy` (mean over sampled
          tokens, nats), lengths; with `greedy` also `val/reward/greedy`.
        """
        total, correct, entropy, lengths, truncated = self._sample(params, key, step, False)
        n = self._num_samples
        metrics = {
            f"val/reward/mean@{n}": float(total.mean()),
            "val/entropy": float(entropy.sum() / max(lengths.sum(), 1)),
            "val/response_length/mean": float(lengths.mean()),
            "val/truncated": float(truncated.mean()),
            "val/num_prompts": len(total),
        }
        metrics |= self._by_difficulty(total)
        metrics |= self._intervals(total.mean(1), correct.sum(1))
        if greedy:
            best = self._sample(params, key, step, True)[0]
            metrics["val/reward/greedy"] = float(best.mean())
        return metrics

    def _by_difficulty(self, total: np.ndarray) -> dict[str, float]:
        """Mean rewards of the prompts of each difficulty, and of the hard ones where difficulties are numbers."""
        name = self._task.difficulty_field
        if name is None:
            return {}
        level = self._prompts.fields[name][: len(total)]
        found = {f"val/reward/difficulty={value}": float(total[level == value].mean()) for value in np.unique(level)}
        if level.dtype.kind in "iu" and (level >= self._hard_from).any():
            found[f"val/reward_hard/mean@{self._num_samples}"] = float(total[level >= self._hard_from].mean())
        return found

    def _intervals(self, reward: np.ndarray, num_correct: np.ndarray) -> Mapping[str, float]:
        n = self._num_samples
        low, high = evaluation.bootstrap_interval(reward, seed=0)
        found = {f"val/reward/mean@{n}/low": low, f"val/reward/mean@{n}/high": high}
        for k in sorted({*(2**i for i in range(n.bit_length())), n}):
            found[f"val/pass@{k}"] = float(evaluation.pass_at_k(n, num_correct, k).mean())
        low, high = evaluation.bootstrap_interval(evaluation.pass_at_k(n, num_correct, n), seed=0)
        return found | {f"val/pass@{n}/low": low, f"val/pass@{n}/high": high}

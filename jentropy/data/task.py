"""A task is a dataset, a tokenizer and its graders."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jentropy import base
from jentropy.data import chain_sum, chain_sum_pairs, jsonl, jsonl_arrays
from jentropy.data.preferences import PreferenceSource
from jentropy.data.source import DemonstrationSource, MixtureSource
from jentropy.data.steps import AfterText, EveryToken, StepBoundary
from jentropy.data.thoughts import BeforeMarker, Thought
from jentropy.data.tokenizer import Tokenizer, char_tokenizer, file_tokenizer
from jentropy.rewards import answers
from jentropy.rewards import chain_sum as chain_sum_rewards
from jentropy.rewards.answers import AnswerId
from jentropy.rewards.base import DeviceReward, Reward, TextReward, weights_of
from jentropy.rewards.functions import text_reward


@dataclasses.dataclass(frozen=True)
class Task:
    """What an experiment needs to know of a task; hashable.

    Attributes:
      name: what reports call it.
      tokenizer: text to tokens and back.
      prompt_columns: L, columns of the prompt bucket.
      max_new_tokens: longest response.
      rewards: the graders, one reward column each.
      difficulty_field: the prompt field by which reports group; None if they do not.
      difficulties: what mixtures weigh: the splits of each are named `train_<value>` and `heldout_<value>`.
      split_arrays: `(config, split, data_dir) -> {feature: [N, ...]}`, configs "prompts" and "demonstrations".
      data_dir: folder of the datasets; None for `storage.default_data_dir()`.
      sources: (file name, sha256) of the files that the data were made of, if there are any.
      answer_id: on the device, which responses give the same answer: see `rewards.answers.AnswerId`.
      final_answer: the same on the host, if there is no `answer_id`: the answer of a completion, empty for none.
      thought: which tokens of a response are its thought, for methods that stop it; None if there is none.
      exit_inducer: token ids that are put behind a thought to ask for the answer at once; () for none.
      pair_splits: what mixtures of pairs of responses weigh: the splits of each are named `train_<value>`.
      pair_arrays: `(split, data_dir) -> {feature: [N, ...]}`, see `PreferenceSource`; None if there are no pairs.
      step_boundary: where the steps of a response begin, for methods that value them; None if there are no steps.
    """

    name: str
    tokenizer: Tokenizer
    prompt_columns: int
    max_new_tokens: int
    rewards: tuple[Reward, ...]
    difficulty_field: str | None
    difficulties: tuple[int | str, ...]
    split_arrays: Callable[[str, str, str | None], dict[str, np.ndarray]]
    data_dir: str | None = None
    sources: tuple[tuple[str, str], ...] = ()
    answer_id: AnswerId | None = None
    final_answer: Callable[[str], str] | None = None
    step_boundary: StepBoundary | None = None
    thought: Thought | None = None
    exit_inducer: tuple[int, ...] = ()
    pair_splits: tuple[int | str, ...] = ()
    pair_arrays: Callable[[str, str | None], dict[str, np.ndarray]] | None = None

    @property
    def has_answers(self) -> bool:
        """Whether rows of this task can hold `answer_id`."""
        return self.answer_id is not None or self.final_answer is not None

    @property
    def reward_weights(self) -> tuple[float, ...] | None:
        """The weights of the reward columns, None if all are 1."""
        return weights_of(self.rewards)

    def prompts(self, split_prefix: str, weights: Mapping) -> MixtureSource:
        """Prompts of the "train" or "heldout" splits.

        Args:
          split_prefix: "train" or "heldout".
          weights: unnormalised probability by difficulty.

        Raises:
          ValueError: unknown prefix, bad weights, an empty split, or a prompt longer than `prompt_columns`.
        """
        base.require(split_prefix in ("train", "heldout"), "split_prefix", split_prefix, "'train' or 'heldout'")
        return MixtureSource(self._splits("prompts", split_prefix), weights)

    def demonstrations(self, weights: Mapping, strategy_prior: float = 0.5) -> DemonstrationSource:
        """Supervised rows of the "train" splits, `prompt_columns + max_new_tokens` columns.

        Args:
          weights: unnormalised probability by difficulty.
          strategy_prior: probability of the step-by-step strategy that the warm start shall learn.
        """
        return DemonstrationSource(self._splits("demonstrations", "train"), weights, strategy_prior=strategy_prior)

    def preferences(self, weights: Mapping) -> PreferenceSource:
        """Pairs of responses to prompts of the "train" splits, `prompt_columns + max_new_tokens` columns.

        Args:
          weights: unnormalised probability by name in `pair_splits`.

        Raises:
          ValueError: the task has no pairs, bad weights, or a prompt or response that does not fit.
        """
        if self.pair_arrays is None:
            raise ValueError(f"task {self.name!r} has no pairs of responses to learn preferences from")
        splits = {name: self.pair_arrays(f"train_{name}", self.data_dir) for name in self.pair_splits}
        fitted = {name: arrays | {"prompt": self._fit(arrays["prompt"])} for name, arrays in splits.items()}
        return PreferenceSource(fitted, weights)

    def _splits(self, config: str, prefix: str) -> dict[int | str, dict[str, np.ndarray]]:
        splits = {}
        for difficulty in self.difficulties:
            arrays = self.split_arrays(config, f"{prefix}_{difficulty}", self.data_dir)
            splits[difficulty] = arrays | {"prompt": self._fit(arrays["prompt"])}
        return splits

    def _fit(self, prompt: np.ndarray) -> np.ndarray:
        """Pads prompts `[N, L]` on the right to the bucket."""
        rows, columns = prompt.shape
        if columns > self.prompt_columns:
            raise ValueError(
                f"a prompt of {columns} tokens does not fit the bucket of {self.prompt_columns} tokens "
                f"(prompt_columns of task {self.name!r})"
            )
        fitted = np.full((rows, self.prompt_columns), self.tokenizer.pad_id, np.int32)
        fitted[:, :columns] = prompt
        return fitted


def easy_mixture(easy: float) -> dict[int, float]:
    """Weights of chained addition by number of digits: n = 2 has probability `easy`, n = 3..6 share the rest.

    >>> easy_mixture(0.2)
    {2: 0.2, 3: 0.2, 4: 0.2, 5: 0.2, 6: 0.2}
    """
    base.require(0 <= easy <= 1, "easy", easy, "in [0, 1]")
    hard = chain_sum.NUM_DIGITS[1:]
    return {2: easy} | {n: (1 - easy) / len(hard) for n in hard}


def chain_sum_task(*, data_dir: str | os.PathLike | None = None, reward: str = "device") -> Task:
    """Chained addition with two strategies; see `data/chain_sum.py`.

    Args:
      data_dir: folder of the datasets; None for `storage.default_data_dir()`.
      reward: "device" or "text": the correct answer; "device+chain" or "text+chain": besides, as a second reward, the
        legal chain. See `rewards/chain_sum.py`; graders of tokens and of text give the same rewards.
    """
    graders = {
        "device": (chain_sum_rewards.DEVICE_REWARD,),
        "text": (chain_sum_rewards.TEXT_REWARD,),
        "device+chain": (chain_sum_rewards.DEVICE_REWARD, chain_sum_rewards.LEGAL_DEVICE_REWARD),
        "text+chain": (chain_sum_rewards.TEXT_REWARD, chain_sum_rewards.LEGAL_TEXT_REWARD),
    }
    base.require(reward in graders, "reward", reward, f"one of {list(graders)}")
    return Task(
        name="chain_sum",
        tokenizer=chain_sum.TOKENIZER,
        prompt_columns=chain_sum.PROMPT_LENGTH,
        max_new_tokens=chain_sum.RESPONSE_LENGTH,
        rewards=graders[reward],
        difficulty_field="num_digits",
        difficulties=chain_sum.NUM_DIGITS,
        split_arrays=chain_sum.split_arrays,
        data_dir=None if data_dir is None else os.fspath(data_dir),
        answer_id=answers.chain_sum_id,
        step_boundary=EveryToken(chain_sum.TOKENIZER.eos_id),
        pair_splits=chain_sum.NUM_DIGITS,
        pair_arrays=chain_sum_pairs.split_arrays,
    )


def chain_sum_exits_task(*, data_dir: str | os.PathLike | None = None, reward: str = "device") -> Task:
    """Chained addition with thoughts that go on for too long, then an exit token and the answer.

    Args:
      data_dir: as of `chain_sum_task`; the prompts are the same.
      reward: "device" or "text", the correct answer behind an exit.
    """
    graders = {"device": chain_sum_rewards.EXIT_DEVICE_REWARD, "text": chain_sum_rewards.EXIT_TEXT_REWARD}
    base.require(reward in graders, "reward", reward, f"one of {list(graders)}")
    return dataclasses.replace(
        chain_sum_task(data_dir=data_dir),
        name="chain_sum_exits",
        tokenizer=chain_sum.EXIT_TOKENIZER,
        max_new_tokens=chain_sum.EXIT_RESPONSE_LENGTH,
        rewards=(graders[reward],),
        split_arrays=chain_sum.exit_split_arrays,
        thought=BeforeMarker((chain_sum.EXIT,)),
        exit_inducer=(chain_sum.EXIT,),
        pair_splits=(),
        pair_arrays=None,
    )


def jsonl_task(
    *, path: str, rewards: Sequence[str | Callable | Reward] | str | Callable | Reward, max_new_tokens: int,
    tokenizer: str | Tokenizer | None = None, prompt_columns: int | None = None, heldout_fraction: float = 0.1,
    data_dir: str | None = None, preferences: str | None = None, thought_end: str | None = None,
    exit_inducer: str | None = None,
) -> Task:  # fmt: skip
    """A task from a user's own prompts and graders; see `data/jsonl.py`. Mixtures weigh the stems of the files.

    Evaluations need prompts, answers and graders also where a policy learns from preferences only.

    Args:
      path: a JSONL file of `{"prompt", "answer", ...}`, or a directory of them.
      rewards: graders: functions `(prompts, completions, **fields) -> list of numbers or None`, each as itself, as
        "path/to/file.py:name", or as `rewards.functions.text_reward(...)` makes it, with a weight and limits. Those
        that are not made so run in two worker processes with a deadline of 10 s.
      max_new_tokens: longest response, its end included.
      tokenizer: the path of a `tokenizer.json`, or a tokenizer; None for the characters of the data.
      prompt_columns: L, tokens of the longest prompt allowed; None for the longest there is, rounded up to a multiple
        of 8.
      heldout_fraction: share of held-out prompts, in (0, 1).
      data_dir: folder of all datasets; None for `storage.default_data_dir()`.
      preferences: a JSONL file of `{"prompt", "chosen", "rejected"}`, or a directory of them, for a `Prefer` stage,
        whose mixture weighs the stems of these files; None: there are none. Pairs of held-out prompts are left out.
      thought_end: the text that ends a thought, such as "</think>", for methods that stop it; None: there is none. Its
        tokens by themselves must be those that the policy writes.
      exit_inducer: the text that is put behind a thought to ask for the answer at once, `thought_end` included, such as
        "Time is limited, stop thinking and start answering.\\n</think>\\n\\n".

    Raises:
      CorruptDataError: the prepared dataset is not what was written.
      ValueError: bad data, a bad grader, or a number out of range; names it.
      OSError: a file cannot be read or written; names it.
      ImportError: a `tokenizer.json` without the package `tokenizers`.
    """
    base.require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    base.require(prompt_columns is None or prompt_columns >= 1, "prompt_columns", prompt_columns, "at least 1")
    both = bool(thought_end) == bool(exit_inducer)
    base.require(both, "exit_inducer", exit_inducer, f"given if and only if thought_end is, which is {thought_end!r}")
    listed = rewards if isinstance(rewards, list | tuple) else (rewards,)
    base.require(len(listed) > 0, "rewards", rewards, "at least one")
    graders = tuple(
        item if isinstance(item, DeviceReward | TextReward) else text_reward(item)  # pyright: ignore
        for item in listed
    )
    data = jsonl.prepare(path, heldout_fraction=heldout_fraction, data_dir=data_dir)
    pairs = None
    if preferences is not None:
        pairs = jsonl.prepare(preferences, heldout_fraction=heldout_fraction, data_dir=data_dir, kind=jsonl.PAIRS)
    prepared = [data] if pairs is None else [data, pairs]
    if tokenizer is None:
        texts = [text for made in prepared for text in jsonl_arrays.texts(made)]
        tokenizer = char_tokenizer([*texts, thought_end or "", exit_inducer or ""])
    elif isinstance(tokenizer, str | os.PathLike):
        tokenizer = file_tokenizer(tokenizer)
    longest = max(jsonl_arrays.longest_prompt(made, tokenizer) for made in prepared)
    columns = -(-longest // 8) * 8 if prompt_columns is None else prompt_columns
    sizes: dict[str, Any] = {"tokenizer": tokenizer, "prompt_columns": columns, "max_new_tokens": max_new_tokens}
    return Task(
        name=pathlib.Path(path).stem,
        tokenizer=tokenizer,
        prompt_columns=columns,
        max_new_tokens=max_new_tokens,
        rewards=graders,
        difficulty_field="part" if len(data.parts) > 1 else None,
        difficulties=data.parts,
        split_arrays=jsonl_arrays.JsonlArrays(data=data, **sizes),
        data_dir=data_dir,
        sources=tuple(source for made in prepared for source in made.sources),
        final_answer=answers.final_answer,
        step_boundary=AfterText(tokenizer),
        pair_splits=() if pairs is None else pairs.parts,
        pair_arrays=None if pairs is None else jsonl_arrays.PairArrays(data=pairs, **sizes),
        thought=BeforeMarker(_ids(tokenizer, thought_end)) if thought_end else None,
        exit_inducer=_ids(tokenizer, exit_inducer or ""),
    )


def _ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(int(token) for token in tokenizer.encode(text)) if text else ()

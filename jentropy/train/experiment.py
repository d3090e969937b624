"""What a run is: a task, a policy and a list of stages. Plain frozen dataclasses, built by a config file."""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import TypeAlias

from jentropy import conflicts
from jentropy.base import Objective, require
from jentropy.data.task import Task
from jentropy.policy.transformer import TransformerConfig, transformer
from jentropy.rewards.base import DeviceReward, weights_of
from jentropy.rollout.dynamic import DynamicSampling
from jentropy.rollout.strategy import Strategy
from jentropy.samplers import Sampler
from jentropy.train.ledger import Ledger
from jentropy.train.optimizer import AdamW
from jentropy.train.preference_stage import Prefer
from jentropy.train.second_models import SecondModel
from jentropy.train.sharding import MeshShape, check_rows, make_mesh

PROVIDED = ("ref_log_prob", "answer_id", "greedy_reward", "truncated", "is_valid")
"""What rows can hold for methods that require it; the first needs `Reinforce.reference`, the second the task."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised:
    """A stage of supervised learning on demonstrations: a warm start.

    Attributes:
      name: of the stage, in metrics and plots.
      steps: optimizer steps.
      batch_size: demonstrations per step.
      mixture: weight of each split of the task (for the embedded task: share of each number of digits).
      optimizer: its optimizer.
      options: further arguments of `task.demonstrations`.
      seed: of initialisation (if it is the first stage) and data order; the run's own seed does not enter, so runs
        share warm starts.
    """

    name: str = "warm_start"
    steps: int
    batch_size: int = 256
    mixture: Mapping[int | str, float]
    optimizer: AdamW = dataclasses.field(default_factory=AdamW)
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforce:
    """A stage of reinforcement learning on one distribution of prompts.

    Optimizer, mechanisms, estimator and sampler start anew with the stage.

    Attributes:
      name: of the stage, in metrics and plots.
      steps: rollouts.
      objective: the method.
      mixture: weight of each split of the task.
      num_prompts: prompts per rollout.
      num_generations: responses per prompt, the group size.
      optimizer: its optimizer.
      num_minibatches, num_epochs: updates per rollout are their product; minibatches are made of whole groups.
      num_microbatches: parts in which an update is computed; changes memory, not results.
      reference: keep the parameters at the start of the stage as the frozen reference policy.
      sampler: how responses are drawn; None for `samplers.plain()`, every token at the objective's temperature.
        Evaluations are always plain.
      dynamic_sampling: which groups are kept, with new prompts until all `num_prompts` groups are such; None: all.
        Prompts and samples of round r are a function of (seed, step, r), those of the first round the ones that are
        sampled without it: no prompt is set aside for the next rollout.
      strategy: more rows than the responses to the prompts, sampled from prefixes of these; None: the responses are the
        rows. It says how many groups of `num_generations` rows a rollout has. Evaluations have none.
      mask_truncated: no gradient from responses that were cut at the limit; see `shaping.mask_truncated`.
      shaping: rewards that are added as further columns after the task's, such as `overlong_reward`. They are not
        evaluated, dynamic sampling does not look at them, and they make no row valid that no grader of the task graded.
      eos_in_loss: whether the token that ends a response is trained on and counts in statistics, as in TRL and verl.
      ledger: which steps are entered into the entropy ledger, `ledger.jsonl`; None for none, at no cost.
      learners: second models by name, such as a `Critic`, which give what the estimator needs.
    """

    name: str = "rl"
    steps: int
    objective: Objective
    mixture: Mapping[int | str, float]
    num_prompts: int = 32
    num_generations: int = 8
    optimizer: AdamW = dataclasses.field(default_factory=AdamW)
    num_minibatches: int = 2
    num_epochs: int = 2
    num_microbatches: int = 1
    reference: bool = False
    sampler: Sampler | None = None
    dynamic_sampling: DynamicSampling | None = None
    strategy: Strategy | None = None
    mask_truncated: bool = False
    shaping: tuple[DeviceReward, ...] = ()
    eos_in_loss: bool = True
    ledger: Ledger | None = None
    learners: Mapping[str, SecondModel] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "num_prompts", "num_minibatches", "num_epochs", "num_microbatches"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        least = self.objective.estimator.min_group_size
        require(self.num_generations >= least, "num_generations", self.num_generations, f"at least {least} here")
        require(
            self.num_prompts % self.num_minibatches == 0,
            "num_prompts",
            self.num_prompts,
            f"a multiple of num_minibatches = {self.num_minibatches}",
        )
        rows = self.num_rows // self.num_minibatches
        require(
            rows % self.num_microbatches == 0,
            "num_microbatches",
            self.num_microbatches,
            f"a divisor of the {rows} rows of an update",
        )
        require(self.objective.temperature > 0, "temperature", self.objective.temperature, "positive")
        conflicts.check(self.objective, f"stage {self.name!r}", self.strategy)
        held = [*PROVIDED, *(name for model in self.learners.values() for name in model.provides)]
        held += [] if self.strategy is None else self.strategy.provides
        unknown = sorted(self.required - set(held))
        if unknown:
            raise ValueError(
                f"a method needs {', '.join(unknown)}, and rows can hold only {', '.join(held)}: add what provides it, "
                "such as a second model in `learners` or a `strategy`"
            )
        twice = sorted({name for name in held if held.count(name) > 1})
        require(not twice, "learners", sorted(self.learners), f"such that only one gives {', '.join(twice)}")
        if "ref_log_prob" in self.required:
            require(self.reference, "reference", self.reference, "True: the objective needs the reference policy")
        if self.strategy is not None:
            self._check_strategy(self.strategy)
        if self.dynamic_sampling is not None:
            enough = self.num_generations >= 2
            require(enough, "num_generations", self.num_generations, "at least 2 for dynamic_sampling")
        updates, wanted = self.num_minibatches * self.num_epochs, self.objective.mechanisms.min_updates
        if updates < wanted:
            warnings.warn(
                f"stage {self.name!r}: a mechanism has no effect with fewer than {wanted} updates per rollout, and "
                f"num_minibatches * num_epochs = {updates}",
                stacklevel=2,
            )

    def _check_strategy(self, strategy: Strategy) -> None:
        if self.dynamic_sampling is not None:
            raise ValueError(
                f"stage {self.name!r}: dynamic_sampling and a strategy do not go together: rows of groups that do not "
                "vary count as well, because they say what a state is worth"
            )
        missing = sorted(self.required & set(strategy.refuses))
        if missing:
            kind = type(strategy).__name__
            raise ValueError(f"a method needs {', '.join(missing)}, which the rows of {kind} cannot hold")

    @property
    def num_groups(self) -> int:
        """Groups of a rollout, of `num_generations` rows each."""
        return self.num_prompts if self.strategy is None else self.strategy.num_groups(self.num_prompts)

    @property
    def num_rows(self) -> int:
        """Rows of a rollout."""
        return self.num_groups * self.num_generations

    @property
    def required(self) -> frozenset[str]:
        """What the objective needs the rows to hold."""
        return frozenset(self.objective.estimator.requires) | frozenset(self.objective.mechanisms.requires)


Stage: TypeAlias = Supervised | Reinforce | Prefer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluation on held-out prompts, always the same ones.

    Attributes:
      mixture: weight of each split of the task.
      every: rollouts between evaluations, counted from the start of a stage; the end of the run is evaluated besides.
      num_prompts: held-out prompts of an evaluation along the way.
      final_num_prompts: held-out prompts of the evaluation at the end of the run, which also decodes greedily.
      num_samples: responses per prompt; pass@k is reported for k up to it.
      hard_from: prompts whose difficulty is at least this are reported apart as well.
    """

    mixture: Mapping[int | str, float]
    every: int = 10
    num_prompts: int = 128
    final_num_prompts: int = 512
    num_samples: int = 8
    hard_from: int = 4

    def __post_init__(self) -> None:
        for name in ("every", "num_prompts", "final_num_prompts", "num_samples"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run.

    Attributes:
      name: letters, digits, dot, dash, underscore; does not begin with a dot.
      task: data, tokenizer and graders.
      policy: the model's shape.
      stages: in order.
      evaluation: how the policy is evaluated.
      seed: of reinforcement learning: prompts, samples, updates; and of the order of pairs.
      mesh: devices per axis.
      checkpoint_every: rollouts between checkpoints; the end of every stage is kept besides.
      sampler_tolerance: largest difference between the sampler's and the trainer's log-probabilities, over the larger
        of 1 nat and their size, in the first rollout after a start; more is an error.
      eval_batch: prompts per call of the evaluation's sampler.
      hang_limit: seconds after which a part of the run that does not end stops the process; None for never.
      keep_rollouts: numbers of rollouts that are kept, with the state before their updates, below `rollouts` in the
        run's folder, for `jentropy replay` and `jentropy what-if`. Each takes the room of a checkpoint. A stage of
        learning from preferences, whose steps count like rollouts, has none to keep.
    """

    name: str
    task: Task
    policy: TransformerConfig
    stages: tuple[Stage, ...]
    evaluation: Evaluation
    seed: int = 0
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    checkpoint_every: int = 100
    sampler_tolerance: float = 1e-5
    eval_batch: int = 32
    hang_limit: float | None = 1800.0
    keep_rollouts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        named = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", self.name)
        require(named is not None, "name", self.name, "letters, digits, dots, dashes, underscores")
        require(bool(self.stages), "stages", self.stages, "at least one stage")
        require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "at least 1")
        require(self.sampler_tolerance > 0, "sampler_tolerance", self.sampler_tolerance, "positive")
        require(self.eval_batch >= 1, "eval_batch", self.eval_batch, "at least 1")
        positive = self.hang_limit is None or self.hang_limit > 0
        require(positive, "hang_limit", self.hang_limit, "positive or None")
        self._check_kept()
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), "stages", names, "of different names")
        rewards = [reward.name for reward in self.task.rewards]
        for stage in self.stages:
            if isinstance(stage, Reinforce) and stage.dynamic_sampling is not None:
                stage.dynamic_sampling.column(rewards)
            if isinstance(stage, Reinforce) and "answer_id" in stage.required and not self.task.has_answers:
                raise ValueError(
                    f"a method of stage {stage.name!r} needs answer_id, and task {self.task.name!r} does not say what "
                    "the answer of a response is: give it an answer_id or a final_answer"
                )
            if isinstance(stage, Reinforce) and stage.strategy is not None:
                stage.strategy.check(stage.num_generations, self.task)
            if isinstance(stage, Reinforce):
                for model in stage.learners.values():
                    model.make(transformer(self.policy))
            if isinstance(stage, Prefer) and self.task.pair_arrays is None:
                raise ValueError(f"stage {stage.name!r}: task {self.task.name!r} has no pairs of responses")
        vocab = self.task.tokenizer.vocab_size
        require(self.policy.vocab_size >= vocab, "policy.vocab_size", self.policy.vocab_size, f"at least {vocab}")

    @property
    def num_steps(self) -> int:
        """Steps of all stages but the supervised ones: rollouts, and batches of pairs."""
        return sum(stage.steps for stage in self.stages if not isinstance(stage, Supervised))

    def _check_kept(self) -> None:
        total, start = self.num_steps, 0
        known = all(0 <= step < total for step in self.keep_rollouts)
        require(known, "keep_rollouts", self.keep_rollouts, f"rollouts of the run, in [0, {total})")
        for stage in self.stages:
            if isinstance(stage, Supervised):
                continue
            inside = [step for step in self.keep_rollouts if start <= step < start + stage.steps]
            if inside and isinstance(stage, Prefer):
                raise ValueError(
                    f"keep_rollouts: {inside} are steps of stage {stage.name!r}, which learns from pairs and has no "
                    "rollouts; its batches can be drawn again from the seed"
                )
            start += stage.steps

    def reward_weights(self, stage: Reinforce) -> tuple[float, ...] | None:
        """The weights of a stage's reward columns, those that shape after the task's; None if all are 1."""
        return weights_of((*self.task.rewards, *stage.shaping))

    def check_mesh(self) -> None:
        """Raises `ValueError` if the mesh does not divide the rows of a step, an update or an evaluation."""
        mesh = make_mesh(self.mesh)
        check_rows(mesh, self.eval_batch, "eval_batch")
        for stage in self.stages:
            if isinstance(stage, Supervised):
                check_rows(mesh, stage.batch_size, f"{stage.name}.batch_size")
            elif isinstance(stage, Prefer):
                check_rows(mesh, stage.batch_size // stage.num_microbatches, f"{stage.name}: a micro-batch of pairs")
            else:
                check_rows(mesh, stage.num_prompts, f"{stage.name}.num_prompts")
                rows = stage.num_rows // stage.num_minibatches // stage.num_microbatches
                check_rows(mesh, rows, f"{stage.name}: a micro-batch")

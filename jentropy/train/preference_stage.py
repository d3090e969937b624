"""A stage of learning from preferences: pairs of responses, no sampling and no reward."""

import dataclasses
from collections.abc import Mapping

from jentropy.base import require
from jentropy.preference import PairLoss
from jentropy.train.optimizer import AdamW


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefer:
    """A stage of learning from preferences, such as H-DPO, on the pairs of the task.

    The reference policy is the one at the start of the stage; the optimizer starts anew with it. Log-probabilities are
    those at temperature 1. Steps count like rollouts: for metrics, checkpoints and evaluations.

    Attributes:
      name: of the stage, in metrics and plots.
      steps: optimizer steps, each on a batch of its own.
      loss: on pairs, such as `preference.h_dpo`.
      mixture: weight of each split of the task's pairs.
      batch_size: pairs per step. Which they are is a function of the run's seed and the number of the step.
      num_microbatches: parts in which an update is computed; changes memory, not results.
      optimizer: its optimizer.
    """

    name: str = "preferences"
    steps: int
    loss: PairLoss
    mixture: Mapping[int | str, float]
    batch_size: int = 64
    num_microbatches: int = 1
    optimizer: AdamW = dataclasses.field(default_factory=AdamW)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "num_microbatches"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(
            self.batch_size % self.num_microbatches == 0,
            "num_microbatches",
            self.num_microbatches,
            f"a divisor of batch_size = {self.batch_size} pairs",
        )

    @property
    def num_rows(self) -> int:
        """Rows of a batch, two of each pair."""
        return 2 * self.batch_size

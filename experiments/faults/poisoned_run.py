"""The run of the fault matrix with the tests' `poison` in its first stage; it strikes once its step is set."""

import fiddle as fdl
from poison import poison
from tiny_run import get_config as healthy


def get_config() -> fdl.Config:
    """`tiny_run` with a mechanism that can put a NaN or an infinity in the loss or the gradient of one update."""
    config = healthy()
    config.stages[1].objective.mechanisms.poison = fdl.Config(poison)
    return config

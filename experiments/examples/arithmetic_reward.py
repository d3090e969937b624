"""Graders of arithmetic.jsonl: called with lists, one entry per response; every field of the data is an argument."""


def correct(prompts: list[str], completions: list[str], answer: list[int], **fields: list) -> list[float]:
    """1 for the right number, 0 for anything else."""
    return [float(completion == str(right)) for completion, right in zip(completions, answer)]


def near(prompts: list[str], completions: list[str], answer: list[int], **fields: list) -> list[float | None]:
    """Between 0 and 1, more for numbers that are nearer; None, an abstention, where there is no number."""
    rewards = []
    for completion, right in zip(completions, answer):
        if completion.isdecimal() and len(completion) < 4:
            rewards.append(1.0 / (1.0 + abs(int(completion) - right)))
        else:
            rewards.append(None)
    return rewards

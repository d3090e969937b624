"""`jentropy quickstart`: entropy collapse, the law, and who can still adapt after the task has changed."""

from pathlib import Path

from jentropy import embedded
from jentropy.report.plots import comparison_plot
from jentropy.report.summary import law_of, shift_row
from jentropy.report.tables import table
from jentropy.theory.law import LawError
from jentropy.train.loop import train
from jentropy.train.metrics import read_metrics

NAMES = {"shift_grpo": "GRPO", "shift_clip_cov": "GRPO + Clip-Cov", "shift_entropy_bonus": "GRPO + entropy bonus"}
COLUMNS = {
    "method": "method",
    "entropy_before": "entropy before the shift",
    "steps": "steps to reward .9",
    "final_reward": "final reward",
    "hard_reward": "reward, n >= 4",
    "pass_at_n": "pass@8",
}


def _law_text(lines: list[dict]) -> list[str]:
    """The fitted law of the LAW run, or why there is none."""
    try:
        law, entropy, reward = law_of(lines)
    except LawError as error:
        return [f"The law of plain GRPO: no fit, {error}."]
    return [
        f"The law of plain GRPO, {law.num_points} evaluations of 128 x 8: R = {-law.a:.3f} exp(H) + {law.b:.3f}, "
        f"R² {law.r_squared:.3f};",
        f"entropy {entropy[0]:.2f} -> {entropy[-1]:.2f} nats, reward {reward[0]:.2f} -> {reward[-1]:.2f}, "
        f"ceiling at zero entropy {law.ceiling:.3f} ± {law.ceiling_stderr:.3f} (standard error).",
    ]


def summary_text(runs: dict[str, list[dict]]) -> str:
    """The table of the shift and the fitted law, as text, from the metrics of the four runs."""
    rows = []
    for name, title in NAMES.items():
        row = shift_row(runs[name], embedded.SHIFT_STEP)
        row |= {"method": title, "steps": "never" if row["steps_to_goal"] is None else str(row["steps_to_goal"])}
        rows.append(row)
    final = runs["shift_grpo"][-1]
    return "\n".join([
        table(rows, COLUMNS),
        "",
        "entropy before the shift: nats per token, mean of the last 10 rollouts of 256 responses each;",
        "steps to reward .9: rollouts after the shift, evaluated every 10 on 128 held-out prompts x 8 samples;",
        f"the last three: {final['val/num_prompts']} held-out prompts x 8 samples at temperature 1. One seed each:",
        "experiments/results/ablation.md has the same comparison over several seeds and warm starts, with intervals.",
        "",
        *_law_text(runs["law_grpo"]),
    ])  # fmt: skip


def quickstart(out: Path, *, quiet: bool = False) -> str:
    """Runs the four experiments in folders of `out`, writes `quickstart.png` and `summary.md`; returns the summary."""
    runs = {}
    for name, config in embedded.quickstart().items():
        train(config, out / name, quiet=quiet)
        runs[name] = read_metrics(out / name / "metrics.jsonl")
    text = summary_text(runs)
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    compared = {title: runs[name] for name, title in NAMES.items()}
    comparison_plot(compared, out / "quickstart.png", embedded.SHIFT_STEP, law_run=runs["law_grpo"])
    return text

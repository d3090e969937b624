"""Writes arithmetic.jsonl beside this file: the 900 sums of two numbers below 30, in two lines each.

A line is `{"prompt": "7+15=", "answer": 22, "response": "23"}`. Prompt and answer are all that a run needs; the
response, wrong in every other line, is for the warm start, without which a policy of random numbers learns nothing.

Command:  python experiments/examples/arithmetic_data.py
"""

import json
import random
from pathlib import Path


def main() -> None:
    """Writes the file."""
    rng = random.Random(0)
    lines = []
    for a in range(30):
        for b in range(30):
            wrong = max(0, a + b + rng.choice([-10, -2, -1, 1, 2, 10]))
            for response in (a + b, wrong):
                lines.append(json.dumps({"prompt": f"{a}+{b}=", "answer": a + b, "response": str(response)}))
    path = Path(__file__).with_name("arithmetic.jsonl")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} lines")


if __name__ == "__main__":
    main()

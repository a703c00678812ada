"""Writes an lm-eval task into a directory: which of four continuations belongs to the beginning of a paragraph?

    python scripts/pydoc_task.py DIR [--samples 200]

The paragraphs are those of the topics of Python's documentation that the bundled model has not been trained on; wrong
continuations are from other paragraphs of the same split. An example of a task of one's own, for docs/tasks.md.
"""

import argparse
import json
import random
from pathlib import Path

from jointq_cli.data.pydoc import paragraphs, topics

NAME = "pydoc_continuation"
CHOICES = 4
LEAST, SPLIT_AT, MOST = 24, 16, 40  # words of a paragraph, of its beginning, and of both together

YAML = f"""\
task: {NAME}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {NAME}.jsonl  # relative to this directory
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{beginning}}}}"
doc_to_choice: continuations
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""


def rows(samples: int, seed: int = 0) -> list[dict[str, object]]:
    """One per question: beginning, continuations, and the number of the right one."""
    rng = random.Random(seed)
    words = [block.split() for topic in topics("evaluation") for block in paragraphs(topic)]
    halves = [(" ".join(w[:SPLIT_AT]), " ".join(w[SPLIT_AT:MOST])) for w in words if len(w) >= LEAST]
    rng.shuffle(halves)
    found: list[dict[str, object]] = []
    for beginning, right in halves[:samples]:
        wrong = rng.sample([end for _, end in halves if end != right], CHOICES - 1)
        answer = rng.randrange(CHOICES)
        found.append(
            {"beginning": beginning, "continuations": [*wrong[:answer], right, *wrong[answer:]], "answer": answer}
        )
    return found


def write_task(directory: Path, samples: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{NAME}.yaml").write_text(YAML, encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows(samples))
    (directory / f"{NAME}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    given = parser.parse_args()
    write_task(given.directory, given.samples)

"""A teacher's answers on disk, and what of them can be trained on."""

from collections import Counter
from pathlib import Path

from pydantic import ValidationError

from common import Task
from distill.files import ResumableJsonl, UserError
from distill.train.teacher_apis import Answer


class StoredAnswers:
    """The answers of one teacher, in a file that grows as they arrive. of: {prompt: Answer}."""

    def __init__(self, path: Path):
        self.file, self.of = ResumableJsonl(path), {}
        for i, row in enumerate(self.file.rows, 1):
            try:
                self.of[row["prompt"]] = Answer.model_validate(row)
            except (LookupError, ValidationError):
                raise UserError(f"{path}:{i}: expected an answer with fields 'prompt', 'text' and 'whole'") from None

    @property
    def path(self) -> Path:
        return self.file.path

    def keep(self, prompt: str, answer: Answer) -> None:
        self.file.append({"prompt": prompt, **answer.model_dump(exclude_none=True)})
        self.of[prompt] = answer


def use_answers(rows: list[dict], answers: StoredAnswers, task: Task | None) -> dict[str, int]:
    """Set teacher_output, and teacher_probs where the teacher gave probabilities; returns {why a row has none: rows}.

    A label task takes an answer that states a label, free text one that is complete.
    """
    useless, missing, shared = [], 0, Counter()
    for row in rows:
        answer = answers.of.get(row["input"])
        if answer is None:
            missing += 1
            continue
        if answer.probabilities:
            row["teacher_probs"] = answer.probabilities
            row["teacher_output"] = max(answer.probabilities, key=answer.probabilities.get)
            shared.update({tuple(labels): p / len(rows) for labels, p in answer.shared or ()})
        elif task:
            row["teacher_output"] = label_of(answer.text, task.labels)
        elif answer.whole and answer.text.strip():  # a text that was cut would teach to stop in mid-sentence
            row["teacher_output"] = answer.text
        if not row.get("teacher_output"):
            useless.append(answer.text)
    why = "answers that are no label" if task else "answers that are empty or longer than --max_len"
    if useless:
        print(f"{len(useless)} {why}, kept in {answers.path}; for example {useless[0][:60]!r}")
    for labels, p in shared.items():
        names = ", ".join(labels)
        print(f"{p:.2%} of the probability is on tokens that several labels begin with, divided among them: {names}")
    return {why: len(useless), "results that the batch does not have": missing}


def label_of(text: str, labels: tuple[str, ...]) -> str | None:
    """The label that an answer states, or None where that is not certain.

    Case, punctuation and a preamble such as "Answer:" are ignored. A label inside a sentence does not count: "not Bad"
    would teach the opposite.
    """
    for part in (text, text.rpartition(":")[2]):
        if part.strip() in labels:
            return part.strip()
        bare = part.strip(" \t\r\n*_`\"'.!()[]").casefold()
        found = [label for label in labels if label.casefold() == bare]
        if len(found) == 1:
            return found[0]
    return None

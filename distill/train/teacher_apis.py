"""The four protocols in which an endpoint can teach: what a request says, and how its reply is read.

chat       any task       the answer as text
logprobs   label task     label probabilities from the log-probs of a chat reply's tokens
systemone  label task     label probabilities, POST /systemone as vLLM, llama.cpp and Fireworks serve it
decisions  label task     the same in OpenAI's shape, POST /decisions
"""

import math
from collections import Counter
from typing import Annotated

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from common import Task

LABEL_TOKENS = 64  # per answer of a label task: a label and the words that some teachers put around it
LOGPROB_TOKENS = 16  # the label's own tokens are all that is read
TOP_LOGPROBS = 20  # the most that OpenAI and vLLM give by default
LEAST_LABEL_MASS = 0.5  # with more than half of the probability on other text, the rest says little about the labels
MARKS = " \t\r\n*_`\"'"  # what may stand before a label


class Answer(BaseModel):
    """A teacher's answer to one prompt, as it is stored.

    whole is False for a text that was cut. shared: label sets that the tokens did not tell apart, with their mass.
    """

    text: str
    whole: bool = True
    probabilities: dict[str, float] | None = None
    shared: list[tuple[list[str], float]] | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The fields that are read of the replies. What else is there is ignored.


def well_formed(text):
    """Text with half a character (a lone surrogate, which JSON can carry and UTF-8 cannot) replaced by "?"."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else text


Text = Annotated[str, BeforeValidator(well_formed)]


class Reply(BaseModel, strict=True):
    pass


class Usage(Reply):
    input_tokens: int | None = Field(None, validation_alias=AliasChoices("input_tokens", "prompt_tokens"))
    output_tokens: int | None = Field(None, validation_alias=AliasChoices("output_tokens", "completion_tokens"))


class Alternative(Reply):
    token: Text
    logprob: float


class Position(Alternative):
    top_logprobs: list[Alternative]


class Logprobs(Reply):
    content: list[Position] | None


class Message(Reply):
    content: Text | None


class Choice(Reply):
    message: Message
    finish_reason: str | None = None


class ChatReply(Reply):
    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None


class SystemOneReply(Reply):
    answers: dict[str, dict]  # a question that the model could not answer is missing
    usage: Usage | None = None


class OptionProbabilities(Reply):
    probabilities: dict[str, Annotated[float, Field(ge=0, le=1)]]


class OptionProbability(Reply):
    value: str
    probability: Annotated[float, Field(ge=0, le=1)]


class DecisionAnswer(Reply):
    type: str
    probabilities: list[OptionProbability] = []  # a refusal has none


class DecisionsReply(Reply):
    answers: list[DecisionAnswer] = Field(min_length=1)
    usage: Usage | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The protocols. path: below the endpoint's address. body: a request. read: its reply's JSON; ValueError when malformed.


class Chat:
    path = "/chat/completions"
    expected = "choices[0].message.content"

    def __init__(self, model: str, task: Task | None, max_tokens: int):
        self.model, self.task = model, task
        self.max_tokens = LABEL_TOKENS if task else max_tokens  # the most that an answer may have

    def body(self, prompt: str) -> dict:
        messages = [{"role": "user", "content": prompt}]
        return {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}

    def read(self, reply: dict) -> Answer:
        found = ChatReply.model_validate(reply)
        choice = found.choices[0]
        return Answer(text=choice.message.content or "", whole=choice.finish_reason != "length", **tokens(found.usage))


class ChatLogprobs(Chat):
    expected = "choices[0].logprobs.content"

    def __init__(self, model: str, task: Task, max_tokens: int):
        super().__init__(model, task, max_tokens)
        self.max_tokens = LOGPROB_TOKENS

    def body(self, prompt: str) -> dict:
        return super().body(prompt) | {"logprobs": True, "top_logprobs": TOP_LOGPROBS}

    def read(self, reply: dict) -> Answer:
        answer = super().read(reply)
        positions = Logprobs.model_validate(reply["choices"][0].get("logprobs")).content or []
        colons = [i for i, position in enumerate(positions) if ":" in position.token]
        for start in (0, *(i + 1 for i in colons[-1:])):  # "Good", or "Answer: Good"
            mass, shared = label_mass(positions[start:], self.task.labels, answer.whole)
            total = sum(mass.values()) + sum(shared.values())
            if total >= LEAST_LABEL_MASS:
                for labels, p in shared.items():  # nothing says which of them is meant
                    mass.update((label, mass[label] + p / len(labels)) for label in labels)
                answer.probabilities = {label: p / total for label, p in mass.items()}
                answer.shared = [(list(labels), p / total) for labels, p in shared.items()] or None
                break
        return answer


class SystemOne:
    path = "/systemone"
    expected = "answers.label.probabilities of the labels"

    def __init__(self, model: str, task: Task, max_tokens: int):
        self.model, self.task = model, task
        self.max_tokens = 0  # it writes no text

    def body(self, prompt: str) -> dict:
        question = {
            "type": "choice",
            "instructions": instructions(self.task),
            "criteria": dict.fromkeys(self.task.labels),
        }
        return {"model": self.model, "state": input_text(self.task, prompt), "questions": {"label": question}}

    def read(self, reply: dict) -> Answer:
        found = SystemOneReply.model_validate(reply)
        if "label" not in found.answers:
            return Answer(text="", **tokens(found.usage))
        return self.answer(OptionProbabilities.model_validate(found.answers["label"]).probabilities, found.usage)

    def answer(self, probabilities: dict[str, float], usage: Usage | None) -> Answer:
        if set(probabilities) != set(self.task.labels) or abs(sum(probabilities.values()) - 1) > 0.01:
            raise ValueError(f"expected one probability for each of {self.task.labels}")
        text = max(probabilities, key=probabilities.get)
        return Answer(text=text, probabilities=probabilities, **tokens(usage))


class Decisions(SystemOne):
    path = "/decisions"
    expected = "answers[0].probabilities of the labels"

    def body(self, prompt: str) -> dict:
        choices = [{"value": label} for label in self.task.labels]
        question = {"type": "choice", "name": "label", "instructions": instructions(self.task), "choices": choices}
        return {"model": self.model, "input": input_text(self.task, prompt), "questions": [question]}

    def read(self, reply: dict) -> Answer:
        found = DecisionsReply.model_validate(reply)
        if found.answers[0].type == "refusal":
            return Answer(text="", **tokens(found.usage))
        return self.answer({o.value: o.probability for o in found.answers[0].probabilities}, found.usage)


APIS = {"chat": Chat, "logprobs": ChatLogprobs, "systemone": SystemOne, "decisions": Decisions}


def tokens(usage: Usage | None) -> dict[str, int | None]:
    return usage.model_dump() if usage else {}


def input_text(task: Task, prompt: str) -> str:
    """The text that task.prompt put into the template: what `/infer` and a decision endpoint are asked about."""
    before, after = task.template.split("{input}")
    return prompt.removeprefix(before).removesuffix(after)


def instructions(task: Task) -> str:
    """The template without its input."""
    return task.template.replace("{input}", "").strip()


# ---------------------------------------------------------------------------------------------------------------------
# Label probabilities from token log-probs


def label_mass(
    positions: list[Position], labels: tuple[str, ...], whole: bool
) -> tuple[dict[str, float], dict[tuple[str, ...], float]]:
    """Probability that a reply begins with each label: ({label: p}, {labels not distinguished: p}).

    The teacher's tokenizer is unknown, so tokens are compared as text. An alternative that only one label begins with
    counts for it. Where several labels begin with it ("Very" of "Very Good" and "Very Bad"), the token that the reply
    took is followed to the next position, which tells them apart; the probability of an alternative that the reply did
    not take stays shared. What no label begins with, and what the reply's position did not list, counts for none.
    """
    mass, shared = dict.fromkeys(labels, 0.0), Counter()
    text, reached = "", 1.0
    for position in positions:
        last = whole and position is positions[-1]
        followed = None
        listed = {a.token: a.logprob for a in position.top_logprobs} | {position.token: position.logprob}
        for token, logprob in listed.items():
            p, taken = reached * math.exp(logprob), token == position.token
            fits = fitting_labels(text + token, labels, ended=not token or (taken and last))
            if len(fits) == 1:
                mass[fits[0]] += p
            elif taken and not last:
                followed = p if fits else None
            elif fits and (text + token).strip(MARKS):
                shared[fits] += p
        if followed is None:
            break
        text, reached = text + position.token, followed
    return mass, dict(shared)


def fitting_labels(text: str, labels: tuple[str, ...], ended: bool) -> tuple[str, ...]:
    """The labels that a reply beginning with `text` can mean. ended: nothing follows the text.

    Upper and lower case are alike unless that leaves several labels.
    """
    text = text.lstrip(MARKS)
    for fold in (str, str.casefold):
        start = fold(text)
        same = [label for label in labels if fold(label) == start]
        if ended and same:
            return tuple(same)
        longer = [label for label in labels if fold(label).startswith(start)]
        done = [la for la in labels if start.startswith(fold(la)) and not start[len(fold(la)) :][:1].isalnum()]
        found = longer or sorted(done, key=len)[-1:]
        if found:
            return tuple(found)
    return ()

"""POST /v1/decisions: the fields of its requests and answers, as OpenAI publishes them.

Fields that begin with x_ are ours. Unknown fields of a request are ignored. Images and tool calls are refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictStr, model_validator

from distill.serve.decision_prompt import content_text
from distill.serve.errors import UnicodeBody
from distill.serve.settings import MODELS
from distill.serve.systemone import (
    MAX_LEVELS,
    MAX_OPTIONS,
    MAX_QUESTIONS,
    NO,
    YES,
    Fit,
    Probability,
    confidence,
    different,
    readable,
)


class TextPart(BaseModel):
    type: Literal["input_text", "output_text"]
    text: str


class JsonPart(BaseModel):
    type: Literal["input_json"]
    data: dict[str, Any] | list[dict[str, Any]]


Part = Annotated[TextPart | JsonPart, Field(discriminator="type")]


def parts_text(parts: str | list[Part]) -> str:
    """A text, or its parts, each on a line of its own. Error: ValueError as content_text."""
    if isinstance(parts, str):
        return content_text(parts)
    texts = [content_text(part.text if isinstance(part, TextPart) else part.data) for part in parts]
    return "\n".join(texts).strip()


def input_text(value: "str | list[Message]") -> str:
    """What the questions are about: a single message's text, or "role: text" for each of several."""
    if isinstance(value, str):
        return content_text(value)
    texts = [(message.role, parts_text(message.content)) for message in value]
    if len(texts) == 1:
        return texts[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in texts if text)


class Message(BaseModel):
    type: Literal["message"] = "message"
    role: Literal["user", "developer", "system", "assistant"]
    content: Annotated[str | list[Part], readable(parts_text, filled=False)]


Description = Annotated[str, readable(content_text, filled=False)]


class OpenAIUsage(BaseModel):
    input_tokens: int
    output_tokens: int = 0
    total_tokens: int
    input_tokens_details: dict[str, int] = {"cached_tokens": 0, "cache_write_tokens": 0}
    output_tokens_details: dict[str, int] = {"reasoning_tokens": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Questions and answers. text: what is asked. options: (option, description) in the order of the request. answer: from
# their probabilities.


class Asked(BaseModel):
    name: str | None = Field(None, description="returned with the answer")
    instructions: Annotated[str | list[Part], readable(parts_text, filled=True)]

    def text(self) -> str:
        return parts_text(self.instructions)


class PredicateAnswer(BaseModel):
    type: Literal["predicate"] = "predicate"
    name: str | None
    probability: Probability
    x_calibration: Fit


class Predicate(Asked):
    """A statement that is true or not."""

    type: Literal["predicate"]

    def options(self) -> list[tuple[str, str]]:
        return [(YES, ""), (NO, "")]

    def answer(self, probabilities: list[float], fit: str) -> PredicateAnswer:
        return PredicateAnswer(name=self.name, probability=probabilities[0], x_calibration=fit)


class Option(BaseModel):
    value: StrictStr | StrictBool
    description: Description = ""

    def text(self) -> str:
        return content_text(self.value if isinstance(self.value, str) else str(self.value).lower())


class OptionProbability(BaseModel):
    value: StrictStr | StrictBool
    probability: Probability


class OptionAnswer(BaseModel):
    type: Literal["choice"] = "choice"
    name: str | None
    choice: StrictStr | StrictBool
    probabilities: list[OptionProbability]
    confidence: Probability
    x_calibration: Fit


class OptionQuestion(Asked):
    """One of several options."""

    type: Literal["choice"]
    choices: list[Option] = Field(min_length=2, max_length=MAX_OPTIONS)

    @model_validator(mode="after")
    def check(self):
        different([option.text() for option in self.choices])
        return self

    def options(self) -> list[tuple[str, str]]:
        return [(option.text(), content_text(option.description)) for option in self.choices]

    def answer(self, probabilities: list[float], fit: str) -> OptionAnswer:
        listed = [
            OptionProbability(value=option.value, probability=p)
            for option, p in zip(self.choices, probabilities, strict=True)
        ]
        return OptionAnswer(
            name=self.name,
            choice=max(listed, key=lambda one: one.probability).value,
            probabilities=listed,
            confidence=confidence(probabilities),
            x_calibration=fit,
        )


class Level(BaseModel):
    label: Annotated[str, readable(content_text, filled=True)]
    description: Description = ""

    def text(self) -> str:
        label, description = content_text(self.label), content_text(self.description)
        return f"{label}: {description}" if description else label


class LevelProbability(BaseModel):
    value: int
    label: str
    probability: Probability


class LevelAnswer(BaseModel):
    type: Literal["score"] = "score"
    name: str | None
    score: float = Field(description="expected level, from 0")
    probabilities: list[LevelProbability]
    confidence: Probability
    x_calibration: Fit


class LevelQuestion(Asked):
    """A level of a scale, lowest first."""

    type: Literal["score"]
    levels: list[Level] = Field(min_length=2, max_length=MAX_LEVELS)

    @model_validator(mode="after")
    def check(self):
        different([level.label for level in self.levels])
        return self

    def options(self) -> list[tuple[str, str]]:
        return [(str(i), level.text()) for i, level in enumerate(self.levels)]

    def answer(self, probabilities: list[float], fit: str) -> LevelAnswer:
        return LevelAnswer(
            name=self.name,
            score=sum(i * p for i, p in enumerate(probabilities)),
            probabilities=[
                LevelProbability(value=i, label=level.label, probability=p)
                for i, (level, p) in enumerate(zip(self.levels, probabilities, strict=True))
            ],
            confidence=confidence(probabilities),
            x_calibration=fit,
        )


class DecisionsRequest(UnicodeBody):
    model: Literal[MODELS]
    input: Annotated[str | list[Message], readable(input_text, filled=True)] = Field(
        description="what the questions are about"
    )
    questions: list[Annotated[Predicate | OptionQuestion | LevelQuestion, Field(discriminator="type")]] = Field(
        min_length=1, max_length=MAX_QUESTIONS
    )


class DecisionsResponse(BaseModel):
    model: str
    answers: list[PredicateAnswer | OptionAnswer | LevelAnswer]
    usage: OpenAIUsage

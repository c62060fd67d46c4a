"""POST /v1/systemone: the fields of its requests and answers, as TypeSafe publishes them and vLLM serves them.

Fields that begin with x_ are ours. Unknown fields of a request are ignored, but media are refused.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from distill.serve.decision_prompt import content_text
from distill.serve.errors import UnicodeBody
from distill.serve.settings import MODELS

MAX_QUESTIONS = 128
MAX_OPTIONS = 255
MAX_LEVELS = 10
YES, NO = "Yes", "No"


def readable(text_of: Callable[[Any], str], filled: bool) -> AfterValidator:
    """A check of a field: ValueError where `text_of` reads no text, or an empty one although it must be filled."""

    def check(content):
        if not text_of(content) and filled:
            raise ValueError("expected text, not nothing")
        return content

    return AfterValidator(check)


def different(options: list[str]) -> None:
    """ValueError unless every option is a text of its own, white space around it aside."""
    names = [option.strip() for option in options]
    if not all(names):
        raise ValueError("expected options that are not empty")
    if len(set(names)) < len(names):
        raise ValueError("expected options that differ")


def confidence(probabilities: list[float]) -> float:
    """How far the best option is above chance: 1 when it has all, 0 when all are equal."""
    chance = 1 / len(probabilities)
    return max(0.0, (max(probabilities) - chance) / (1 - chance))


Content = str | dict[str, Any] | list[Any]
Readable = Annotated[Content, readable(content_text, filled=False)]
Filled = Annotated[Content, readable(content_text, filled=True)]
Probability = Annotated[float, Field(ge=0, le=1)]
Fit = Annotated[
    Literal["fitted", "null"],
    Field(description="fitted: calibrated on development rows. null: not fitted, less the model's prior only"),
]


class Usage(BaseModel):
    input_tokens: int
    output_tokens: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# Questions and answers. text: what is asked. options: (option, description) in the order of the request. answer: from
# their probabilities.


class Asked(BaseModel):
    instructions: Readable | None = None

    def text(self) -> str:
        return content_text(self.instructions)


class NoulAnswer(BaseModel):
    type: Literal["noul"] = "noul"
    noul: Probability = Field(description="probability of yes")
    x_calibration: Fit


class NoulCriteria(BaseModel):
    true: Readable | None = None
    false: Readable | None = None


class Noul(Asked):
    """A yes/no question."""

    type: Literal["noul"]
    criteria: NoulCriteria | None = None

    @model_validator(mode="after")
    def check(self):
        if not any(content_text(text) for text in (self.instructions, *dict(self.criteria or {}).values())):
            raise ValueError("expected instructions or criteria")
        return self

    def options(self) -> list[tuple[str, str]]:
        criteria = self.criteria or NoulCriteria()
        return [(YES, content_text(criteria.true)), (NO, content_text(criteria.false))]

    def answer(self, probabilities: list[float], fit: str) -> NoulAnswer:
        return NoulAnswer(noul=probabilities[0], x_calibration=fit)


class ChoiceAnswer(BaseModel):
    type: Literal["choice"] = "choice"
    choice: str
    probabilities: dict[str, Probability]
    confidence: Probability
    x_calibration: Fit


class Choice(Asked):
    """One of several options; criteria: option -> description or null."""

    type: Literal["choice"]
    criteria: dict[str, Readable | None] = Field(min_length=2, max_length=MAX_OPTIONS)

    @model_validator(mode="after")
    def check(self):
        different(list(self.criteria))
        return self

    def options(self) -> list[tuple[str, str]]:
        return [(name.strip(), content_text(description)) for name, description in self.criteria.items()]

    def answer(self, probabilities: list[float], fit: str) -> ChoiceAnswer:
        by_name = dict(zip(self.criteria, probabilities, strict=True))
        best = max(by_name, key=by_name.get)
        return ChoiceAnswer(choice=best, probabilities=by_name, confidence=confidence(probabilities), x_calibration=fit)


class ScoreAnswer(BaseModel):
    type: Literal["score"] = "score"
    score: float = Field(description="expected level, from 0")
    legend: dict[str, Content]
    probabilities: dict[str, Probability]
    confidence: Probability
    x_calibration: Fit


class Score(Asked):
    """A level of a scale; criteria: the levels, lowest first."""

    type: Literal["score"]
    criteria: list[Filled] = Field(min_length=2, max_length=MAX_LEVELS)

    @model_validator(mode="after")
    def check(self):
        different([content_text(level) for level in self.criteria])
        return self

    def options(self) -> list[tuple[str, str]]:
        return [(str(i), content_text(level)) for i, level in enumerate(self.criteria)]

    def answer(self, probabilities: list[float], fit: str) -> ScoreAnswer:
        numbers = [str(i) for i in range(len(self.criteria))]
        return ScoreAnswer(
            score=sum(i * p for i, p in enumerate(probabilities)),
            legend=dict(zip(numbers, self.criteria, strict=True)),
            probabilities=dict(zip(numbers, probabilities, strict=True)),
            confidence=confidence(probabilities),
            x_calibration=fit,
        )


Question = Annotated[Noul | Choice | Score, Field(discriminator="type")]


class SystemOneRequest(UnicodeBody):
    model: Literal[MODELS]
    state: Filled = Field(description="what the questions are about: text or JSON")
    questions: dict[Annotated[str, Field(min_length=1)], Question] = Field(min_length=1, max_length=MAX_QUESTIONS)
    assets: None = Field(None, description="not served: this model reads text")
    images: None = Field(None, description="not served: this model reads text")


class SystemOneResponse(BaseModel):
    model: str
    answers: dict[str, NoulAnswer | ChoiceAnswer | ScoreAnswer]
    usage: Usage

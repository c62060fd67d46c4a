"""What a server says of itself: its title, an example row and the OpenAPI schema, all made from its task and limits."""

import re

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from common import Task
from distill.serve.limits import BODY_SECONDS, MAX_BODY, MAX_FEATURES, MAX_LIST
from distill.serve.systemone import MAX_QUESTIONS

CREDITMIX_ROW = (
    "Age: 23.0, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98, "
    "Credit Utilization Ratio: 35.03, Payment Behaviour: Low_spent_Small_value_payments"
)


def title(task: Task) -> str:
    """The task's name for people: "my_task" -> "My task"."""
    words = task.name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def fields(task: Task) -> list[str]:
    """Names of a row's fields 'Key: value, Key: value', from the first content-free input; none for other texts."""
    return re.findall(r"(?:^|, )([^,:]+): N/A", task.null_inputs[0])


def example(task: Task) -> str:
    """A row that the server takes."""
    names = re.findall(r"(?:^|, )([^,:]+): ", CREDITMIX_ROW)
    return CREDITMIX_ROW if fields(task) == names else task.null_inputs[0].strip() or "N/A"


def limits(engine) -> str:
    """The limits of a server with their status codes; engine: its EngineClient."""
    settings = engine.settings
    return (
        f"Limits: {MAX_FEATURES} characters per row (422) and {engine.max_row_tokens or 'some'} tokens with the prompt "
        f"(413), {MAX_LIST} rows per list (422), {MAX_QUESTIONS} typed questions (422) about a text of at most "
        f"{engine.max_state_tokens or 'some'} tokens (413), {MAX_BODY} bytes per body (413) within {BODY_SECONDS} s "
        f"(408), "
        f"{settings.deadline:g} s per request (504), {settings.max_queue:g} rows in the queue (503 with Retry-After)."
    )


def openapi(app: FastAPI) -> dict:
    """The OpenAPI schema, with the task's labels as examples and the limits in its text."""
    engine = app.state.engine
    task = engine.settings.task
    text = f"{app.description}\n\nLabels: {', '.join(task.labels)}.\n\n{limits(engine)}"
    schema = get_openapi(title=title(task), version=app.version, description=text, routes=app.routes)
    kinds, row = schema["components"]["schemas"], example(task)
    kinds["Question"]["properties"]["features"]["examples"] = [row]
    kinds["Questions"]["properties"]["features"]["examples"] = [[row]]
    answer, n = kinds["Answer"]["properties"], len(task.labels)
    answer["prediction"]["examples"] = [task.labels[0]]
    for name in ("scores", "raw_scores", "prior"):
        answer[name]["examples"] = [{label: -0.25 - 1.25 * i for i, label in enumerate(task.labels)}]
    answer["probabilities"]["examples"] = [{label: round(1 / n, 3) for label in task.labels}]
    for kind, body in decision_examples(task, row).items():
        kinds[kind]["examples"] = [body]
    return schema


def decision_examples(task: Task, row: str) -> dict[str, dict]:
    """A request of each shape of the decision protocol about `row`: the task itself, and a question of another kind."""
    own, above = task.template.replace("{input}", "").strip(), "Does the text name a number above 30?"
    label = {"type": "choice", "instructions": own}
    named = {
        "label": label | {"criteria": dict.fromkeys(task.labels)},
        "above": {"type": "noul", "instructions": above},
    }
    listed = [
        label | {"name": "label", "choices": [{"value": name} for name in task.labels]},
        {"type": "predicate", "name": "above", "instructions": above},
    ]
    return {
        "SystemOneRequest": {"model": "sft", "state": row, "questions": named},
        "DecisionsRequest": {"model": "sft", "input": row, "questions": listed},
    }

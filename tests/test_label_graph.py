"""Label passes through recorded graphs: shapes, static inputs and fallbacks anywhere, the recording itself on a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import LabelScorer, add_adapter, load_base, load_model, prompt_ids
from distill.model.cuda_graph import Recordings
from distill.model.label_graph import MOST, TOKENS, LabelGraphs, stepped_shape, stepped_shapes, unrecordable
from distill.serve.models import LabelModels
from distill.serve.settings import MODELS, Settings

INPUTS = ["Age: 23.0", "Age: 41.0, Occupation: Writer, Annual Income: 30022.71", "x", "Age: 5.0 " * 20, "Age: 7.0"]
ADAPTERS = ["__base__", "sft", "kd", "sft", "kd"]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("rows", "width", "expected"),
    [
        (1, 1, (1, 128)),  # up to 128 tokens cost the same
        (1, 129, (1, 256)),
        (2, 65, (2, 128)),
        (3, 33, (4, 64)),
        (8, 80, (8, 80)),
        (9, 81, (16, 96)),
        (17, 96, (24, 96)),
        (33, 64, (48, 64)),
        (33, 65, None),  # 48 x 80 tokens
        (65, 16, None),
        (1, 3073, None),
    ],
)
def test_the_smallest_step_that_holds_a_pass(rows, width, expected):
    assert stepped_shape(rows, width) == expected


def test_the_steps_of_a_range_of_widths_cover_it_and_are_few():
    shapes = stepped_shapes(33, 100)
    passes = [(rows, width) for rows in range(1, 65) for width in range(33, 101)]
    assert {stepped_shape(*one) for one in passes} - {None} == set(shapes) and len(shapes) <= MOST
    sizes = [rows * width for rows, width in shapes]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= TOKENS


# Anywhere: a "recording" that computes the pass again, on its own inputs


@pytest.fixture
def rerun(monkeypatch):
    """Graphs that record at once, without a GPU; a list of how many times each recording was replayed."""
    replays = []

    def record(self, step):
        i = len(replays)
        replays.append(0)

        def replay():
            replays[i] += 1
            return step()

        return SimpleNamespace(replay=replay)

    init = LabelGraphs.__init__

    def ready(self, model):
        init(self, model)
        self.enabled, self.patience = True, 0

    monkeypatch.setattr(LabelGraphs, "__init__", ready)
    monkeypatch.setattr(LabelGraphs, "record", record)
    return replays


def with_adapters(tiny, tiny_adapter, precision="fp32"):
    model, tokenizer = load_base(tiny, precision)
    for name in ("sft", "kd"):
        model = add_adapter(model, tiny_adapter(name), name)
    return model, tokenizer


def scores(model, tokenizer, task, batches, prefix=True):
    """Scores of batches of (inputs, adapters), and the scorer."""
    scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts() if prefix else ())
    return [scorer.score([task.prompt(text) for text in texts], own) for texts, own in batches], scorer


BATCHES = [
    (INPUTS, ADAPTERS),
    (INPUTS[:3], ADAPTERS[:3]),
    (INPUTS[1:3], ["kd", "kd"]),  # rows of one adapter
    (INPUTS[:1], ["sft"]),
    (INPUTS[:3], ADAPTERS[2:]),  # the inputs of an earlier pass with other adapters
    (INPUTS[::-1], ADAPTERS),
    (INPUTS[:3], None),  # the active adapter
]


@pytest.mark.parametrize("prefix", [True, False])
def test_passes_through_static_inputs_equal_plain_ones(tiny, tiny_adapter, task, rerun, prefix, monkeypatch):
    model, tokenizer = with_adapters(tiny, tiny_adapter)
    found, scorer = scores(model, tokenizer, task, BATCHES, prefix)
    assert len(rerun) == len(scorer.forward.graphs) == 4  # of 8, 4, 2 and 1 rows
    assert sum(rerun) == len(rerun) + len(BATCHES)  # one replay each is its check
    monkeypatch.setattr(LabelGraphs, "key", lambda *args: None)
    expected, scorer = scores(model, tokenizer, task, BATCHES, prefix)
    assert not scorer.forward.graphs
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() < 3e-5
    assert np.abs(found[1] - found[4]).max() > 1e-3  # adapters tell


def test_a_recording_that_keeps_an_old_input_is_refused_and_said_once(
    tiny, tiny_adapter, task, monkeypatch, rerun, capsys
):
    model, tokenizer = with_adapters(tiny, tiny_adapter)
    expected, _ = scores(model, tokenizer, task, BATCHES[:1])

    def frozen(self, step):
        output = step()
        return SimpleNamespace(replay=lambda: output)

    monkeypatch.setattr(LabelGraphs, "record", frozen)
    capsys.readouterr()
    for _ in range(2):
        found, scorer = scores(model, tokenizer, task, BATCHES[:1] * 2)
        assert all(np.abs(one - expected[0]).max() < 3e-5 for one in found)
    said = "scoring labels without CUDA graphs: a recorded pass of 8 rows gives other scores than the pass itself"
    assert capsys.readouterr().err.splitlines() == [said] and not scorer.forward.graphs


def test_without_memory_for_another_recording_the_others_stay(tiny, task, monkeypatch, rerun, capsys):
    model, tokenizer = load_base(tiny, "fp32")
    record, left = LabelGraphs.record, [1]

    def full(self, step):
        if not left:
            raise torch.OutOfMemoryError("CUDA out of memory")
        left.pop()
        return record(self, step)

    monkeypatch.setattr(LabelGraphs, "record", full)
    batches = [(INPUTS[:1], None), (INPUTS, None), (INPUTS, None), (INPUTS[:1], None)]
    capsys.readouterr()
    found, _ = scores(model, tokenizer, task, batches)
    assert rerun == [3] and np.abs(found[0] - found[1][0]).max() < 3e-5
    assert capsys.readouterr().err == "scoring labels without more CUDA graphs: no memory is left for them\n"


def test_a_shape_is_recorded_when_it_comes_often(tiny, task, rerun):
    model, tokenizer = load_base(tiny, "fp32")
    scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
    scorer.forward.graphs.patience = 2
    for i in range(4):
        scorer.score([task.prompt("x")])
        assert len(scorer.forward.graphs) == (i >= 2)
    scorer.score([task.prompt("x")] * 65)  # of no step
    assert len(rerun) == 1


def test_expected_passes_are_recorded_before_they_come(tiny, tiny_adapter, task, rerun):
    model, tokenizer = with_adapters(tiny, tiny_adapter)
    scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
    forward, names, prefix = scorer.forward, ["__base__", "sft", "kd"], len(scorer.forward.prefix)
    forward.graphs.patience = 5
    assert forward.record(prefix + 60, prefix + 80, names, seconds=60) == len(forward.graphs) == len(rerun)
    assert {key[:2] for key in forward.graphs.kept} == set(stepped_shapes(60, 80)) and forward.graphs.patience == 5
    before = len(rerun)
    for rows in (1, 2, 3, 7, 20):
        scorer.score_ids([forward.prefix + [9] * 70] * rows, ["kd"] * rows)
    assert len(rerun) == before
    assert forward.record(prefix + 60, prefix + 80, names, seconds=60) == 0  # they are there
    assert forward.record(prefix + 200, prefix + 210, names, seconds=0) == 0


def test_a_server_records_the_passes_that_it_expects(tiny, tiny_adapter, task, rerun):
    folders = {name: tiny_adapter(name) for name in MODELS[1:]}
    settings, logged = Settings(str(tiny), folders, task, "", 30.0, 512.0, None, None, "fp32", None), {}
    models = LabelModels(settings, lambda event, **fields: logged.update({event: fields}))
    models.load_base()
    for name in folders:
        models.load_adapter(name)
    models.warm(record=False)
    assert "CUDA graphs recorded" not in logged
    models.warm()
    assert logged["CUDA graphs recorded"]["passes"] > 0
    forward = models.scorer.forward
    forward.graphs.patience, before = 5, len(rerun)
    ids = prompt_ids(models.tokenizer, [task.prompt(", ".join([text] * 2)) for text in task.null_inputs])
    row = max(ids, key=len)
    for n in (1, 2, 5, 30):
        models.answers([(MODELS[i % 4], row) for i in range(n)])
    assert len(rerun) == before and sum(rerun[-len(forward.graphs) :]) > len(forward.graphs)


def test_the_least_recently_used_recording_goes():
    made, graphs = [], Recordings(torch.device("cuda"), "passes", most=2)
    for key in ("a", "b", "a", "c", "a", "b"):
        graphs.get(key, lambda key=key: made.append(key) or key)
    assert made == ["a", "b", "c", "b"] and list(graphs.kept) == ["a", "b"]


def test_what_is_not_all_on_one_device_is_not_recorded(tiny):
    model, _ = load_base(tiny, "fp32")
    assert unrecordable(model) is None
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.empty(1, device="meta"))
    assert unrecordable(model) == "some of its layers are offloaded"


def test_on_a_cpu_nothing_is_recorded(tiny, task, capsys):
    model, tokenizer = load_model(tiny, "fp32")
    if model.device.type == "cpu":
        _, scorer = scores(model, tokenizer, task, [(INPUTS[:1], None)] * 6)
        assert not scorer.forward.graphs and "CUDA" not in capsys.readouterr().err


# On a GPU


@gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 3e-5), ("bf16", 0.1), ("nf4", 0.1)])
def test_recorded_passes_equal_plain_ones(tiny, tiny_adapter, task, precision, tolerance, monkeypatch, capsys):
    model, tokenizer = with_adapters(tiny, tiny_adapter, precision)
    monkeypatch.setattr("distill.model.label_graph.PATIENCE", 0)
    found, scorer = scores(model, tokenizer, task, BATCHES * 2)
    assert len(scorer.forward.graphs) == 4 and "without" not in capsys.readouterr().err
    monkeypatch.setattr(LabelGraphs, "key", lambda *args: None)
    expected, _ = scores(model, tokenizer, task, BATCHES * 2)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() < tolerance


@gpu
def test_recordings_share_their_memory(tiny, task, monkeypatch):
    model, tokenizer = load_model(tiny, "bf16")
    monkeypatch.setattr("distill.model.label_graph.PATIENCE", 0)
    scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
    scorer.score([task.prompt("x")] * 48)
    torch.cuda.empty_cache()
    one = torch.cuda.memory_reserved()
    for rows in (32, 24, 16, 8, 4, 2, 1):
        scorer.score([task.prompt("x")] * rows)
    torch.cuda.empty_cache()
    assert len(scorer.forward.graphs) == 8 and torch.cuda.memory_reserved() - one < 32 * 2**20
    del scorer
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < one


@gpu
def test_a_pass_that_cannot_be_recorded_runs_as_it_is(tiny, task, monkeypatch, capsys):
    model, tokenizer = load_model(tiny, "fp32")
    plain, _ = scores(model, tokenizer, task, BATCHES[-1:])
    monkeypatch.setattr("distill.model.label_graph.PATIENCE", 0)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: out * float(out.sum().item() != 0.5))  # waits for the GPU
    found, scorer = scores(model, tokenizer, task, BATCHES[-1:] * 2)
    assert not scorer.forward.graphs and capsys.readouterr().err.count("scoring labels without CUDA graphs") == 1
    assert all(np.abs(one - plain[0]).max() < 3e-5 for one in found)

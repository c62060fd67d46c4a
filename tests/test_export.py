"""Export: the merged folder, GGUF files read back, what is refused, and the proof in a real llama.cpp."""

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import export_model
from common import Calibration, LabelScorer, Task, load_model, prompt_ids
from distill.export import llama_cpp, pages, parity
from distill.export.gguf_file import BITS, check_model, check_types, write_gguf
from distill.export.source import Source
from distill.files import UserError, read_json

needs_llama_cpp = pytest.mark.extra("xllamacpp")
SHAPE = {
    "vocab_size": 49152 + 64,  # more rows than tokens, as Qwen's
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def random_model(tiny, tmp_path_factory):
    """random_model("qwen2") -> (folder, model) of a random model of two layers, large enough weights to tell apart."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    configs = {
        "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
        "llama-biased": LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True),
        "llama3-rope": LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3),
        "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**SHAPE, head_dim=128, tie_word_embeddings=False),
    }
    made = {}

    def make(name):
        if name not in made:
            from transformers import AutoModelForCausalLM

            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(configs[name]).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(1 if parameter.dim() == 1 else 0, 0.2)
            folder = tmp_path_factory.mktemp("models") / name
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return make


@pytest.fixture
def rows(jsonl):
    texts = [f"Age: {20 + i}.0, Occupation: Lawyer, Annual Income: {1000 * i + 7}.50" for i in range(12)]
    return jsonl("rows.jsonl", [{"question": text} for text in texts])


@pytest.fixture
def options(tmp_path, rows):
    """options(model_dir=...) -> the arguments of export_model.main."""

    def make(**given):
        defaults = {"out": tmp_path / "out" / "x", "gguf": [], "data": rows, "rows": 12, "schema": None}
        return argparse.Namespace(**{**defaults, "overwrite": False, **given})

    return make


# ---------------------------------------------------------------------------------------------------------------------
# GGUF files


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_gguf_read_back_by_transformers_gives_the_same_logits(random_model, tmp_path, name):
    from transformers import AutoModelForCausalLM

    folder, model = random_model(name)
    write_gguf(folder, AutoTokenizer.from_pretrained(folder), tmp_path / "m.gguf", "f16", "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    ids = torch.tensor([[1, 520, 9531, 198, 14229, 30, 2]])
    with torch.inference_mode():
        ours, theirs = model(ids).logits, again(ids).logits
    assert ours.std() > 0.5
    assert (ours - theirs).abs().max() < 0.05


def test_a_tokenizer_read_back_from_a_gguf_is_the_same(random_model, tmp_path):
    folder, _ = random_model("llama")
    ours = AutoTokenizer.from_pretrained(folder)
    write_gguf(folder, ours, tmp_path / "m.gguf", "q4_0", "m")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert theirs.chat_template == ours.chat_template
    for text in parity.PROBES:
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]


@pytest.mark.parametrize("kind", BITS)
def test_quantised_tensors_are_near_the_weights_and_embeddings_keep_8_bits(random_model, tmp_path, kind):
    import gguf

    folder, model = random_model("llama")
    write_gguf(folder, AutoTokenizer.from_pretrained(folder), tmp_path / "m.gguf", kind, "m")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    down, norm = tensors["blk.1.ffn_down.weight"], tensors["blk.1.ffn_norm.weight"]
    assert down.tensor_type.name == kind.upper() and norm.tensor_type.name == "F32"
    weights = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    values = gguf.quants.dequantize(down.data, down.tensor_type).reshape(weights.shape)
    most = {"f16": 1e-4, "bf16": 3e-4, "q8_0": 2e-3, "q5_1": 8e-3, "q5_0": 1.2e-2, "q4_1": 1.6e-2, "q4_0": 2.5e-2}
    assert abs(values - weights).mean() < most[kind]
    least = "Q8_0" if BITS[kind] < 8 else kind.upper()
    assert tensors["token_embd.weight"].tensor_type.name == tensors["output.weight"].tensor_type.name == least


def test_metadata_is_the_models(random_model, tmp_path):
    import gguf

    folder, model = random_model("qwen3")
    write_gguf(folder, AutoTokenizer.from_pretrained(folder), tmp_path / "m.gguf", "q8_0", "a name")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    expected = {
        "general.architecture": "qwen3",
        "general.name": "a name",
        "qwen3.block_count": 2,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 128,
        "qwen3.context_length": 1024,
        "tokenizer.ggml.pre": "gpt-2",  # the embedded student's tokenizer does not split digits
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {k: fields[k] for k in expected} == expected
    assert fields["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(model.config.rms_norm_eps)
    assert len(fields["tokenizer.ggml.tokens"]) == SHAPE["vocab_size"]
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD49215]"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("q4_K_M", "llama-quantize MODEL-f16.gguf MODEL-q4_k_m.gguf Q4_K_M"),
        ("iq3_xs", "IQ3_XS"),
        ("q3", "expected some of f16"),
    ],
)
def test_other_quantisations_are_refused_by_name(name, says):
    with pytest.raises(UserError, match=name) as error:
        check_types(["f16", name])
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gemma3_text"}, "'gemma3_text'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope scaling 'yarn'"),
        ({"use_sliding_window": True}, "a sliding window"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
    ],
)
def test_models_that_a_gguf_would_compute_otherwise_are_refused_by_name(tiny, change, says):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny)
    for key, value in change.items():
        object.__setattr__(config, key, value)
    with pytest.raises(UserError, match=says):
        check_model(config, AutoTokenizer.from_pretrained(tiny), "somebody/model")


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(tiny):
    from transformers import AutoConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(UserError, match="cuts texts by"):
        check_model(AutoConfig.from_pretrained(tiny), tokenizer, "m")


def test_weights_that_are_no_numbers_are_refused(random_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(random_model("qwen2")[0], tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj"):
        write_gguf(folder, AutoTokenizer.from_pretrained(folder), tmp_path / "m.gguf", "q8_0", "m")


# ---------------------------------------------------------------------------------------------------------------------
# The rows of the proof


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", 'id,review,stars\n1,"good, really",5\n2,bad,\n'),
        ("rows.json", '[{"review": "good, really", "stars": "yes"}, {"review": "bad"}]'),
        ("rows.jsonl", '{"review": "good, really"}\n{"review": "bad"}\n'),
    ],
)
def test_rows_are_read_by_the_tasks_own_columns(tiny_adapter, tmp_path, name, content):
    adapter = shutil.copytree(tiny_adapter("export"), tmp_path / "own")
    fields = read_json(adapter / "task.json")
    fields |= {"name": "reviews", "columns": {"text": "review", "label": "stars"}}
    (adapter / "task.json").write_text(json.dumps(fields))
    (tmp_path / name).write_text(content)
    source = Source.of(str(adapter), None)
    texts, where = source.prompts(tmp_path / name, 5)
    assert sorted(texts) == sorted(source.task.prompt(text) for text in ("good, really", "bad"))
    assert where == str(tmp_path / name)
    (tmp_path / "other.csv").write_text("text\ngood\n")
    with pytest.raises(UserError, match=r"other\.csv:1: no column 'review'"):
        source.prompts(tmp_path / "other.csv", 5)


def test_whole_prompts_are_taken_as_they_are(tiny_adapter, jsonl):
    source = Source.of(str(tiny_adapter("export")), None)
    assert source.prompts(jsonl("sft.jsonl", [{"input": "whole prompt", "output": "Good"}]), 5)[0] == ["whole prompt"]


# ---------------------------------------------------------------------------------------------------------------------
# The comparison, on numbers by hand


def test_texts_part_at_a_tie_or_for_a_reason():
    gaps = [[{5: 0.0, 6: 0.01}, {7: 0.0, 8: 3.0}]]
    assert parity.compare_texts([[5, 7]], [[5, 7]], gaps, 0.05) == (1, 0, None)
    assert parity.compare_texts([[5, 7]], [[6, 1]], gaps, 0.05) == (0, 1, None)
    assert parity.compare_texts([[5, 7]], [[5, 8]], gaps, 0.05) == (0, 0, "prompt 1 parts at token 2")
    assert parity.compare_texts([[5, 7]], [[5]], gaps, 0.05) == (0, 0, "prompt 1 parts at token 2")


def test_label_differences_by_hand():
    ours = np.log([[0.8, 0.2], [0.4, 0.6]])
    theirs = np.log([[0.7, 0.3], [0.6, 0.4]])
    found = parity.compare_labels(ours, theirs, Calibration(w=0.0), np.zeros(2))
    assert found["same_label"] == found["same_but_ties"] == 0.5 and found["rows"] == 2
    assert found["probability_mean"] == pytest.approx(0.15)
    assert found["score_max"] == pytest.approx(np.log(0.3 / 0.2))


def test_a_swap_of_two_labels_that_lie_together_is_a_tie():
    ours, theirs = np.log([[0.51, 0.49, 1e-9]]), np.log([[0.49, 0.51, 1e-9]])
    found = parity.compare_labels(ours, theirs, Calibration(w=0.0), np.zeros(3))
    assert (found["same_label"], found["same_but_ties"]) == (0.0, 1.0)
    far = np.log([[0.2, 0.2, 0.6]])
    assert parity.compare_labels(ours, far, Calibration(w=0.0), np.zeros(3))["same_but_ties"] == 0.0


class FakeEngine:
    """Label scores by row, as a GGUF file would give them, and how many rows were asked for."""

    def __init__(self, scores):
        self.scores, self.asked = scores, 0

    def label_scores(self, ids, trie):
        self.asked += 1
        return self.scores[ids[0]]


@pytest.fixture
def parity_of(task, monkeypatch):
    """parity_of(ours, theirs, kind) -> (whether the bars are reached, figures, rows asked for)."""
    monkeypatch.setattr(parity, "prompt_ids", lambda tokenizer, prompts: [[i] for i in range(len(prompts))])
    monkeypatch.setattr(parity, "label_trie", lambda tokenizer, labels: None)

    def compare(ours, theirs, kind):
        engine, answers = FakeEngine(theirs), parity.Answers([], [], ours, np.zeros(ours.shape[1]))
        passed, figures = parity.label_parity(engine, None, [""] * len(ours), answers, task, Calibration(w=0.0), kind)
        return passed, figures, engine.asked

    return compare


def test_a_file_that_loses_too_many_labels_is_done_with_at_its_nearest_rows(parity_of):
    margins = np.linspace(4, 0.1, 200)  # the last rows have the nearest labels
    ours = np.stack([margins, np.zeros(200), np.full(200, -9.0)], 1)
    assert parity_of(ours, ours, "q8_0")[::2] == (True, 200)
    swapped = np.where(np.arange(200)[:, None] >= 197, ours[:, [1, 0, 2]], ours)  # three of 200; q8_0 may lose two
    passed, figures, asked = parity_of(ours, swapped, "q8_0")
    assert (passed, asked) == (False, 3) and figures["same_label"] == 0.0
    assert parity_of(ours, swapped, "q4_1")[::2] == (True, 200)


def test_a_file_of_16_bits_is_scored_on_the_nearest_rows_and_loses_none(parity_of):
    ours = np.stack([np.linspace(4, 0.1, 200), np.zeros(200), np.full(200, -9.0)], 1)
    assert parity_of(ours, ours, "f16")[::2] == (True, parity.NEAREST)
    swapped = np.where(np.arange(200)[:, None] == 180, ours[:, [1, 0, 2]], ours)
    assert parity_of(ours, swapped, "f16")[0] is False


def test_log_probs_of_rare_tokens_are_asked_for_in_longer_lists_and_the_length_is_kept(monkeypatch):
    engine, lengths = llama_cpp.LlamaCpp("m.gguf"), []
    engine.letter = 7

    def post(path, body):
        lengths.append(body["n_probs"])
        listed = [{"id": i, "logprob": -i / 10} for i in range(min(body["n_probs"], 300))]
        return {"completion_probabilities": [{"top_logprobs": listed}]}

    monkeypatch.setattr(engine, "post", post)
    assert engine.log_probs([1], {0, 200}) == {0: 0.0, 200: -20.0}
    engine.log_probs([1], {3})
    assert lengths == [64, 128, 256, 256]
    with pytest.raises(llama_cpp.EngineError, match="no log-probability of token 300"):
        engine.log_probs([1], {1, 300})


def test_a_failed_check_is_printed_and_ends_the_proof(capsys):
    proof = parity.Proof()
    proof.record("one", None, "no engine")
    with pytest.raises(parity.ProofFailed, match="two: wrong"):
        proof.record("two", False, "wrong")
    assert capsys.readouterr().out == "not checked: one: no engine\nFAILED: two: wrong\n"


# ---------------------------------------------------------------------------------------------------------------------
# Ollama's template


def test_go_template_of_chatml(tiny):
    template = pages.go_template(AutoTokenizer.from_pretrained(tiny))
    assert template.endswith("{{ end }}{{ end }}<|im_start|>assistant\n")
    assert '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n' in template


def test_a_template_that_is_not_built_turn_by_turn_is_left_to_ollama(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert pages.go_template(tokenizer) is None
    assert "TEMPLATE" not in pages.modelfile(tokenizer, "m.gguf", ["<e>"], True, [])


# ---------------------------------------------------------------------------------------------------------------------
# The script


def test_export_merges_and_takes_task_and_calibration_along(run, tiny_adapter, rows, tmp_path):
    adapter, out = tiny_adapter("export"), tmp_path / "exports" / "mine"
    result = run("export_model.py", "--model_dir", adapter, "--out", out, "--data", rows, "--gguf", "f16")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "ok: merged against adapter, fp32" in result.stdout
    names = {p.name for p in out.iterdir()}
    assert {"model.safetensors", "mine-f16.gguf", "Modelfile", "README.md", "export.json", "task.json"} <= names
    assert [p.name for p in out.parent.iterdir()] == ["mine"]
    task = Task.load(out / "task.json")
    assert Calibration.load(out, task) == Calibration.load(adapter, task)
    scores = [
        LabelScorer(*load_model(folder, "fp32"), task.labels).score([task.prompt("Age: 3.0"), task.prompt("x")])
        for folder in (str(adapter), str(out))
    ]
    assert abs(scores[0] - scores[1]).max() < 1e-3
    record = read_json(out / "export.json")
    assert record["sizes"]["mine-f16.gguf"] == (out / "mine-f16.gguf").stat().st_size
    assert record["base"]["sha256"]["model.safetensors"] and record["rows"]["count"] == 12
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./mine-f16.gguf\nTEMPLATE ") and 'PARAMETER stop "<|im_end|>"' in modelfile
    assert "PARAMETER temperature 0" in modelfile and "# Classify the customer's credit mix" in modelfile
    again = run("export_model.py", "--model_dir", adapter, "--out", out, "--data", rows)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "--overwrite" in again.stderr


def test_dora_and_biases_are_merged(tiny, task, options, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    model.peft_config["default"].base_model_name_or_path = str(tiny)
    model.save_pretrained(tmp_path / "dora")
    task.save(tmp_path / "dora" / "task.json")
    arguments = options(model_dir=str(tmp_path / "dora"))
    export_model.main(arguments)
    check = read_json(arguments.out / "export.json")["checks"]["merged against adapter, fp32"]
    assert check["passed"] and check["score_max"] < 1e-3


def test_a_failed_proof_leaves_no_export(tiny_adapter, options, monkeypatch, capsys):
    merged = export_model.answers_of

    def worse(model, tokenizer, prompts, task, new_tokens, rows=None):
        answers = merged(model, tokenizer, prompts, task, new_tokens, rows)
        if rows:
            answers.scores += np.linspace(0, 0.1, answers.scores.size).reshape(answers.scores.shape)
        return answers

    monkeypatch.setattr(export_model, "answers_of", worse)
    arguments = options(model_dir=str(tiny_adapter("export")))
    with pytest.raises(SystemExit) as stop:
        export_model.main(arguments)
    assert stop.value.code == 1 and "nothing was exported" in capsys.readouterr().err
    assert list(arguments.out.parent.iterdir()) == []


def changed_adapter(source, folder, **fields):
    shutil.copytree(source, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**read_json(path), **fields}))
    return str(folder)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"base_model_name_or_path": "nobody/nothing"}, "nobody/nothing: neither"),
        ({"modules_to_save": ["lm_head"]}, "field 'modules_to_save': cannot be merged"),
        ({"peft_type": "IA3"}, "field 'peft_type': cannot be merged"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(tiny_adapter, options, tmp_path, fields, says):
    adapter = changed_adapter(tiny_adapter("export"), tmp_path / "changed", **fields)
    arguments = options(model_dir=adapter)
    with pytest.raises(UserError, match=says):
        export_model.main(arguments)
    assert not arguments.out.exists()


def test_a_base_of_4_bits_is_refused(tiny, options, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "packed")
    config = read_json(folder / "config.json")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="expected the 16-bit model"):
        export_model.main(options(model_dir=str(folder)))


def test_what_lies_in_the_way_is_not_lost(tmp_path, monkeypatch):
    out = tmp_path / "x"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="--out"), export_model.building(out, overwrite, 1, []):
            pass
    assert (out / "thesis.txt").read_text() == "mine"
    (out / "export.json").write_text("{}")
    with export_model.building(out, True, 1, []) as part:
        (part / "new").write_text("new")
    assert [p.name for p in out.iterdir()] == ["new"] and [p.name for p in tmp_path.iterdir()] == ["x"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=1.9e9))
    full = pytest.raises(UserError, match=r"2\.0 GB are needed, 1\.9 GB are free")
    with full, export_model.building(tmp_path / "y", False, 1e9, ["f16"]):
        pass
    assert not (tmp_path / "y").exists()


def test_a_full_disk_leaves_nothing(tmp_path):
    with pytest.raises(OSError), export_model.building(tmp_path / "x", False, 1, []) as part:
        (part / "half").write_text("half")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# In a real llama.cpp


@needs_llama_cpp
@pytest.mark.parametrize("name", ["llama", "llama-biased", "llama3-rope", "qwen2", "qwen3"])
def test_llama_cpp_scores_labels_as_we_do(random_model, task, tmp_path, name):
    folder, _ = random_model(name)
    model, tokenizer = load_model(str(folder), "fp32")
    write_gguf(folder, tokenizer, tmp_path / "m.gguf", "f16", "m")
    prompts = [task.prompt(f"Age: {20 + i}.0,  Occupation: N/A" * 5) for i in range(3)]
    labels = ("Good", "Good enough", "not at all bad")  # one is the beginning of another
    scorer = LabelScorer(model, tokenizer, labels)
    with llama_cpp.LlamaCpp(tmp_path / "m.gguf", 1024) as engine:
        parity.check_prompts(parity.Proof(), engine, tokenizer, prompts, "m")
        theirs = [engine.label_scores(ids, scorer.trie) for ids in prompt_ids(tokenizer, prompts)]
    ours = scorer.score(prompts)
    assert ours.std() > 0.1
    assert abs(ours - np.array(theirs)).max() < 0.05


@needs_llama_cpp
def test_the_whole_proof_runs(run, tiny_adapter, rows, tmp_path):
    out = tmp_path / "mine"
    result = run(
        "export_model.py", "--model_dir", tiny_adapter("export"), "--out", out, "--data", rows, "--gguf", "f16"
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    checks = read_json(out / "export.json")["checks"]
    parts = ("prompt bytes", "greedy text", "labels", "JSON under the schema")
    assert all(checks[f"mine-f16.gguf: {part}"]["passed"] for part in parts)


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["json", "text"])
def test_the_proof_of_models_without_labels(tiny, tmp_path, options, jsonl, kind):
    schema = {"type": "object", "properties": {"paid": {"type": "boolean"}}, "required": ["paid"]}
    (tmp_path / "schema.json").write_text(json.dumps({**schema, "additionalProperties": False}))
    given = {
        "schema": tmp_path / "schema.json",
        "data": jsonl("d.jsonl", [{"document": f"BILL {i}"} for i in range(3)]),
    }
    if kind == "text":
        given = {"data": None, "rows": 3}
    arguments = options(model_dir=str(tiny), gguf=["f16", "q8_0"], **given)
    export_model.main(arguments)
    record = read_json(arguments.out / "export.json")
    assert record["checks"]["x-f16.gguf: greedy text"]["passed"]
    if kind == "json":
        assert record["checks"]["x-q8_0.gguf: JSON under the schema"]["found"] == "3 of 3 answers valid"
        assert read_json(arguments.out / "format.json")["properties"] == schema["properties"]
        body = record["commands"]["Ollama, JSON"].partition(" -d ")[2]
        sent = subprocess.run(["bash", "-c", f"printf %s {body}"], capture_output=True, text=True, cwd=tmp_path).stdout
        assert json.loads(sent)["format"]["required"] == ["paid"]
    else:
        assert record["rows"] == {"count": 3, "source": "requests of data/codegen_tasks.jsonl"}


@needs_llama_cpp
def test_query_rows_in_the_wrong_order_fail_the_proof(tiny_adapter, options, monkeypatch, capsys):
    monkeypatch.setattr("distill.export.gguf_file.interleaved", lambda values, heads: values)
    arguments = options(model_dir=str(tiny_adapter("export")), gguf=["f16"])
    with pytest.raises(SystemExit) as stop:
        export_model.main(arguments)
    assert stop.value.code == 1 and "FAILED: x-f16.gguf" in capsys.readouterr().out
    assert not arguments.out.exists()


@needs_llama_cpp
def test_another_chat_template_fails_the_proof(tiny_adapter, options, monkeypatch, capsys):
    import gguf

    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_chat_template",
        lambda self, value: self.add_string("tokenizer.chat_template", value.replace("assistant", "bot")),
    )
    arguments = options(model_dir=str(tiny_adapter("export")), gguf=["f16"])
    with pytest.raises(SystemExit):
        export_model.main(arguments)
    assert "FAILED: x-f16.gguf: prompt bytes" in capsys.readouterr().out


@needs_llama_cpp
def test_a_file_that_llama_cpp_does_not_load_is_one_line(tmp_path):
    path = Path(tmp_path / "m.gguf")
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(llama_cpp.EngineError, match=r"m\.gguf: llama\.cpp does not load it"), llama_cpp.LlamaCpp(path):
        pass

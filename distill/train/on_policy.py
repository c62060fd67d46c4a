"""On-policy KD in rounds, so that teacher and student never share the memory: what a round reads and leaves on disk.

A round has three passes. The student answers prompts, sampled at temperature 1. The teacher's top-k log-probs of these
answers go to disk (teacher_topk.py). The student trains on them for its share of the steps. Learning rate, optimizer
and EMA go on from one round to the next through the checkpoint at its end, whose EMA answers next.

The loss is KL(teacher || student) over the teacher's k most likely tokens and one class for all others, at the tokens
that the student wrote. That is GKD (Agarwal et al. 2024, arXiv 2306.13649) with student data only (lambda 1) and the
forward KL, an imitation of the teacher in the states that the student gets into (DAgger; arXiv 2605.16826). The reverse
KL of MiniLLM (arXiv 2306.08543), of on-policy distillation at Thinking Machines (2025) and of TRL's DistillationTrainer
(beta 1) is mode-seeking, and its terms are weighted by the student: in early rounds much of its mass is on tokens
outside the teacher's top k, of which the disk has only the sum. In GKD the better of the two depends on the task, and
the direction trades accuracy against diversity of the samples.

TRL's GKDTrainer and DistillationTrainer hold both models, sample anew in each step and compare all logits. Here samples
are up to a round old, and memory is that of one model.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from accelerate.utils.memory import clear_device_cache
from transformers.trainer_callback import TrainerCallback
from trl import SFTConfig

from common import load_model
from distill.files import UserError, read_json, write_json
from distill.train.data import dataset, describe, split_rows
from distill.train.run import adapter_weights, student_record, train
from distill.train.run_folder import Run, finish_run, start_run
from distill.train.student import load_student, with_lora
from distill.train.student_samples import prompts_under, repeated, sample_student
from distill.train.teacher_topk import TopK
from distill.train.teachers import Teacher
from distill.train.token_distribution import TokenTrainer, mean_loss

PROBES = 100  # development prompts, unless --dev_rows says otherwise


def train_on_policy(
    run: Run,
    teacher: Teacher,
    rows: list[dict],
    base: tuple,
    *,
    rounds: int,
    epochs: float,
    max_steps: int | None,
    batch_size: int,
    dev_rows: int | None,
    max_len: int,
    precision: str,
    lora_r: int,
    top_k: int,
    seed: int,
    loss: Callable,
    plan: Callable[[list[dict]], int],
    arguments: Callable[..., dict],
    earlier_hashes: Iterable[str] = (),
) -> None:
    """Train on the student's own answers to the rows' prompts, and write the adapter folder.

    base: base_config(run.student). epochs, max_steps: of all rounds together, one answer to a prompt being a row.
    dev_rows: most development prompts, whose answers measure the student before each round and after the last one.
    max_len: tokens of prompt and answer together. top_k: tokens of the teacher that are kept. loss: see TokenTrainer.
    plan(rows): how many rows to compute at once. arguments: training_arguments, but for what a round decides.
    earlier_hashes: hashes of the teacher's training rows.
    Errors: UserError for fewer than two steps a round.
    """
    tokenizer = base[2]
    rows, dropped = prompts_under(tokenizer, list({r["input"]: r for r in rows}.values()), max_len)
    rows, probes = split_rows(run.data, rows, seed, max_dev=dev_rows or PROBES)
    probes = probes or rows[:PROBES]
    steps = (max_steps or int(epochs * len(rows) / batch_size)) // rounds
    if steps < 2:  # the first one has learning rate 0
        raise UserError(f"--on_policy {rounds}: {steps} steps a round; expected at least 2 (--max_steps, fewer rounds)")
    asked = repeated(rows, rounds * steps * batch_size, seed)
    print(f"{rounds} rounds of {steps} steps on {len(asked)} answers of the student, measured on {len(probes)} prompts")
    start_run(run)
    folder, checkpoint = open_rounds(run), run.checkpoint
    done = read_json(checkpoint / "trainer_state.json")["global_step"] if checkpoint else 0
    for number in range(done // steps, rounds + 1):
        # The student answers; the teacher's log-probs of the answers go to disk. Each of them leaves the memory.
        own = folder / str(number + 1)
        policy = run.folder / f"checkpoint-{number * steps}" if number else run.student
        prompts = probes + asked[number * steps * batch_size : (number + 1) * steps * batch_size]
        samples = sample_student(policy, precision, prompts, max_len, f"{seed}:{number}", own / "samples.jsonl")
        targets = TopK(teacher, run.student, samples, top_k, own)

        # How far the student, as it answered, is from the teacher on its own answers to the development prompts.
        measured, answers = samples[: len(probes)], samples[len(probes) :]
        result = measure(own / "round.json", policy, precision, measured, targets, loss)
        when = f"round {number + 1} of {rounds}" if number < rounds else "after the last round"
        print(f"{when}: loss {result['loss']:.4f} on {len(measured)} answers of its own, {result['ended']:.0%} whole")
        if number == rounds:
            break

        # It trains on its answers to the other prompts, from where the round before ended.
        example = describe(tokenizer, answers, dropped, {})["trained"]
        rows_at_once = plan(answers)
        model, tokenizer = load_student(run.student, precision, base)
        options = arguments(
            rows=len(answers),
            epochs=epochs,
            max_steps=rounds * steps,
            micro_batch=rows_at_once,
            eval_steps=steps,  # a checkpoint at the end of a round
            evaluate=False,
            best_metric="eval_loss",
            precision=model.precision,
        )
        trainer = TokenTrainer(
            model=with_lora(model, run.student, lora_r, seed),
            args=SFTConfig(
                **options,
                remove_unused_columns=False,
                dataset_kwargs={"skip_prepare_dataset": True},
                max_length=None,
                shuffle_dataset=False,  # the sampler shuffles
            ),
            train_dataset=dataset(answers, "input_ids", "labels", "row"),
            processing_class=tokenizer,
            train_rows=answers,
            top_k=targets,
            loss=loss,
        )
        trainer.add_callback(StopAtStep((number + 1) * steps))
        trained, _ = train(trainer, run, checkpoint)
        write_json(own / "round.json", {**result, "answers": len(answers), "example": example, **trained})
        checkpoint = run.folder / f"checkpoint-{(number + 1) * steps}"
        trainer.accelerator.free_memory()
        del model, trainer
        clear_device_cache(garbage_collection=True)
    results = [read_json(folder / str(number + 1) / "round.json") for number in range(rounds + 1)]
    record = {"loss": "token distribution, on-policy", "rows_dropped": dropped, "teacher": teacher.name}
    finish_rounds(run, checkpoint, precision, record, asked, results, earlier_hashes)


def open_rounds(run: Run) -> Path:
    """The folder of the run's rounds; what another run left there is removed."""
    folder = run.folder / "rounds"
    same = folder / "same.json"
    known = same.is_file() and read_json(same) == run.identity and not (run.overwrite and not run.checkpoint)
    if folder.is_dir() and not known:
        shutil.rmtree(folder)
    write_json(same, run.identity)
    return folder


def measure(path: Path, policy: str | Path, precision: str, samples: list[dict], top_k: TopK, loss: Callable) -> dict:
    """The record of a round at `path`: mean loss of the student on its own `samples`, computed once."""
    if not path.is_file():
        tokens = sum(len(r["labels"]) - r["labels"].count(-100) for r in samples)
        ended = sum(r["ended"] for r in samples) / len(samples)
        value = policy_loss(policy, precision, samples, top_k, loss)
        write_json(path, {"loss": value, "own_tokens": tokens, "ended": ended})
    return read_json(path)


def policy_loss(policy: str | Path, precision: str, rows: list[dict], top_k: TopK, loss: Callable) -> float:
    """Mean loss per token of a model or adapter folder on encoded rows; its memory is freed."""
    model, _ = load_model(policy, precision)
    value = mean_loss(model, rows, top_k, loss)
    del model
    clear_device_cache(garbage_collection=True)
    return value


class StopAtStep(TrainerCallback):
    """End a round within a run of more steps; the checkpoint at its last step is where the next one goes on."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


def finish_rounds(
    run: Run,
    policy: Path,
    precision: str,
    record: dict,
    rows: list[dict],
    results: list[dict],
    earlier_hashes: Iterable[str],
) -> None:
    """Write the adapter folder from the last checkpoint, and remove what the rounds left.

    rows: the prompts that were trained on. results: the record of each round, and last the measurement after them.
    """
    model, _ = load_model(policy, precision)
    trained = results[:-1]
    seconds = sum(r["seconds"] for r in trained)  # of the steps alone
    measured = {
        **{k: trained[-1][k] for k in ("steps", "train_loss", "best", "rows_at_once")},
        "seconds": round(seconds, 1),
        "samples_per_s": round(sum(r["answers"] for r in trained) / seconds, 2),
        **{k: max((r[k] for r in trained if r[k]), default=None) for k in ("peak_gib", "peak_tensors_gib")},
    }
    history, steps = read_json(policy / "trainer_state.json")["log_history"], [0] + [r["steps"] for r in trained]
    history += [{"step": step, "eval_loss": r["loss"]} for step, r in zip(steps, results, strict=True)]
    finish_run(
        run,
        model,
        adapter_weights(model.state_dict()),
        {**run.record(), **record, **student_record(run, model, rows), **measured, "rounds": results},
        hashes={h for row in rows for h in row["hashes"]} | set(earlier_hashes),
        history=history,
        train_rows=rows,
    )
    shutil.rmtree(run.folder / "rounds")

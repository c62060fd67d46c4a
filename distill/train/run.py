"""One training run: train or resume, stop on signals, write the adapter folder."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path

from common import Task
from distill.train.run_folder import Run, checkpoints_in, finish_run


def run_training(trainer, run: Run, record: dict, earlier_hashes: Iterable[str] = ()) -> dict:
    """Train from the start or from run.checkpoint, keep the best checkpoint and write the adapter folder.

    trainer: a StudentTrainer. record: fields of run.json. earlier_hashes: hashes of rows that the weights or
    the teacher's were already trained on. Returns the record with what was measured. Ctrl-C and SIGTERM save a
    checkpoint and exit.
    """
    measured, scores = train(trainer, run, run.checkpoint)
    student = student_record(run, trainer.model, trainer.train_rows, trainer.task)
    record = {**run.record(), **record, **student, **measured}
    # by every process, since under FSDP each holds a part of the weights
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else trainer.model.state_dict()
    weights = adapter_weights(state)
    if trainer.is_world_process_zero():
        hashes = {h for row in trainer.train_rows for h in row["hashes"]} | set(earlier_hashes)
        finish_run(
            run,
            trainer.model,
            weights,
            record,
            hashes=hashes,
            history=trainer.state.log_history,
            task=trainer.task,
            scores=scores,
            train_rows=trainer.train_rows,
            dev_rows=trainer.dev_rows,
        )
    return record


def train(trainer, run: Run, checkpoint: Path | None) -> tuple[dict, tuple | None]:
    """Train from the start or from a checkpoint: (fields of run.json, scores of the development rows, if any).

    In the end the model has its best weights. Ctrl-C and SIGTERM save a checkpoint and exit.
    """
    import torch
    from peft.helpers import disable_input_dtype_casting
    from transformers.trainer_callback import ProgressCallback

    from distill.train.callbacks import EvaluateFirst, ProgressLines, StopOnSignal, Stopped
    from distill.train.duration import SayDuration
    from distill.train.out_of_memory import fit_micro_batch

    cuda = torch.cuda.is_available()
    if cuda and trainer.args.world_size == 1:  # processes that try by themselves would wait for each other
        fit_micro_batch(trainer)
    stop = StopOnSignal(trainer)
    trainer.remove_callback(ProgressCallback)
    for callback in (ProgressLines, SayDuration(trainer), stop, EvaluateFirst(trainer, checkpoint)):
        trainer.add_callback(callback)
    start, scores = time.time(), None
    with stop.listening():
        try:
            # under autocast PEFT's own cast of every input to fp32 is undone at once: kernels and memory for nothing
            with disable_input_dtype_casting(trainer.model, active=trainer.args.bf16):
                result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            seconds = time.time() - start
            if not trainer.state.best_model_checkpoint:  # with one, its adapter is loaded by now, and that is the EMA
                trainer.swap_ema()
            if not stop.agree() and trainer.task and trainer.dev_rows:
                scores = trainer.score_dev_rows()
        except Stopped:
            stop.save()
            if trainer.is_in_train:  # close the progress bar and TensorBoard's file
                trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    if stop.received:
        print(interrupted_line(run.folder, trainer.state.global_step))
        sys.exit(128 + stop.received)  # as a shell reports a signal
    reserved = torch.cuda.max_memory_reserved() / 2**30 if cuda else None  # without the CUDA context
    allocated = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    measured = {
        "steps": trainer.state.global_step,
        "train_loss": mean_loss(trainer.state.log_history),
        "best": trainer.state.best_metric,
        "best_metric": trainer.args.metric_for_best_model,
        "seconds": round(seconds, 1),
        "samples_per_s": round(result.metrics["train_samples_per_second"], 2),
        "peak_gib": reserved and round(reserved, 2),
        "peak_tensors_gib": allocated and round(allocated, 2),
        "rows_at_once": -(-trainer.args.per_device_train_batch_size // trainer.parts),
    }
    return measured, scores


def student_record(run: Run, model, rows: list[dict], task: Task | None = None) -> dict:
    """Fields of run.json about the student (a PeftModel) and the rows that it was trained on."""
    base = model.get_base_model()
    return {
        "student": run.student,
        "precision": base.precision,
        "base": base.base_record,
        "task": task.name if task else None,
        "rows": len({r["row_number"] for r in rows}),
    }


def adapter_weights(state: dict) -> dict:
    """The adapter's tensors of a PeftModel's state, as they are written."""
    import torch

    return {k: v.to(torch.bfloat16) for k, v in state.items() if "lora_" in k and ".default." in k}


def mean_loss(history: list[dict]) -> float:
    """Mean training loss of all steps of a run, also where it was resumed.

    history: a trainer's log_history, in which "loss" is the mean over the steps since the entry before. Its own
    train_loss leaves out the steps before a checkpoint. Every checkpoint has its steps' loss logged (StopOnSignal).
    """
    total, before = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total, before = total + entry["loss"] * (entry["step"] - before), entry["step"]
    return total / max(before, 1)


def interrupted_line(folder: Path, step: int) -> str:
    """What an interrupted run says last."""
    if not checkpoints_in(folder):
        return "stopped before the first step was done; the same command starts again"
    return f"stopped at step {step}; the same command with --resume_from_checkpoint last continues"

"""One training run from start to adapter folder: resume, signals, progress."""

import signal
import sys
import time

from distill.train.run_folder import finish, step_line
from distill.train.trainer import dev_scores


def run_training(trainer, args, task, dev, record, prompts):
    """Train, or go on; keep the best checkpoint; write the adapter folder. Ctrl-C and SIGTERM save first."""
    import torch
    from peft.helpers import disable_input_dtype_casting
    from transformers.trainer_callback import ProgressCallback, TrainerCallback

    from distill.train.memory import fit_micro_batch

    several = trainer.args.world_size > 1

    class Progress(ProgressCallback):  # TensorBoard and the history have all that TRL measures, the terminal a line
        def on_log(self, _args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and "loss" in logs:
                self.training_bar.write(step_line(state.global_step, logs))

    class Interrupt(TrainerCallback):
        asked = 0  # the signal's number

        def on_step_end(self, _args, state, control, **kwargs):
            if several:  # all processes stop behind the same step
                own = torch.tensor([Interrupt.asked], device=trainer.args.device)
                Interrupt.asked = int(trainer.accelerator.gather(own).max())
            if Interrupt.asked:
                control.should_save = control.should_training_stop = True

    def interrupt(number, _):
        print("\ninterrupted: saving after this step", file=sys.stderr)
        Interrupt.asked = number
        if not several:  # a second one stops at once; a launcher passes on what the processes have already heard
            default_signals()

    if torch.cuda.is_available() and not several:  # ranks that probe alone would wait for each other
        fit_micro_batch(trainer)
    trainer.add_callback(Interrupt)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    start = time.time()
    # under autocast PEFT's own cast of every input to fp32 is undone at once: kernels and memory for nothing
    with disable_input_dtype_casting(trainer.model, active=trainer.args.bf16):
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.time() - start
    if Interrupt.asked:
        print(
            f"stopped at step {trainer.state.global_step}; the same command with --resume_from_checkpoint last goes on"
        )
        sys.exit(128 + Interrupt.asked)  # as a shell tells of a signal
    default_signals()
    if not trainer.state.best_model_checkpoint:  # whose adapter is the mean, and is loaded by now
        trainer.exchange()
    peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None  # without CUDA itself
    tensors = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    record |= {
        "student": args.student,
        "precision": trainer.model.get_base_model().precision,
        "task": task.name if task else None,
        "rows": len(prompts),
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "best": trainer.state.best_metric,
        "seconds": round(seconds, 1),
        "samples_per_s": round(result.metrics["train_samples_per_second"], 2),
        "peak_gib": peak and round(peak, 2),
        "peak_tensors_gib": tensors and round(tensors, 2),
        "rows_at_once": -(-trainer.args.per_device_train_batch_size // trainer.parts),
    }
    # by every process, since under FSDP each holds a part of the weights
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else trainer.model.state_dict()
    weights = {k: v.to(torch.bfloat16) for k, v in state.items() if "lora_" in k and ".default." in k}
    scores = dev_scores(trainer.model, trainer.processing_class, task, dev) if task and dev else None
    if trainer.is_world_process_zero():
        finish(trainer, args, task, weights, scores, record, prompts)
    return record


def default_signals():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

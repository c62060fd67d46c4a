"""What a run shows while it trains, and how it stops."""

import signal
import sys

import torch
from transformers.trainer_callback import ProgressCallback, TrainerCallback

LOGGED = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "eval_loss": "development loss",
    "eval_accuracy": "accuracy",
    "eval_label_log_loss": "label log-loss",
}


def log_line(step: int, logs: dict) -> str:
    """One line for the terminal of what a trainer logs at a step."""
    return f"step {step}: " + ", ".join(f"{name} {logs[key]:.4g}" for key, name in LOGGED.items() if key in logs)


class ProgressLines(ProgressCallback):
    """The progress bar, with one line per log; TensorBoard and the history keep everything."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.write(log_line(state.global_step, logs))


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM: save a checkpoint after the current step and stop, all processes after the same step."""

    def __init__(self, trainer):
        self.trainer, self.received = trainer, 0  # the signal's number

    def listen(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        print("\ninterrupted: saving after this step", file=sys.stderr)
        self.received = number
        if self.trainer.args.world_size == 1:  # a launcher repeats a signal that its processes already have
            restore_signals()  # a second Ctrl-C stops at once

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.args.world_size > 1:
            own = torch.tensor([self.received], device=self.trainer.args.device)
            self.received = int(self.trainer.accelerator.gather(own).max())
        if self.received:
            control.should_save = control.should_training_stop = True


def restore_signals():
    """Give SIGINT and SIGTERM back to Python's defaults."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

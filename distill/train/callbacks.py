"""What a run shows while it trains, and how it stops."""

import contextlib
import signal
import sys
from pathlib import Path

import torch
from transformers.trainer_callback import ProgressCallback, TrainerCallback

LOGGED = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "eval_loss": "development loss",
    "eval_mean_token_accuracy": "token accuracy",
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


class EvaluateFirst(TrainerCallback):
    """A run resumed from a checkpoint whose development evaluation was interrupted begins with that evaluation."""

    def __init__(self, trainer, checkpoint: Path | None):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        step, last = state.global_step, state.global_step >= state.max_steps
        if not self.checkpoint or args.eval_strategy == "no" or (step % state.eval_steps and not last):
            return
        if any(h["step"] == step and args.metric_for_best_model in h for h in state.log_history):
            return
        metrics = self.trainer.evaluate()
        if self.trainer._determine_best_metric(metrics, None):
            state.best_model_checkpoint = str(self.checkpoint)


class Stopped(Exception):
    """A signal asked the run to stop, between two forward passes."""


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM: stop before the next forward pass, of a step or of an evaluation, so that a run can save.

    Several processes agree on it before each forward pass. All of them compute equally many.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.own = self.received = 0  # the signal's number: what this process got, and what all of them act on
        self.group = None
        self.after_step = None  # random numbers and summed loss after the last whole step

    @contextlib.contextmanager
    def listening(self):
        """Within it the signals raise Stopped from the model's next forward pass; a second Ctrl-C stops at once."""
        if self.trainer.args.world_size > 1:  # a group on the CPU: with NCCL each pass would wait for the GPU
            self.group = torch.distributed.new_group(backend="gloo")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)
        hook = self.trainer.model.get_input_embeddings().register_forward_pre_hook(self.before_forward)
        try:
            yield
        finally:
            hook.remove()
            restore_signals()

    def receive(self, number, frame):
        print("\ninterrupted: saving", file=sys.stderr)
        self.own = number
        if self.trainer.args.world_size == 1:  # a launcher repeats a signal that its processes already have
            restore_signals()

    def agree(self) -> int:
        """`received`, the largest signal number of all processes; each of them waits for the others."""
        self.received = self.own
        if self.group:
            largest = torch.tensor(self.own)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, self.group)
            self.received = int(largest)
        return self.received

    def before_forward(self, *_):
        if self.agree():
            raise Stopped

    def on_step_end(self, args, state, control, **kwargs):
        # each checkpoint has the loss of all steps before it in its history
        control.should_log |= control.should_save
        self.after_step = random_state(), self.trainer._tr_loss.clone()

    def save(self):
        """Save a checkpoint of the last whole step, as if the run had never begun the next one or its evaluation."""
        state, args = self.trainer.state, self.trainer.args
        saved = (Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir()
        self.agree()  # the first process makes that folder only when the others have looked
        if self.after_step and not saved:
            random, loss = self.after_step
            set_random_state(*random)
            control = self.trainer.control
            control.should_log, control.should_evaluate, control.should_save = True, False, True
            self.trainer._maybe_log_save_evaluate(loss, None, self.trainer.model, None, state.epoch, None, None)
        self.agree()  # a launcher ends the others as soon as one has ended


def random_state() -> tuple:
    """What dropout draws next from, on the CPU and on this process's GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_state(cpu: torch.Tensor, cuda: torch.Tensor | None) -> None:
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


@contextlib.contextmanager
def random_state_kept():
    """What is drawn within it leaves the random numbers after it as they were."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(*before)


def restore_signals():
    """Give SIGINT and SIGTERM back to Python's defaults."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

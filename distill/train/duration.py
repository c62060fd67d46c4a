"""How long a run will take, said once, after its first steps."""

import time

from tqdm import tqdm
from transformers.trainer_callback import TrainerCallback

FORWARD = 1 / 3  # time of a row without gradients over one in a training step; 0.28 to 0.38 on two CPU cores


class SayDuration(TrainerCallback):
    """After three steps, the first of which compiles and warms: print the time of the whole run.

    trainer: a StudentTrainer. An evaluation computes the loss of the development rows and, in a label task, their
    scores; the calibration scores them once more.
    """

    def __init__(self, trainer):
        self.trainer, self.first, self.seconds = trainer, 0, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.first = state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.monotonic() - self.began)
        if len(self.seconds) != 3 or state.global_step == state.max_steps:
            return
        steps, every = state.max_steps - self.first, state.eval_steps
        # one at each multiple of `every`, and one at the end
        evaluations = -(-state.max_steps // every) - self.first // every if args.eval_strategy != "no" else 0
        lengths = sorted(len(row["input_ids"]) for row in self.trainer.train_rows)
        line = duration_line(
            sum(self.seconds[1:]) / 2,
            steps=steps,
            batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            evaluations=evaluations,
            dev_rows=len(self.trainer.dev_rows),
            scored=bool(self.trainer.task),
            long_rows=lengths[-1] > 2 * lengths[len(lengths) // 2],
        )
        if self.trainer.is_world_process_zero():
            tqdm.write(line)


def duration_line(
    step: float, *, steps: int, batch_size: int, evaluations: int, dev_rows: int, scored: bool, long_rows: bool
) -> str:
    """The time of a run and what shortens it.

    step: seconds of a step of batch_size rows. evaluations: of dev_rows rows, whose labels are `scored` too.
    long_rows: whether the longest rows are far from the median.
    """
    once = FORWARD * step / batch_size * dev_rows
    evaluation = once * (2 if scored else 1)
    evaluating = evaluations * evaluation + (once if scored and dev_rows else 0)
    total = steps * step + evaluating
    line = f"about {in_words(total)} for {steps} steps of {batch_size} rows ({in_words(step)} a step"
    if evaluations:
        line += f"; {evaluations} evaluation{'s' * (evaluations > 1)} of {dev_rows} rows, {in_words(evaluation)} each"
    shorter = ["fewer --max_steps", "a smaller --batch_size"]
    shorter += ["a smaller --max_len, which drops the longest rows"] * long_rows
    shorter += ["fewer --dev_rows"] * (evaluating > total / 10)
    return f"{line}); shorter with {' or '.join([', '.join(shorter[:-1]), shorter[-1]])}"


def in_words(seconds: float) -> str:
    """A duration as a person says it: 0.15 s, 9.2 s, 45 s, 12 minutes, 3.4 hours."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"

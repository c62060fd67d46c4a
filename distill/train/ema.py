"""EMA of the weights: an exponential moving average of the adapter is what a run evaluates, saves and serves.

The steps of a short run at a high learning rate scatter around what they approach, and their average is closer to it
(Morales-Brotons et al. 2024, arXiv 2411.18704). On CreditMix's hard labels it had a lower held-out log-loss than the
last step for four seeds out of five.
"""

import contextlib
from pathlib import Path

import torch
from transformers.trainer_callback import TrainerCallback

SPAN = 0.18  # of the run's steps: decay 1 - 1 / (SPAN * steps). 100 of 560 steps, as measured
RAW = "weights.pt"  # in a checkpoint, whose adapter is the EMA: the weights that training continues from


class EmaOfWeights:
    """Mixin for a TRL trainer with `trainable`, the list of its parameters: evaluates and saves their EMA."""

    ema = None  # one tensor per parameter, from the first step on

    def start_ema(self):
        """Follow the weights from now on. Not under FSDP, where a parameter is a shard that comes and goes."""
        if not self.is_fsdp_enabled:
            self.add_callback(EmaCallback(self))

    def update_ema(self, steps: int):
        """Include the weights after an optimizer step. steps: of the whole run."""
        weights = [p.detach() for p in self.trainable]
        if self.ema is None:
            self.ema = [w.clone() for w in weights]
        torch._foreach_lerp_(self.ema, weights, 1 / max(1, SPAN * steps))

    def swap_ema(self):
        """Exchange weights and EMA, without a copy; a second call restores them."""
        if self.ema is not None:
            for i, p in enumerate(self.trainable):
                p.data, self.ema[i] = self.ema[i], p.data

    @contextlib.contextmanager
    def ema_weights(self):
        """The model has its EMA as weights inside this context."""
        self.swap_ema()
        try:
            yield
        finally:
            self.swap_ema()

    def save_model(self, output_dir=None, _internal_call=False):
        with self.ema_weights():
            super().save_model(output_dir, _internal_call)
        if self.ema is not None and self.args.should_save:
            torch.save([p.detach() for p in self.trainable], Path(output_dir) / RAW)

    def _load_from_checkpoint(self, folder, model=None):
        super()._load_from_checkpoint(folder, model)
        if not self.is_fsdp_enabled:
            self.ema = [p.detach().clone() for p in self.trainable]
            raw = torch.load(Path(folder) / RAW, map_location=self.args.device)
            for p, weights in zip(self.trainable, raw, strict=True):
                p.data.copy_(weights)


class EmaCallback(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.update_ema(state.max_steps)

"""Out of memory while training: rows at once are found by trying, and reduced where a later step does not fit."""

import contextlib

import torch

from distill.files import UserError
from distill.train.memory import hint


def fit_micro_batch(trainer) -> None:
    """Reduce the rows at once until a step on the longest ones fits; the effective batch stays the same.

    trainer: a StudentTrainer before train(), the only process.
    """
    lengths = [sum(len(ids) for ids, _ in row["texts"]) for row in trainer.train_rows]
    asked = trainer.args.per_device_train_batch_size
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:asked]

    def step(n):
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in longest[:n]]))
        with trainer.accelerator.autocast():
            trainer.compute_loss(trainer.model.train(), batch).backward()

    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable()  # as train() will
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    paged = "paged" in trainer.args.optim
    copies = [torch.empty_like(p) for p in trainable for _ in range(1 if paged else 3)]  # EMA, Adam's moments
    fits = largest_fitting(step, asked, hint(trainer.model.get_base_model().precision))
    del copies
    trainer.model.zero_grad(set_to_none=True)
    for collected in ("_metrics", "_stored_metrics"):  # what TRL's trainers log with the next step
        getattr(trainer, collected, {"train": {}})["train"].clear()
    torch.cuda.empty_cache()
    trainer.args.per_device_eval_batch_size = fits
    if fits < asked:
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = fits
        trainer.args.gradient_accumulation_steps *= asked // fits
        print(f"{asked} rows at once do not fit this GPU: {fits}, accumulated {asked // fits} times as often")


def largest_fitting(step, n: int, hint: str) -> int:
    """The largest divisor of n for which step(rows) does not run out of memory; UserError when not even 1 does."""
    for rows in (m for m in range(n, 0, -1) if n % m == 0):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # a step that did not fit is no part of the run's peak
        try:
            step(rows)
            return rows
        except torch.OutOfMemoryError:
            pass  # the traceback holds the step's tensors until here
        torch.cuda.empty_cache()
    raise UserError(f"one row does not fit this GPU; {hint}")


class SplitsOnOutOfMemory:
    """Mixin for a TRL trainer: a micro-batch that runs out of memory is computed in parts, with the same gradients."""

    parts = 1  # of a micro-batch, one after the other; doubled by each out-of-memory error

    @contextlib.contextmanager
    def part_of_batch(self, part: list[dict], rows: list[dict]):
        """A context in which the loss of `part`, out of the micro-batch `rows`, is computed.

        Nothing to do for a mean over rows or a sum over tokens; a trainer whose loss has another mean overrides it.
        """
        yield

    def get_train_dataloader(self):  # a batch that does not fit is collated again from its rows, in parts
        collate = self.data_collator
        self.data_collator = lambda rows: {**collate(rows), "rows": BatchRows(rows)}
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def training_step(self, model, inputs, num_items_in_batch=None):
        rows = inputs.pop("rows").rows
        if self.args.world_size > 1:  # the processes must stay in step with each other
            return self.check_finite(super().training_step(model, inputs, num_items_in_batch))
        earlier = take_gradients(model)  # of this step's micro-batches so far
        while True:
            try:
                loss = self.training_step_in_parts(super().training_step, model, inputs, rows, num_items_in_batch)
                break
            except torch.OutOfMemoryError:
                pass  # the traceback holds the tensors until here
            take_gradients(model)
            torch.cuda.empty_cache()
            if self.parts >= len(rows):
                raise UserError(f"one row does not fit this GPU; {hint(self.model.get_base_model().precision)}")
            self.parts = min(2 * self.parts, len(rows))
            at_once = -(-len(rows) // self.parts)
            print(f"out of memory at step {self.state.global_step + 1}: {at_once} rows at once from here on")
        for p, g in earlier:
            p.grad = g if p.grad is None else p.grad.add_(g)
        return self.check_finite(loss)

    def training_step_in_parts(self, training_step, model, inputs, rows, num_items_in_batch):
        """The loss of a micro-batch, computed in self.parts parts; gradients are those of the whole."""
        if self.parts == 1:
            return training_step(model, inputs, num_items_in_batch)
        accumulated, total = self.current_gradient_accumulation_steps, 0
        size = -(-len(rows) // self.parts)
        try:
            for part in (rows[i : i + size] for i in range(0, len(rows), size)):
                # a mean over rows counts by the part's share of them; a sum over num_items_in_batch tokens as it is
                self.current_gradient_accumulation_steps = accumulated * len(rows) / len(part)
                with self.part_of_batch(part, rows):
                    total = total + training_step(model, self.data_collator(part), num_items_in_batch)
        finally:
            self.current_gradient_accumulation_steps = accumulated
        return total

    def check_finite(self, loss):
        """The loss; UserError for NaN or infinity, or the run would end with an adapter of NaN."""
        if not loss.isfinite():
            step = self.state.global_step + 1
            raise UserError(f"step {step}: the loss is {loss.item()}; expected a smaller --lr, in a fresh --save_dir")
        return loss


class BatchRows:
    """Rows of a batch, wrapped so that nothing between collator and trainer unpacks or moves them."""

    def __init__(self, rows):
        self.rows = rows


def take_gradients(model) -> list[tuple]:
    """Take the gradients off the parameters: [(parameter, gradient)]."""
    found = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    for p, _ in found:
        p.grad = None
    return found

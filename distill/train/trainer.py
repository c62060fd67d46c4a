"""What this project adds to a TRL trainer, whatever its loss, as a mixin."""

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import LabelScorer, Task, label_classes, log_loss, prompt_of
from distill.files import UserError
from distill.model.fused_lora import fuse
from distill.model.token_tree import tree_mask_unsupported_reason
from distill.train.callbacks import log_line, random_state_kept
from distill.train.data import longest_text
from distill.train.ema import EmaOfWeights
from distill.train.out_of_memory import SplitsOnOutOfMemory
from distill.train.trl_prefix import share_prefixes


class StudentTrainer(EmaOfWeights, SplitsOnOutOfMemory):
    """Mixin: shared prefixes, fused LoRA layers, an adapter in fp32, its EMA, label scores while training.

    Its place is before the trainer that has the loss: `class Trainer(StudentTrainer, SFTTrainer)`.
    Arguments beyond those of the TRL trainer:
        train_rows: the encoded rows (distill/train/data.py) of train_dataset, in its order
        task, dev_rows: the label task and encoded development rows, scored in each evaluation as inference scores them
    """

    needs_tree_mask = False  # whether the loss only exists for rows packed into token trees

    def __init__(self, *args, train_rows: list[dict], task: Task | None = None, dev_rows: list[dict] = (), **kwargs):
        self.train_rows, self.task, self.dev_rows = train_rows, task, dev_rows
        config = kwargs["args"]
        if config.n_gpu > 1:  # one process would copy the model to all of them and multiply the batch
            print(f"one of {config.n_gpu} GPUs is used; all of them: accelerate launch {Path(sys.argv[0]).name}")
            config._n_gpu = 1
        super().__init__(*args, **kwargs)
        self.share_prefixes()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        for p in self.trainable:  # TRL casts them to bf16 on a quantised base, where small steps round to nothing
            p.data = p.data.float()
        if not self.is_fsdp_enabled:  # FSDP gathers a layer's weights only while that layer's own module runs
            fuse(self.model)
        self.start_ema()
        n, total = sum(p.numel() for p in self.trainable), sum(p.numel() for p in self.model.parameters())
        print(f"trainable: {n:,} of {total:,} parameters ({n / total:.2%})")

    def share_prefixes(self):
        """Compute what rows of a batch have in common once, if the model's attention takes a tree mask."""
        base = self.model.get_base_model()
        if hasattr(base, "shares_prefixes"):
            return
        why = tree_mask_unsupported_reason(base, longest_text(self.train_rows))
        base.shares_prefixes = not why
        if not why:
            share_prefixes(base, self.processing_class.pad_token_id)
        elif self.needs_tree_mask:
            raise UserError(f"a teacher's distribution needs a tree mask, but {why}; expected teacher_output alone")
        else:
            print(f"rows are computed one by one, without shared prefixes: {why}")

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not isinstance(model, DistributedDataParallel):
            return super().training_step(model, inputs, num_items_in_batch)
        with model.no_sync():  # it would copy each of an adapter's hundreds of gradients to its buckets and back
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            average_gradients(self.trainable)
        return loss

    def _run_epoch(self, **kwargs):
        if self.state.global_step < self.state.max_steps:  # resumed from its last step, a run has nothing left to do
            super()._run_epoch(**kwargs)

    def evaluate(self, *args, metric_key_prefix="eval", **kwargs):
        # a run that is stopped here goes on as if it had not been, and --eval_steps changes no weight
        with random_state_kept(), self.ema_weights():
            metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            metrics |= {k: v for k, v in self.state.log_history[-1].items() if k.startswith(metric_key_prefix)}
            if self.task and self.dev_rows:
                raw, _, y = self.score_dev_rows()
                scores = {"accuracy": float((raw.argmax(1) == y).mean()), "label_log_loss": log_loss(raw, y)}
                scores = {f"{metric_key_prefix}_{k}": v for k, v in scores.items()}
                self.log(scores)
                metrics |= scores
        if self.is_world_process_zero():
            tqdm.write(log_line(self.state.global_step, metrics))
        return metrics

    def score_dev_rows(self):
        """(raw scores [N, L], prior [L], true classes [N]) of the development rows, by the scorer that serves."""
        training = self.model.training
        self.model.eval()
        scorer = LabelScorer(self.model, self.processing_class, self.task.labels, self.task.null_prompts())
        raw, prior = scorer.score([prompt_of(r) for r in self.dev_rows]), scorer.prior(self.task)
        self.model.train(training)
        return raw, prior, label_classes("development rows", self.dev_rows, "answer", self.task)


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average gradients over all processes in one message; each becomes a view of it, so none is copied back."""
    # a parameter that a process's rows did not reach has no gradient there, and all must send the same
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)

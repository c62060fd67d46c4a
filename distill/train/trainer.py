"""What our trainers add to TRL's: shared prefixes, fused layers, fp32 adapters, label scores while training."""

import sys
from pathlib import Path

from common import LabelScorer, label_classes, log_loss, prompt_of
from distill.files import UserError
from distill.train.run_folder import step_line


def trainer_class(trainer, task, dev):
    """`trainer`, a TRL trainer, with what all routes add: shared prefixes, fused layers, fp32 adapters, accuracy."""
    from accelerate.utils import gather_object
    from torch.nn.parallel import DistributedDataParallel
    from tqdm import tqdm

    from distill.model.fused_lora import fuse
    from distill.model.token_tree import tree_mask_unsupported_reason
    from distill.train.ema import Averaged
    from distill.train.memory import InParts
    from distill.train.trl_prefix import share_prefixes

    class Student(Averaged, InParts, trainer):
        needs_trees = False

        def __init__(self, *args, **kwargs):
            config = kwargs["args"]
            if config.n_gpu > 1:  # one process would copy the model to all of them and multiply the batch
                print(f"one of {config.n_gpu} GPUs is used; all of them: accelerate launch {Path(sys.argv[0]).name}")
                config._n_gpu = 1
            super().__init__(*args, **kwargs)
            self.share()
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            for p in trainable:  # TRL casts them to bf16 on a quantised base, where small steps round to nothing
                p.data = p.data.float()
            if not self.is_fsdp_enabled:  # which lends a projection its weights only while that module runs
                fuse(self.model)
            self.trainable = trainable
            self.follow_weights()
            n, total = sum(p.numel() for p in trainable), sum(p.numel() for p in self.model.parameters())
            print(f"trainable: {n:,} of {total:,} parameters ({n / total:.2%})")

        def share(self):
            base = self.model.get_base_model()
            if hasattr(base, "shares_prefixes"):
                return
            why = tree_mask_unsupported_reason(base, longest_row(self.train_dataset))
            base.shares_prefixes = not why
            if not why:
                share_prefixes(base, self.processing_class.pad_token_id)
            elif self.needs_trees:
                raise UserError(f"a teacher's distribution needs a tree mask, but {why}; expected teacher_output alone")
            else:
                print(f"each row by itself, common beginnings computed again: {why}")

        def training_step(self, model, inputs, num_items_in_batch=None):
            if not isinstance(model, DistributedDataParallel):
                return super().training_step(model, inputs, num_items_in_batch)
            with model.no_sync():  # it would copy each of an adapter's hundreds of gradients to its buckets and back
                loss = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                average_gradients(self.trainable)
            return loss

        def _precompute_ref_logps(self, dataset, name, batch_size):  # DPO calls it before __init__ returns
            self.share()
            if self.args.world_size == 1:
                return super()._precompute_ref_logps(dataset, name, batch_size)
            # TRL leaves them in a file of the first process's own temporary folder, where no other finds them
            rank, world, found = self.args.process_index, self.args.world_size, []
            own = range(rank, len(dataset), world)
            for part in tqdm([own[i : i + batch_size] for i in range(0, len(own), batch_size)], "reference log-probs"):
                batch = self._prepare_inputs(self.data_collator([dataset[i] for i in part]))
                chosen, rejected = self.compute_ref_log_probs(self.model, batch)
                found += zip(part, chosen.tolist(), rejected.tolist(), strict=True)
            found = sorted(gather_object(found))
            dataset = dataset.add_column("ref_chosen_logps", [c for _, c, _ in found])
            return dataset.add_column("ref_rejected_logps", [r for _, _, r in found])

        def evaluate(self, *args, metric_key_prefix="eval", **kwargs):
            with self.averaged():
                metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
                if task and dev:
                    raw, _, y = dev_scores(self.model, self.processing_class, task, dev)
                    found = {"accuracy": float((raw.argmax(1) == y).mean()), "label_log_loss": log_loss(raw, y)}
                    found = {f"{metric_key_prefix}_{k}": v for k, v in found.items()}
                    self.log(found)
                    metrics |= found
            if self.is_world_process_zero():
                tqdm.write(step_line(self.state.global_step, metrics))
            return metrics

    return Student


def average_gradients(parameters):
    """The mean over all processes, in one message: each gradient becomes a view of it, so none is copied back."""
    import torch

    # one that a process's rows did not reach has none there, and all must send the same
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)


def longest_row(rows):
    """Tokens of the longest text in a dataset of token ids."""
    if "input_ids" in rows.column_names:
        return max(map(len, rows["input_ids"]))
    answers = [rows[c] for c in ("chosen_ids", "rejected_ids") if c in rows.column_names]
    return max(len(p) + max(map(len, own), default=0) for p, *own in zip(rows["prompt_ids"], *answers, strict=True))


def dev_scores(model, tokenizer, task, dev):
    """(raw [N, L], prior [L], true classes [N]) of development rows, by the scorer that serves."""
    training = model.training
    model.eval()
    scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
    raw, prior = scorer.score([prompt_of(r) for r in dev]), scorer.prior(task)
    model.train(training)
    known = [{"answer": r.get("output") or r.get("chosen") or r["teacher_output"]} for r in dev]
    return raw, prior, label_classes("development rows", known, "answer", task)

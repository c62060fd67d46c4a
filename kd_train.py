"""Knowledge distillation: a teacher's answers or label probabilities -> an adapter folder.

    python kd_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_kd.jsonl --save_dir runs/creditmix_kd
    python kd_train.py --student smollm2-135m --data data/creditmix_kd.jsonl --save_dir runs/try --max_steps 20  # CPU

Rows {"input", "teacher_output"} are trained on as text (sequence KD). Where rows of a label task carry "teacher_probs",
the loss is on the label distribution itself, through the scores that inference ranks by. --teacher answers rows without
teacher_output: a model (scored as in inference for a label task, greedy text else), gradient-boosting on the rows' own
fields, or an OpenAI-compatible endpoint, which gives text or label probabilities (--teacher_api), at once or by the
Batch API (--batch_out, --batch_in), up to --max_cost. With a model as the teacher of free text, the loss is on its
distribution over every token of the answers: the top-k log-probs are kept on disk, so the two never share the memory.
"""

import argparse
from pathlib import Path

from common import Task, label_classes, label_trie
from distill.files import UserError, between, cli, positive
from distill.model.hub import base_config
from distill.train.arguments import add_arguments, choose_settings, training_arguments
from distill.train.data import KDRow, dataset, describe, encode, find_task_file, read_training_rows, split_rows
from distill.train.memory import plan_micro_batch
from distill.train.run import run_training
from distill.train.run_folder import check_run, start_run
from distill.train.student import load_student, with_lora
from distill.train.teacher_endpoint import Endpoint
from distill.train.teacher_topk import TopK
from distill.train.teachers import (
    Teacher,
    add_teacher_arguments,
    cache_folder,
    check_teacher,
    learns_token_distribution,
    teach,
    write_requests,
)


def main(args):
    # The rows, and the teacher that answers those without teacher_output.
    task_path = find_task_file(args.data, args.task)
    rows, task = read_kd_rows(args.data, task_path, has_teacher=bool(args.teacher))
    teacher = None
    if args.teacher:
        prices = args.price_in, args.price_out, args.max_cost
        endpoint = Endpoint(args.teacher, args.teacher_model, args.teacher_timeout, args.teacher_api, *prices)
        teacher = Teacher(args.teacher, args.precision, endpoint if "://" in args.teacher else None)
        check_teacher(teacher, args.student, task)
    if (args.batch_out or args.batch_in) and not (teacher and teacher.endpoint):
        raise UserError("--batch_out, --batch_in: expected --teacher http://host/v1, whose requests they hold")
    base = base_config(args.student)
    _, config, tokenizer = base
    args.lr, args.batch_size, args.epochs, args.max_steps = choose_settings(
        "kd", config, rows, args.lr, args.batch_size, args.epochs, args.max_steps
    )
    limits = {"data": args.data, "max_len": args.max_len}
    if args.batch_out:
        return write_requests(teacher, rows, task, tokenizer, **limits, path=args.batch_out)
    run = check_run(
        "kd",
        args.save_dir,
        student=args.student,
        data=args.data,
        settings=vars(args),
        resume=args.resume_from_checkpoint,
        overwrite=args.overwrite,
        inputs={"task": task_path, "teacher": args.teacher},
    )
    taught = {"rows_untaught": {}}
    if teacher:
        rows, taught = teach(teacher, rows, task, tokenizer, **limits, seed=args.seed, batch_in=args.batch_in)
        if task:
            add_distributions(teacher.name, rows, task)

    # Token ids, by the prompt builder that inference uses. Development rows choose the checkpoint.
    max_train = args.max_steps and args.max_steps * args.batch_size
    train, dev = split_rows(args.data, rows, args.seed, max_dev=args.dev_rows, max_train=max_train)
    train, dropped = encode(tokenizer, train, args.max_len, "input", "teacher_output")
    dev, dropped_dev = encode(tokenizer, dev, args.max_len, "input", "teacher_output")
    dev = [{**row, "answer": row.get("output") or row["teacher_output"]} for row in dev]  # the true one, if known
    record = describe(tokenizer, train, dropped, dropped_dev) | taught | {"teacher": args.teacher}
    top_k = None
    if learns_token_distribution(teacher, task):
        top_k = TopK(teacher, args.student, tokenizer, train + dev, args.top_k, cache_folder(args.data))
        record["teacher_tokens"] = top_k.record

    # The student; the teacher has left the memory. start_run is the first to write into the folder.
    start_run(run)
    micro_batch = plan_micro_batch(
        train,
        args.student,
        config,
        args.precision,
        batch_size=args.batch_size,
        micro_batch=args.micro_batch,
        lora_r=args.lora_r,
        max_vram_gb=args.max_vram_gb,
    )
    model, tokenizer = load_student(args.student, args.precision, base)

    # TRL's trainer, with what StudentTrainer adds and one of three losses. These imports take seconds.
    from trl import SFTConfig, SFTTrainer

    from distill.train.trainer import StudentTrainer

    class SequenceTrainer(StudentTrainer, SFTTrainer):
        pass

    if task and any(r.get("teacher_probs") for r in rows):
        loss, columns = "label distribution", ["prompt_ids", "teacher", "gold"]
        trainer_class = label_trainer_class(label_trie(tokenizer, task.labels), args.temperature, args.alpha)
    elif top_k:
        loss, columns = "token distribution", ["input_ids", "labels", "row"]
        trainer_class = token_trainer_class(top_k, args.temperature, args.alpha)
    else:
        loss, columns, trainer_class = "sequence", ["input_ids", "labels"], SequenceTrainer
    if loss != "sequence":
        print(f"loss: {loss}, temperature {args.temperature}, share of the given label or token {args.alpha}")
    elif args.alpha or args.temperature != 1:
        print("loss: the teacher's text; --alpha and --temperature are for its probabilities and change nothing")
    config = SFTConfig(
        **training_arguments(
            args.save_dir,
            rows=len(train),
            epochs=args.epochs,
            max_steps=args.max_steps,
            batch_size=args.batch_size,
            micro_batch=micro_batch,
            learning_rate=args.lr,
            eval_steps=args.eval_steps,
            evaluate=bool(dev),
            best_metric="eval_label_log_loss" if task else "eval_loss",  # what inference ranks by
            precision=model.precision,
            seed=args.seed,
        ),
        remove_unused_columns=loss == "sequence",
        dataset_kwargs={"skip_prepare_dataset": loss != "sequence"},
        max_length=None,  # encode() has dropped what is too long
        shuffle_dataset=False,  # the sampler shuffles
    )
    trainer = trainer_class(
        model=with_lora(model, args.student, args.lora_r, args.seed),
        args=config,
        train_dataset=dataset(train, *columns),
        eval_dataset=dataset(dev, *columns),
        processing_class=tokenizer,
        train_rows=train,
        dev_rows=dev,
        task=task,
    )
    run_training(trainer, run, {**record, "loss": loss})


def read_kd_rows(path: Path, task_path: Path | None, *, has_teacher: bool) -> tuple[list[dict], Task | None]:
    """(rows, task or None); each row has its answer, unless there is a teacher to give it. Errors: UserError."""
    rows, task = read_training_rows(path, KDRow, "teacher_output", task_path)
    if task is None and any(r.get("teacher_probs") for r in rows):
        raise UserError(f"{path}: rows have teacher_probs but there is no task file; expected --task")
    untaught = [i for i, r in enumerate(rows, 1) if not r.get("teacher_output")]
    if untaught and not has_teacher:
        raise UserError(f"{path}: row {untaught[0]}: field 'teacher_output' is missing; expected one, or --teacher")
    if task:
        label_classes(path, rows, "output", task, unknown=(None,))
        add_distributions(path, rows, task)
    return rows, task


def add_distributions(path: Path | str, rows: list[dict], task: Task) -> None:
    """Set row["teacher"], probabilities in the task's order, and row["gold"], a class number or -1 where unknown.

    Raises UserError naming the row when its probabilities are invalid.
    """
    for i, row in enumerate(rows, 1):
        if "teacher" in row or not row.get("teacher_output"):
            continue  # it has them, or the teacher still has to answer
        p = row.get("teacher_probs") or {row["teacher_output"]: 1.0}
        place = f"{path}: row {i}: field 'teacher_probs'"
        if set(p) - set(task.labels):
            raise UserError(f"{place}: {sorted(set(p) - set(task.labels))} are no labels; expected {task.labels}")
        values = [p.get(label, 0.0) for label in task.labels]
        if not all(isinstance(v, int | float) and 0 <= v <= 1 for v in values) or abs(sum(values) - 1) > 0.01:
            raise UserError(f"{place}: {values}: expected numbers in [0, 1] that sum to 1")
        row["teacher"] = [v / sum(values) for v in values]
        row["gold"] = task.labels.index(row["output"]) if row.get("output") else -1


def distribution_loss(scores, teacher, gold, temperature, alpha):
    """(1 - alpha) t^2 KL(teacher^(1/t) || softmax(scores / t)) + alpha cross-entropy with gold (Hinton et al. 2015).

    scores [N, L] label log-likelihoods, teacher [N, L] probabilities, gold [N] classes, or -1 for no cross-entropy.
    """
    import torch
    from torch.nn.functional import cross_entropy, kl_div

    soft = torch.softmax(teacher.clamp(min=1e-6).log() / temperature, -1)
    student = torch.log_softmax(scores / temperature, -1)
    distilled = kl_div(student, soft, reduction="none").sum(-1) * temperature**2
    share = alpha * (gold >= 0)
    return ((1 - share) * distilled + share * cross_entropy(scores, gold.clamp(min=0), reduction="none")).mean()


def label_trainer_class(trie, temperature: float, alpha: float):
    """A trainer with the loss on label scores; the prompts of a batch share their prefix, the labels their prompt."""
    import torch
    from torch.utils.checkpoint import checkpoint
    from trl import SFTTrainer

    from distill.model.fp32_logits import fp32_logits
    from distill.model.token_tree import additive, pack_prompts
    from distill.train.trainer import StudentTrainer

    class LabelTrainer(StudentTrainer, SFTTrainer):
        needs_tree_mask = True

        def __init__(self, *args, **kwargs):
            super().__init__(*args, data_collator=self.collate, **kwargs)

        def collate(self, rows):
            batch = pack_prompts([r["prompt_ids"] for r in rows], trie, self.processing_class.pad_token_id)
            batch["teacher"] = torch.tensor([r["teacher"] for r in rows])
            batch["gold"] = torch.tensor([r["gold"] for r in rows])
            return batch

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            teacher, gold, at = inputs.pop("teacher"), inputs.pop("gold"), inputs.pop("label_logits_at")
            inputs["attention_mask"] = additive(inputs["attention_mask"], self.model.dtype)
            with fp32_logits(self.model):
                logits = model(**inputs, use_cache=False).logits.flatten(0, -2)[at]
            # The backward pass computes the log-softmax again, a part at a time: all at once is too large. Rows are
            # selected before the split: selected in each part, their gradient would be as large as all logits.
            parts = [checkpoint(trie.scores, part, use_reentrant=False) for part in logits.split(32)]
            return distribution_loss(torch.cat(parts), teacher, gold, temperature, alpha)

    return LabelTrainer


def token_loss(logits, target, ids, teacher, temperature, alpha):
    """Sum over tokens of (1 - alpha) t^2 KL(teacher || student) + alpha cross-entropy with the text's own token.

    logits [T, V], target [T] the text's tokens, ids [T, k] the teacher's most likely ones, teacher [T, k + 1] their
    log-probs and, last, that of all other tokens together. Those others are one more class for the student too, and
    the temperature softens the k + 1 classes. Renormalised over the k tokens instead, the loss would not see what the
    student gives to the others.
    """
    import torch
    from torch.nn.functional import kl_div

    logits = logits.float()
    total, own = logits.logsumexp(-1, keepdim=True), logits.gather(1, ids)
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    student = torch.log_softmax((torch.cat([own, rest], 1) - total) / temperature, -1)
    soft = torch.log_softmax(teacher / temperature, -1)
    distilled = kl_div(student, soft, reduction="none", log_target=True).sum(-1) * temperature**2
    return ((1 - alpha) * distilled + alpha * (total - logits.gather(1, target[:, None]))[:, 0]).sum()


def pack_tokens(rows, top_k, pad):
    """One micro-batch: packed model inputs, and target, top_ids, top_logp for token_loss in the order of the logits.

    rows: {"input_ids", "labels", "row"}; top_k[row]: (ids, logp) of that row's trained tokens (TopK).
    """
    import torch

    from distill.model.token_tree import pack_rows

    ids, first = [r["input_ids"] for r in rows], [r["labels"].count(-100) for r in rows]
    batch, columns = pack_rows(ids, [n - 1 for n in first], pad)
    at = torch.cat([own[n - 1 : -1] for own, n in zip(columns, first, strict=True)])
    target = torch.cat([torch.tensor(row[n:]) for row, n in zip(ids, first, strict=True)])
    top_ids, logp = map(torch.cat, zip(*(top_k[r["row"]] for r in rows), strict=True))
    keep = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
    keep[at] = True
    order = at.argsort()
    batch["logits_to_keep"] = keep.view(batch["input_ids"].shape)
    return batch | {"target": target[order], "top_ids": top_ids[order], "top_logp": logp[order]}


def token_trainer_class(top_k: TopK, temperature: float, alpha: float):
    """A trainer with the loss on the teacher's top-k; logits only at trained tokens, common prefixes once."""
    from torch.utils.checkpoint import checkpoint
    from trl import SFTTrainer

    from distill.model.token_tree import additive
    from distill.train.trainer import StudentTrainer

    class TokenTrainer(StudentTrainer, SFTTrainer):
        needs_tree_mask = True

        def __init__(self, *args, **kwargs):
            super().__init__(*args, data_collator=self.collate, **kwargs)

        def collate(self, rows):
            batch = pack_tokens(rows, top_k, self.processing_class.pad_token_id)
            # the Trainer counts the tokens of a step by these names
            return batch | {"labels": batch["target"], "shift_labels": batch["target"]}

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            targets = [inputs.pop(k) for k in ("labels", "shift_labels", "target", "top_ids", "top_logp")][2:]
            inputs["attention_mask"] = additive(inputs["attention_mask"], self.model.dtype)
            logits = model(**inputs, use_cache=False).logits.flatten(0, -2)
            loss = 0
            for part in zip(*(x.split(256) for x in (logits, *targets)), strict=True):
                # the backward pass makes the fp32 copies of a part again: all of them at once are too large
                loss = loss + checkpoint(token_loss, *part, temperature, alpha, use_reentrant=False)
            if num_items_in_batch is None:
                return loss / len(logits)
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            return loss * ranks / num_items_in_batch

    return TokenTrainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "kd")
    add_teacher_arguments(parser)
    parser.add_argument(
        "--top_k", type=positive(int), default=32, help="teacher's tokens kept for free text (default: 32)"
    )
    parser.add_argument(
        "--temperature", type=between(float, 0.1, 100), default=1.0, help="softens both distributions (default: 1)"
    )
    parser.add_argument(
        "--alpha", type=between(float, 0, 1), default=0.0, help="weight of the gold label or given token (default: 0)"
    )
    cli(main, parser)

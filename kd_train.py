"""Knowledge distillation: a teacher's answers or label probabilities -> an adapter folder.

    python kd_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_kd.jsonl --save_dir runs/creditmix_kd
    python kd_train.py --student smollm2-135m --data data/creditmix_kd.jsonl --save_dir runs/try --max_steps 20  # CPU

Rows {"input", "teacher_output"} are trained on as text (sequence KD). Where rows of a label task carry "teacher_probs",
the loss is on the label distribution itself, through the scores that inference ranks by. --teacher answers rows without
teacher_output: a model (scored as in inference for a label task, greedy text else), gradient-boosting on the rows' own
fields, or an OpenAI-compatible endpoint. With a model as the teacher of free text, the loss is on its distribution over
every token of the answers, given or its own: the top-k log-probs are kept on disk and the two never share the memory.
"""

import argparse

from common import label_classes, label_trie
from distill.files import UserError, between, cli, positive
from distill.model.hub import base_config
from distill.train.arguments import add_arguments, training_arguments
from distill.train.data import dataset, describe, encode, read_training_rows, split_for
from distill.train.run import run_training
from distill.train.run_folder import may_start, start_run
from distill.train.student import load_student, lora
from distill.train.teacher_endpoint import Endpoint
from distill.train.teacher_topk import TopK
from distill.train.teachers import Teacher, cache_folder, check_teacher, learns_token_distribution, teach
from distill.train.trainer import trainer_class


def main(args):
    rows, task = read_kd_rows(args)
    teacher = None
    if args.teacher:
        at_endpoint = "://" in args.teacher
        endpoint = Endpoint(args.teacher, args.teacher_model, args.teacher_timeout) if at_endpoint else None
        teacher = Teacher(args.teacher, args.precision, endpoint)
        check_teacher(teacher, args.student, task)
    same = may_start(args, "kd")
    student = base_config(args.student)
    tokenizer = student[2]
    untaught = {}
    if teacher:
        rows, untaught = teach(teacher, rows, task, tokenizer, data=args.data, max_len=args.max_len, seed=args.seed)
        if task:
            add_distributions(teacher.name, rows, task)
    train, dev = split_for(args, rows)
    train, dropped = encode(tokenizer, train, args.max_len, "input", "teacher_output")
    dev, dropped_dev = encode(tokenizer, dev, args.max_len, "input", "teacher_output")
    told = describe(tokenizer, train, dropped, dropped_dev) | {"rows_untaught": untaught, "teacher": args.teacher}
    top_k = None
    if learns_token_distribution(teacher, task):
        top_k = TopK(teacher, args.student, tokenizer, train + dev, args.top_k, cache_folder(args.data))
    record = start_run(args, "kd", same)
    model, tokenizer = load_student(args, train, student)

    from trl import SFTConfig, SFTTrainer

    kind, options = trainer_class(SFTTrainer, task, dev), training_arguments(args, model, train, dev, task)
    loss, columns = "sequence", ["input_ids", "labels"]
    if task and any(r.get("teacher_probs") for r in rows):
        loss, columns = "label distribution", ["prompt_ids", "teacher", "gold"]
        kind = distribution_trainer(kind, label_trie(tokenizer, task.labels), args)
    elif top_k:
        loss, columns = "token distribution", ["input_ids", "labels", "row"]
        told["teacher_tokens"] = top_k.record
        kind = token_trainer(kind, top_k, args)
    if loss != "sequence":
        print(f"loss: {loss}, temperature {args.temperature}, share of the given label or token {args.alpha}")
        options |= {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    elif args.alpha or args.temperature != 1:
        print("loss: the teacher's text; --alpha and --temperature are for its probabilities and change nothing")
    trainer = kind(
        model=lora(model, args),
        args=SFTConfig(**options, max_length=None, shuffle_dataset=False),
        train_dataset=dataset(train, *columns),
        eval_dataset=dataset(dev, *columns),
        processing_class=tokenizer,
    )
    run_training(trainer, args, task, dev, {**record, **told, "loss": loss}, [r["input"] for r in train])


def read_kd_rows(args):
    """(rows, task or None) of args.data, checked: each has its answer, or there is a teacher that can give it."""
    optional = {"teacher_output": str, "teacher_probs": dict, "output": str}
    rows, task = read_training_rows(args, {"input": str}, "teacher_output", optional)
    if task is None and any(r.get("teacher_probs") for r in rows):
        raise UserError(f"{args.data}: rows have teacher_probs but there is no task file; expected --task")
    untaught = [i for i, r in enumerate(rows, 1) if not r.get("teacher_output")]
    if untaught and not args.teacher:
        raise UserError(
            f"{args.data}: row {untaught[0]}: field 'teacher_output' is missing; expected one, or --teacher"
        )
    if task:
        label_classes(args.data, rows, "output", task, unknown=(None,))
        add_distributions(args.data, rows, task)
    return rows, task


def add_distributions(path, rows, task):
    """Set row["teacher"], probabilities in the task's order, and row["gold"], a class number or -1 where unknown.

    Raises UserError naming the row when its probabilities are invalid.
    """
    for i, row in enumerate(rows, 1):
        if "teacher" in row or not row.get("teacher_output"):
            continue  # it has them, or a teacher has yet to give them
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

    scores [N, L] label log-likelihoods, teacher [N, L] probabilities, gold [N] classes or -1, which has no share.
    """
    import torch
    from torch.nn.functional import cross_entropy, kl_div

    soft = torch.softmax(teacher.clamp(min=1e-6).log() / temperature, -1)
    student = torch.log_softmax(scores / temperature, -1)
    distilled = kl_div(student, soft, reduction="none").sum(-1) * temperature**2
    share = alpha * (gold >= 0)
    return ((1 - share) * distilled + share * cross_entropy(scores, gold.clamp(min=0), reduction="none")).mean()


def distribution_trainer(trainer, trie, args):
    """The trainer with the loss on label scores; prompts of a batch share their head, labels their prompt."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from distill.model.fp32_logits import fp32_logits
    from distill.model.token_tree import additive, pack_prompts

    class Distribution(trainer):
        needs_trees = True

        def __init__(self, *a, **kw):
            pad = kw["processing_class"].pad_token_id

            def collate(rows):
                batch = pack_prompts([r["prompt_ids"] for r in rows], trie, pad)
                batch["teacher"] = torch.tensor([r["teacher"] for r in rows])
                batch["gold"] = torch.tensor([r["gold"] for r in rows])
                return batch

            super().__init__(*a, data_collator=collate, **kw)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            teacher, gold, at = inputs.pop("teacher"), inputs.pop("gold"), inputs.pop("label_logits_at")
            inputs["attention_mask"] = additive(inputs["attention_mask"], self.model.dtype)
            with fp32_logits(self.model):
                logits = model(**inputs, use_cache=False).logits.flatten(0, -2)[at]
            # their log-softmax is made again on the way back, a part at a time: all at once is too large. The rows are
            # picked in front of the parts: picked in each, its gradient would be as large as all logits
            parts = [checkpoint(trie.scores, part, use_reentrant=False) for part in logits.split(32)]
            return distribution_loss(torch.cat(parts), teacher, gold, args.temperature, args.alpha)

    return Distribution


def token_loss(logits, target, ids, teacher, temperature, alpha):
    """Sum over tokens of (1 - alpha) t^2 KL(teacher || student) + alpha cross-entropy with the text's own token.

    logits [T, V], target [T] the text's tokens, ids [T, k] the teacher's most likely ones, teacher [T, k + 1] their
    log-probs and behind them that of all others together. Those others are one more class for the student too, and the
    temperature softens the k + 1 classes. Renormalising over the k instead would leave unpunished whatever the student
    gives to the others.
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


def token_trainer(trainer, top_k, args):
    """The trainer with the loss on the teacher's top-k; logits only at trained tokens, common beginnings once."""
    from torch.utils.checkpoint import checkpoint

    from distill.model.token_tree import additive

    class Tokens(trainer):
        needs_trees = True

        def __init__(self, *a, **kw):
            pad = kw["processing_class"].pad_token_id

            def collate(rows):
                batch = pack_tokens(rows, top_k, pad)
                # under these names the Trainer counts the tokens of a step
                return batch | {"labels": batch["target"], "shift_labels": batch["target"]}

            super().__init__(*a, data_collator=collate, **kw)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            told = [inputs.pop(k) for k in ("labels", "shift_labels", "target", "top_ids", "top_logp")][2:]
            inputs["attention_mask"] = additive(inputs["attention_mask"], self.model.dtype)
            logits = model(**inputs, use_cache=False).logits.flatten(0, -2)
            loss, at = 0, (args.temperature, args.alpha)
            for part in zip(*(x.split(256) for x in (logits, *told)), strict=True):
                # the 32-bit copies of a part are made again on the way back: all of them at once are too large
                loss = loss + checkpoint(token_loss, *part, *at, use_reentrant=False)
            if num_items_in_batch is None:
                return loss / len(logits)
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            return loss * ranks / num_items_in_batch

    return Tokens


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "data/creditmix_kd.jsonl", "runs/creditmix_kd", 2e-4)
    parser.add_argument("--teacher", help="model, adapter, gradient-boosting or http://host/v1, see above")
    parser.add_argument("--teacher_model", help="the model's name at an http teacher; its key: OPENAI_API_KEY")
    parser.add_argument(
        "--teacher_timeout", type=positive(float), default=120.0, help="seconds an answer (default: 120)"
    )
    parser.add_argument(
        "--top_k", type=positive(int), default=32, help="teacher's tokens kept for free text (default: 32)"
    )
    parser.add_argument("--temperature", type=between(float, 0.1, 100), default=1.0, help="softens both (default: 1)")
    parser.add_argument(
        "--alpha", type=between(float, 0, 1), default=0.0, help="share of gold label or given token (default: 0)"
    )
    cli(main, parser)

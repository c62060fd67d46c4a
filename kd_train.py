"""Knowledge distillation: a teacher's answers or label probabilities -> an adapter folder.

    python kd_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_kd.jsonl --save_dir runs/creditmix_kd
    python kd_train.py --student smollm2-135m --data data/creditmix_kd.jsonl --save_dir runs/try --max_steps 20  # CPU

Rows {"input", "teacher_output"} are trained on as text (sequence KD). Where rows of a label task carry "teacher_probs",
the loss is on the label distribution itself, through the scores that inference ranks by. --teacher answers rows without
teacher_output: a model (scored as in inference for a label task, greedy text else), gradient-boosting on the rows' own
fields, or an OpenAI-compatible endpoint, which gives text or label probabilities (--teacher_api), at once or by the
Batch API (--batch_out, --batch_in), up to --max_cost. Without any rows, it writes them too (--generate). With a model
as the teacher of free text, the loss is on its distribution over every token of the answers: the top-k log-probs are
kept on disk, so the two never share the memory. With --on_policy that loss is on answers of the student, written anew
in each round (distill/train/on_policy.py).
"""

import argparse
from functools import partial
from pathlib import Path

from common import Task, label_classes, label_trie
from distill.evaluate import trained_rows
from distill.files import UserError, between, check_file, cli, positive
from distill.hardware import cap_memory
from distill.model.hub import base_config
from distill.train.arguments import add_arguments, best_metric, choose_settings, training_arguments
from distill.train.data import (
    KDRow,
    check_labels,
    dataset,
    describe,
    encode,
    find_task_file,
    read_training_rows,
    split_rows,
)
from distill.train.generated_rows import agreement, generate_data, read_description
from distill.train.memory import plan_micro_batch
from distill.train.run import run_training
from distill.train.run_folder import check_folder, check_run, start_run
from distill.train.student import load_student, with_lora
from distill.train.teacher_endpoint import Endpoint
from distill.train.teacher_topk import TopK
from distill.train.teachers import (
    Teacher,
    add_teacher_arguments,
    cache_folder,
    check_flags,
    check_on_policy,
    check_teacher,
    learns_token_distribution,
    teach,
    write_requests,
)


def main(args):
    # The rows, and the teacher that answers those without teacher_output. With --generate it writes their inputs first.
    writing = {"generate": args.generate, "examples": args.examples, "exclude": args.exclude, "yes": args.yes}
    check_flags(**writing, batch_in=args.batch_in)
    task_path = find_task_file(args.data, args.task)
    endpoint, generated = None, None
    if args.teacher and "://" in args.teacher:
        prices = args.price_in, args.price_out, args.max_cost
        endpoint = Endpoint(args.teacher, args.teacher_model, args.teacher_timeout, args.teacher_api, *prices)
    if args.generate:
        description = read_description(endpoint, task_path, args.examples, args.exclude)
        if args.on_policy:
            check_on_policy(Teacher(args.teacher, args.precision, endpoint), description.task, args.alpha)
        if not args.batch_out:  # it trains later, and a run that cannot begin pays for no request
            replace = {"overwrite": args.overwrite, "inputs": {"task": task_path}}
            check_folder(args.save_dir, resume=args.resume_from_checkpoint, **replace)
        tokenizer = base_config(args.student)[2]
        check_labels(task_path, description.task, tokenizer)
        limits = {"data": args.data, "max_len": args.max_len}
        generated = generate_data(
            endpoint, args.generate, description, tokenizer, **limits, seed=args.seed, yes=args.yes
        )
        endpoint = endpoint.after(generated["cost"])
    rows, task = read_kd_rows(args.data, task_path, has_teacher=bool(args.teacher))
    teacher = Teacher(args.teacher, args.precision, endpoint) if args.teacher else None
    if teacher:
        check_teacher(teacher, args.student, task)
    if (args.batch_out or args.batch_in) and not (teacher and teacher.endpoint):
        raise UserError("--batch_out, --batch_in: expected --teacher http://host/v1, whose requests they hold")
    for path in args.batch_in or ():  # also where every row has its answer, so that none of them is read
        check_file(path)
    if args.on_policy:
        check_on_policy(teacher, task, args.alpha)
    base = base_config(args.student)
    _, config, tokenizer = base
    check_labels(task_path, task, tokenizer)
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
    plan = partial(
        plan_micro_batch,
        student=args.student,
        config=config,
        precision=args.precision,
        batch_size=args.batch_size,
        micro_batch=args.micro_batch,
        lora_r=args.lora_r,
        max_vram_gb=args.max_vram_gb,
    )
    arguments = partial(
        training_arguments, args.save_dir, batch_size=args.batch_size, learning_rate=args.lr, seed=args.seed
    )
    softened = {"temperature": args.temperature, "alpha": args.alpha}
    seen = (teacher and trained_rows(teacher.name)) or ()  # through the teacher's adapter the student knows them too
    cap_memory(args.max_vram_gb)  # the teacher's too
    if args.on_policy:
        from distill.train.on_policy import train_on_policy

        return train_on_policy(
            run,
            teacher,
            rows,
            base,
            rounds=args.on_policy,
            epochs=args.epochs,
            max_steps=args.max_steps,
            batch_size=args.batch_size,
            dev_rows=args.dev_rows,
            max_len=args.max_len,
            precision=args.precision,
            lora_r=args.lora_r,
            top_k=args.top_k,
            seed=args.seed,
            loss=partial(token_loss, **softened),
            earlier_hashes=seen,
            plan=plan,
            arguments=arguments,
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
    if generated:
        record["generated"] = generated | agreement(rows)
    top_k = None
    if learns_token_distribution(teacher, task):
        top_k = TopK(teacher, args.student, train + dev, args.top_k, cache_folder(args.data))
        record["teacher_tokens"] = top_k.record

    # The student; the teacher has left the memory. start_run is the first to write into the folder.
    start_run(run)
    micro_batch = plan(train)
    model, tokenizer = load_student(args.student, args.precision, base)

    # TRL's trainer, with what StudentTrainer adds and one of three losses. These imports take seconds.
    from trl import SFTConfig, SFTTrainer

    from distill.train.label_distribution import LabelTrainer
    from distill.train.token_distribution import TokenTrainer
    from distill.train.trainer import StudentTrainer

    class SequenceTrainer(StudentTrainer, SFTTrainer):
        pass

    if task and any(r.get("teacher_probs") for r in rows):
        loss, columns = "label distribution", ["prompt_ids", "teacher", "gold"]
        trie, row_loss = label_trie(tokenizer, task.labels), partial(distribution_loss, **softened)
        trainer_class = partial(LabelTrainer, trie=trie, loss=row_loss)
    elif top_k:
        loss, columns = "token distribution", ["input_ids", "labels", "row"]
        trainer_class = partial(TokenTrainer, top_k=top_k, loss=partial(token_loss, **softened))
    else:
        loss, columns, trainer_class = "sequence", ["input_ids", "labels"], SequenceTrainer
    if loss != "sequence":
        print(f"loss: {loss}, temperature {args.temperature}, share of the given label or token {args.alpha}")
    elif args.alpha or args.temperature != 1:
        print("loss: the teacher's text; --alpha and --temperature are for its probabilities and change nothing")
    config = SFTConfig(
        **arguments(
            rows=len(train),
            epochs=args.epochs,
            max_steps=args.max_steps,
            micro_batch=micro_batch,
            eval_steps=args.eval_steps,
            evaluate=bool(dev),
            best_metric=best_metric(bool(task), learns_text=loss == "sequence"),
            precision=model.precision,
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
    run_training(trainer, run, {**record, "loss": loss}, earlier_hashes=seen)


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
    student = torch.log_softmax(class_log_probs(logits, ids) / temperature, -1)
    soft = torch.log_softmax(teacher / temperature, -1)
    distilled = kl_div(student, soft, reduction="none", log_target=True).sum(-1) * temperature**2
    given = logits.logsumexp(-1) - logits.gather(1, target[:, None])[:, 0]
    return ((1 - alpha) * distilled + alpha * given).sum()


def class_log_probs(logits, ids):
    """Log-probs [T, k + 1] of the tokens ids [T, k] under logits [T, V], and last of all other tokens together."""
    import torch

    rest = logits.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(1, ids), rest], 1) - logits.logsumexp(-1, keepdim=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "kd")
    add_teacher_arguments(parser)
    parser.add_argument(
        "--top_k", type=positive(int), default=32, help="teacher's tokens kept for free text (default: 32)"
    )
    parser.add_argument(
        "--on_policy",
        type=positive(int),
        metavar="ROUNDS",
        help="train on answers of the student, new ones in each round",
    )
    parser.add_argument(
        "--temperature", type=between(float, 0.1, 100), default=1.0, help="softens both distributions (default: 1)"
    )
    parser.add_argument(
        "--alpha", type=between(float, 0, 1), default=0.0, help="weight of the gold label or given token (default: 0)"
    )
    cli(main, parser)

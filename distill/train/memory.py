"""Memory of training: what a step is expected to take, how many rows fit at once, and going on when they do not."""

import torch

from common import completion_ids, prompt_ids, prompt_of
from distill.files import UserError
from distill.hardware import cap_memory
from distill.model.fused_lora import CHUNK
from distill.model.token_tree import packed_shape


def smaller(precision):
    flags = "--max_len, --lora_r or --student" + ("" if precision == "nf4" else ", or --precision nf4")
    return f"expected a smaller {flags}"


def expected_step(args, config, precision, texts):
    """(GiB at the peak of a step on `texts`, its packed shape); texts: (token ids, number of trained ones)."""
    shape = packed_shape(*texts) if texts[0] else (0, 0, 0)
    return expected_memory(config, precision, shape, args.lora_r, precision == "nf4"), shape


def expected_memory(config, precision, shape, lora_r, checkpointing):
    """GiB of tensors at the peak of a training step, from the config alone.

    shape: (trees or rows B, width L, trained tokens K) of a micro-batch (trees.packed_shape). Not in it: the CUDA
    context (some 0.4 GiB), what the allocator reserves beyond the tensors (up to two thirds), and the state of a
    paged optimizer, which torch does not allocate. The three coefficients were fitted on tests/bench_train.py.
    """
    c = config.get_text_config()
    hidden, inner, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    head = getattr(c, "head_dim", None) or hidden // c.num_attention_heads
    q, kv = c.num_attention_heads * head, c.num_key_value_heads * head
    b, length, trained = shape
    tokens = b * length
    # 4 bits, a byte for each 64 of them, and 4 bytes for each 256 of those bytes: double quantisation
    a_weight = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "bf16": 2, "fp32": 4}[precision]
    wide = 4 if precision == "fp32" else 2
    weights = a_weight * layers * (2 * hidden * q + 2 * hidden * kv + 3 * hidden * inner)
    weights += wide * c.vocab_size * hidden * (1 if c.tie_word_embeddings else 2)
    adapter = lora_r * layers * (6 * hidden + 2 * q + 2 * kv + 3 * (hidden + inner))
    state = 12 if precision == "nf4" else 20  # weight, gradient, running mean in fp32; Adam's moments are paged for nf4
    # kept for the backward pass: the input of every layer, and of a layer that is not recomputed some widths more
    saved = wide * tokens * hidden * (layers + 9 if checkpointing else 8 * layers)
    mlp = 12 * wide * min(tokens, CHUNK) * inner  # gate, up, their products and gradients of one chunk (fused.py)
    mask = (1 + wide) * b * length * length
    logits = trained * min(c.vocab_size, 32768) * wide + 8 * trained * hidden
    return (weights + state * adapter + saved + mlp + mask + logits) / 2**30


def longest_texts(tokenizer, rows, n, max_len):
    """(token ids, number of trained ones) of what the n longest rows train on: a pair has two texts."""
    fields = next(f for f in (["chosen", "rejected"], ["teacher_output"], ["output"]) if f[0] in rows[0])
    rows = sorted(rows, key=lambda r: -len(prompt_of(r)) - len(r[fields[0]]))[: 4 * n]
    prompts = [prompt_of(r) for r in rows]
    begins = prompt_ids(tokenizer, prompts)
    answers = [completion_ids(tokenizer, prompts, [r[f] for r in rows], begins) for f in fields]
    found = list(zip(begins, *answers, strict=True))
    found = [(p, own) for p, *own in found if len(p) + max(map(len, own)) <= max_len][:n]
    texts = [(p + a, len(a)) for p, own in found for a in own]
    return [ids for ids, _ in texts], [trained for _, trained in texts]


def expected_to_fit(args, model, rows, n):
    """(rows at once, times accumulated): as many of n rows at once as should leave two fifths of the memory."""
    longest, cap = sorted((r["input_ids"] for r in rows), key=len, reverse=True), cap_memory(args.max_vram_gb)
    for micro in (m for m in range(n, 0, -1) if n % m == 0):
        texts = longest[:micro] * (2 if "chosen_ids" in rows[0] else 1)
        gib, _ = expected_step(args, model.config, model.precision, (texts, [2] * len(texts)))
        if gib < 0.6 * cap:  # the allocator reserves up to two thirds more than the tensors
            break
    return micro, n // micro


def fit_micro_batch(trainer):
    """Fewer rows at once until a step on the longest ones fits; the effective batch stays what was asked."""
    rows = trainer.train_dataset
    columns = [rows[c] for c in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids") if c in rows.column_names]
    lengths = [sum(map(len, row)) for row in zip(*columns, strict=True)]
    longest = sorted(range(len(rows)), key=lambda i: -lengths[i])[: trainer.args.per_device_train_batch_size]

    def step(n):
        batch = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in longest[:n]]))
        with trainer.accelerator.autocast():
            trainer.compute_loss(trainer.model.train(), batch).backward()

    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()  # as train() will
    asked = trainer.args.per_device_train_batch_size
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    paged = "paged" in trainer.args.optim
    copies = [torch.empty_like(p) for p in trainable for _ in range(1 if paged else 3)]  # running mean, Adam's moments
    fits = largest_fitting(step, asked, smaller(trainer.model.get_base_model().precision))
    del copies
    trainer.model.zero_grad(set_to_none=True)
    trainer._metrics["train"].clear()
    torch.cuda.empty_cache()
    trainer.args.per_device_eval_batch_size = fits
    if fits < asked:
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = fits
        trainer.args.gradient_accumulation_steps *= asked // fits
        print(f"{asked} rows at once do not fit this GPU: {fits}, accumulated {asked // fits} times as often")


def largest_fitting(step, n, remedy):
    """The largest divisor of n for which step does not run out of memory, tried downwards; UserError when none is."""
    for rows in (m for m in range(n, 0, -1) if n % m == 0):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # what did not fit is no peak of the run
        try:
            step(rows)
            return rows
        except torch.OutOfMemoryError:
            pass  # its traceback holds the step's tensors until here
        torch.cuda.empty_cache()
    raise UserError(f"one row does not fit this GPU; {remedy}")


class InParts:
    """For a TRL trainer: a micro-batch that runs out of memory is computed again in parts, with the same gradients."""

    parts = 1  # of a micro-batch, one after the other; more after each out-of-memory error

    def get_train_dataloader(self):  # a batch that does not fit is made again from its rows, in parts
        collate = self.data_collator
        self.data_collator = lambda rows: {**collate(rows), "rows": Rows(rows)}
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def training_step(self, model, inputs, num_items_in_batch=None):
        rows = inputs.pop("rows").rows
        if self.args.world_size > 1:  # ranks must stay in step with each other
            return self.finite(super().training_step(model, inputs, num_items_in_batch))
        earlier = take_gradients(model)  # of this step's micro-batches so far
        while True:
            try:
                loss = self.in_parts(super().training_step, model, inputs, rows, num_items_in_batch)
                break
            except torch.OutOfMemoryError:
                pass  # its traceback holds the tensors until here
            take_gradients(model)
            torch.cuda.empty_cache()
            if self.parts >= len(rows):
                raise UserError(f"one row does not fit this GPU; {smaller(self.model.get_base_model().precision)}")
            self.parts = min(2 * self.parts, len(rows))
            at_once = -(-len(rows) // self.parts)
            print(f"out of memory at step {self.state.global_step + 1}: {at_once} rows at once from here on")
        for p, g in earlier:
            p.grad = g if p.grad is None else p.grad.add_(g)
        return self.finite(loss)

    def finite(self, loss):  # else the run would go on to the end and write an adapter of NaN
        if not loss.isfinite():
            step = self.state.global_step + 1
            raise UserError(f"step {step}: the loss is {loss.item()}; expected a smaller --lr, in a fresh --save_dir")
        return loss

    def in_parts(self, step, model, inputs, rows, num_items_in_batch):
        """A micro-batch in self.parts parts, with the loss and gradients of the whole."""
        if self.parts == 1:
            return step(model, inputs, num_items_in_batch)
        accumulated, total = self.current_gradient_accumulation_steps, 0
        weights = getattr(self, "loss_weights", ())  # of DPO's terms
        size = -(-len(rows) // self.parts)
        try:
            for part in (rows[i : i + size] for i in range(0, len(rows), size)):
                # a mean over rows counts as its share of them; a sum over num_items_in_batch tokens as it is
                self.current_gradient_accumulation_steps = accumulated * len(rows) / len(part)
                if weights:
                    self.loss_weights = part_weights(self.loss_types, weights, part, rows)
                total = total + step(model, self.data_collator(part), num_items_in_batch)
        finally:
            self.current_gradient_accumulation_steps = accumulated
            if weights:
                self.loss_weights = weights
        return total


def part_weights(types, weights, part, rows):
    """Weights of DPO's terms for a part that counts by its rows: TRL's SFT term is a mean over the chosen tokens."""
    rows_in, tokens_in = len(rows) / len(part), chosen_tokens(part) / chosen_tokens(rows)
    return [w * tokens_in * rows_in if t == "sft" else w for t, w in zip(types, weights, strict=True)]


def chosen_tokens(rows):
    return sum(len(r["chosen_ids"]) for r in rows)


class Rows:
    """Rows of a batch, in a wrapping that nothing between collator and trainer unpacks or moves."""

    def __init__(self, rows):
        self.rows = rows


def take_gradients(model):
    """Take the gradients off the parameters: [(parameter, gradient)]."""
    found = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    for p, _ in found:
        p.grad = None
    return found

"""Generation with continuous batching: a sequence that ends makes room for a waiting one.

A batch is planned by tokens: as many slots as the memory for keys and values holds, each as long as the longest of its
sequences. The common beginning of all prompts is computed once.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel

from distill.model.active_adapter import ActiveAdapter, active_adapter, adapter_state
from distill.model.decode_graph import BURST, DecodeStep
from distill.model.label_forward import batches, shared_prefix, token_budget
from distill.model.sampling import Request, choose
from distill.model.slot_cache import KeyShape, SlotCache, prefill

ALIGNED = 256  # capacities are multiples of it, so that a later batch fits in the cache of an earlier one
SHORTEST_PREFIX = 16  # tokens; a shorter one is not worth a forward pass of its own


@dataclass(frozen=True)
class Plan:
    """`count` requests in `slots` slots of `capacity` tokens."""

    capacity: int
    slots: int
    count: int


def plan_batches(needs: list[int], batch_size: int, room: int) -> list[Plan]:
    """Plans for sequences of `needs` tokens each, the longest first, where `room` tokens fit in memory.

    One plan where memory allows `batch_size` slots. Otherwise sequences of less than half the longest get a plan of
    their own, with more slots.
    """
    plans, start = [], 0
    while start < len(needs):
        capacity = -(-(needs[start] + BURST) // ALIGNED) * ALIGNED
        wanted = min(batch_size, len(needs) - start)
        slots = max(1, min(wanted, room // capacity))
        end = len(needs)
        if slots < wanted:
            end = next((i for i in range(start, end) if 2 * needs[i] < needs[start]), end)
        plans.append(Plan(capacity, min(slots, end - start), end - start))
        start = end
    return plans


def cache_room(base: PreTrainedModel, shape: KeyShape) -> int:
    """Tokens whose keys and values may be kept: half of what is free on a GPU, a quarter on a CPU."""
    kept = getattr(base, "slot_decoder", None)
    held = kept.cache.store.nbytes if kept else 0
    if shape.device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(shape.device)
        share = torch.cuda.get_per_process_memory_fraction(shape.device) * whole
        free = min(free + torch.cuda.memory_reserved(shape.device), share) - torch.cuda.memory_allocated(shape.device)
        return int((free + held) / 2) // shape.bytes_per_token
    from accelerate.utils import get_max_memory

    return (get_max_memory()["cpu"] + held) // 4 // shape.bytes_per_token


def generate_continuously(
    model: PreTrainedModel,
    shape: KeyShape,
    requests: list[Request],
    batch_size: int,
    pad: int,
    ends: set[int],
    temperature: float,
    finish: Callable[[Request], None],
) -> None:
    """Complete requests, at most `batch_size` at once; finish(request) is called for each as it ends.

    model: with or without PEFT's wrapper. Error: torch.OutOfMemoryError; the requests that are not finished can then be
    restarted with a smaller batch size.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    requests = sorted(requests, key=lambda r: -r.need)
    prefix = shared_prefix([r.ids for r in requests]) if len(requests) > 1 else []
    prefix = prefix if len(prefix) >= SHORTEST_PREFIX else []
    limit = max(r.max_new_tokens for r in requests)
    for plan in plan_batches([r.need for r in requests], batch_size, cache_room(base, shape)):
        own, requests = requests[: plan.count], requests[plan.count :]
        try:
            prepare_decoder(model, base, shape, plan, limit)  # held by the base alone: it must go before the next comes
            adapter = base.slot_decoder.adapter
            with adapter.applied() if adapter else contextlib.nullcontext():
                Batch(base, base.slot_decoder, plan.slots, prefix, pad, ends, temperature, finish).run(own)
        except torch.OutOfMemoryError:
            base.slot_decoder = None
            raise


class Decoder:
    """The memory of a batch: cache, decoding steps and their graphs. It is kept for the next batch that fits in it."""

    def __init__(self, shape: KeyShape, plan: Plan, limit: int, weights: tuple, adapter: ActiveAdapter | None):
        self.cache, self.weights, self.adapter = SlotCache(shape, plan.slots, plan.capacity), weights, adapter
        self.step = DecodeStep(self.cache, limit)

    def holds(self, plan: Plan, limit: int, weights: tuple) -> bool:
        cache = self.cache
        enough = cache.slots >= plan.slots and cache.capacity >= plan.capacity and self.step.limit >= limit
        return enough and self.weights == weights


def prepare_decoder(model: PreTrainedModel, base: PreTrainedModel, shape: KeyShape, plan: Plan, limit: int) -> None:
    """Make sure that `base.slot_decoder` is one for this plan and the adapters as they are; keep it if it is."""
    weights, kept = adapter_state(model), getattr(base, "slot_decoder", None)
    if kept is None or not kept.holds(plan, limit, weights):
        base.slot_decoder = kept = None
        clear_device_cache(garbage_collection=True)
        base.slot_decoder = Decoder(shape, plan, limit, weights, active_adapter(model))


class Batch:
    """The requests of one plan on their way through a decoder. running[i] is the request in slot i."""

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: Decoder,
        slots: int,
        prefix: list[int],
        pad: int,
        ends: set[int],
        temperature: float,
        finish: Callable[[Request], None],
    ):
        self.model, self.cache, self.step = model, decoder.cache, decoder.step
        self.slots, self.prefix, self.pad, self.ends = slots, prefix, pad, ends
        self.temperature, self.finish = temperature, finish
        self.running: list[Request] = []
        # on a GPU a prefill costs as much as ten steps whatever its size, so it waits until several slots are free
        self.refill = max(1, slots // 4) if self.step.burst > 1 else 1
        self.step.temperature.fill_(temperature or 1.0)
        if prefix:
            ids, row = torch.tensor([prefix], device=self.cache.shape.device), self.cache.rows[:1]
            prefill(model, ids, self.cache, row, row[:, None], 0)
            self.cache.share_prefix(len(prefix))

    def run(self, waiting: list[Request]) -> None:
        """Complete all requests of `waiting`, begun in its order."""
        while waiting or self.running:
            free = self.slots - len(self.running)
            if waiting and free >= min(self.refill, len(waiting)):
                new, waiting = waiting[:free], waiting[free:]
                self.admit(new)
            elif self.running[0].processor:
                self.decode_constrained()
            else:
                self.decode_free()

    def admit(self, new: list[Request]) -> None:
        """Compute the prompts of new requests and choose their first tokens."""
        first, n, device = len(self.running), len(self.prefix), self.cache.shape.device
        self.running += new
        lengths, chosen = [len(r.ids) - n for r in new], [0] * len(new)
        for rows in batches(lengths, token_budget(device)):
            width = max(lengths[i] for i in rows)
            ids = torch.tensor([new[i].ids[n:] + [self.pad] * (width - lengths[i]) for i in rows], device=device)
            keep = torch.tensor([[lengths[i] - 1] for i in rows], device=device)
            slots = torch.tensor([first + i for i in rows], device=device)
            logits = prefill(self.model, ids, self.cache, slots, keep, n)
            for i, token in zip(rows, choose(logits, [new[i] for i in rows], self.temperature), strict=True):
                chosen[i] = token
        if self.temperature:
            for i, request in enumerate(new):
                uniform = torch.from_numpy(request.uniform)
                self.step.uniform[first + i, : len(uniform)] = uniform.to(device)
        self.accept([[None] * first + chosen])

    def decode_free(self) -> None:
        """Some steps of all running requests, without a look at what they write."""
        steps = min(self.step.burst, max(r.max_new_tokens - len(r.tokens) for r in self.running))
        last = self.load() + steps - 1
        self.accept(self.step.tokens(self.model, len(self.running), last, steps, bool(self.temperature)))

    def decode_constrained(self) -> None:
        """One step. On a GPU the grammars compute their masks while the card computes the logits."""
        last = self.load()
        logits = self.step.logits(self.model, len(self.running), last)
        self.accept([choose(logits, self.running, self.temperature)])

    def load(self) -> int:
        """Bring the state of the running requests to the device; the highest position in it."""
        positions = [len(r.ids) + len(r.tokens) - 1 for r in self.running]
        self.step.load([r.tokens[-1] for r in self.running], positions, [len(r.tokens) for r in self.running])
        return max(positions)

    def accept(self, steps: list[list[int | None]]) -> None:
        """Give the running requests their next tokens, per step, and take out those that are complete."""
        complete = set()
        for tokens in steps:
            for slot, (request, token) in enumerate(zip(self.running, tokens, strict=True)):
                if token is not None and slot not in complete and not request.accept(token, self.ends):
                    complete.add(slot)
        for slot in sorted(complete, reverse=True):
            request, last = self.running[slot], len(self.running) - 1
            if slot < last:
                self.cache.move(last, slot)
                self.step.uniform[slot] = self.step.uniform[last]
                self.running[slot] = self.running[last]
            self.running.pop()
            self.finish(request)

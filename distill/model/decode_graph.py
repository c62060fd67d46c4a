"""One decoding step for many sequences, captured in CUDA graphs at stepped sizes where there is a GPU.

Launching the kernels of a step takes ten times as long as computing it, so a step is recorded once per size (rows,
columns that attention sees) and replayed. The graphs share one memory pool.
"""

import torch
from transformers import PreTrainedModel

from distill.model.cuda_graph import Recording, Recordings
from distill.model.sampling import sample
from distill.model.slot_cache import SlotCache, decode_one

BURST = 8  # steps between two looks at the tokens: what a sequence that has ended may cost
SHORTEST = 256  # columns of the first step size
MOST = 64  # graphs that are kept: more than a batch of 256 sequences meets on its way


class DecodeStep:
    """Steps over the first rows of a SlotCache. The state (tokens, positions, random numbers) is on the device.

    limit: tokens that a sequence may get. burst: steps at once, by default BURST on a GPU, else 1, where looking costs
    nothing. It does not hold the model, which may hold it.
    """

    def __init__(self, cache: SlotCache, limit: int, burst: int | None = None):
        device, slots = cache.shape.device, cache.slots
        self.cache, self.limit = cache, limit
        self.graphs, self.on_gpu = Recordings(device, "decoding", MOST), device.type == "cuda"
        self.burst = burst or (BURST if self.on_gpu else 1)
        self.state = torch.zeros(3, slots, dtype=torch.long, device=device)  # last token, its position, tokens so far
        self.uniform = torch.zeros(slots, limit + self.burst, device=device)
        self.temperature = torch.ones((), device=device)

    def load(self, tokens: list[int], positions: list[int], counts: list[int]) -> None:
        """Set the state of the first rows: last token, its position, and the number of tokens so far."""
        unused = self.cache.slots - len(tokens)  # rows without a sequence write at the end, where none reads
        free = self.cache.capacity - self.burst
        state = [tokens + [0] * unused, positions + [free] * unused, counts + [0] * unused]
        state = torch.tensor(state)
        self.state.copy_(state.pin_memory() if self.on_gpu else state, non_blocking=True)

    def tokens(self, model: PreTrainedModel, rows: int, last: int, steps: int, sampled: bool) -> list[list[int]]:
        """`steps` lists of the next token of each row. last: the highest position that is written."""
        found = []
        for _ in range(steps):
            self.run(model, rows, last + 1, "sample" if sampled else "greedy")
            found.append(self.state[0, :rows].clone())
        return torch.stack(found).tolist()

    def logits(self, model: PreTrainedModel, rows: int, last: int) -> torch.Tensor:
        """Logits [rows, V] after each row's last token; the caller may change them, and chooses the next tokens."""
        return self.run(model, rows, last + 1, "logits")[:rows]

    def run(self, model: PreTrainedModel, rows: int, length: int, kind: str) -> torch.Tensor | None:
        """step(), from a graph where there are graphs."""
        key = (stepped(rows, 1, self.cache.slots, 4), stepped(length, SHORTEST, self.cache.capacity, 2), kind)
        recording = self.graphs.get(key, lambda: self.capture(model, key))
        return recording.replay() if recording else self.step(model, rows, length, kind)

    def step(self, model: PreTrainedModel, rows: int, length: int, kind: str) -> torch.Tensor | None:
        """One step of the first rows, on the device alone. kind: "logits" gives them; "greedy" and "sample" go on."""
        tokens, positions, counts = self.state[:, :rows]
        logits = decode_one(model, tokens, self.cache, positions, length)
        if kind == "logits":
            return logits
        if kind == "sample":
            chosen = sample(logits, self.temperature, self.uniform[:rows].gather(1, counts[:, None])[:, 0])
        else:
            chosen = logits.argmax(-1)
        tokens.copy_(chosen)
        positions.add_(1)
        counts.add_(1)

    def capture(self, model: PreTrainedModel, key: tuple[int, int, str]) -> Recording:
        """Record a step. The passes that warm up write where the next step writes again; the state is put back.

        Error: RuntimeError where a replay does not give what the step gives.
        """
        before, stream = self.state.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                expected = self.step(model, *key)
                expected = self.state[0].clone() if expected is None else expected.clone()
                self.state.copy_(before)
        torch.cuda.current_stream().wait_stream(stream)
        recording = self.graphs.record(lambda: self.step(model, *key))
        output = recording.replay()
        equal = torch.equal(self.state[0] if output is None else output, expected)
        self.state.copy_(before)
        if not equal:
            raise RuntimeError(f"a recorded step of {key[0]} rows gives other results than the step itself")
        return recording


def stepped(n: int, first: int, last: int, factor: int) -> int:
    """The smallest of first, first * factor, first * factor ** 2, ... that is at least n, but no more than `last`."""
    step = first
    while step < n:
        step *= factor
    return min(step, last)

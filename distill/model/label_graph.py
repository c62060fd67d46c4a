"""Label passes at stepped shapes, recorded as CUDA graphs and replayed.

A shape is recorded when it comes for the fourth time, so a script that scores a few batches pays nothing; a server
records those that it expects before it is ready. Passes of more than TOKENS tokens are not recorded: launching is a
smaller part of their time, padding to a step a larger one, and their memory would be taken for good.
"""

from collections import Counter
from collections.abc import Callable

import torch

from distill.model.cuda_graph import Recording, Recordings

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # steps of at most a half beyond 16 rows, where padding is computed at a price
ALIGNED = 16  # widths are multiples of it
SMALLEST = 128  # tokens of a pass below which fewer are not faster: few rows have few widths
TOKENS = 3072  # of the largest recorded pass; the memory of all of them is that of one such pass
PATIENCE = 3  # passes of a shape before it is recorded
MOST = 64  # recordings of one scorer
ROUNDING = 0.1  # nats by which two paths that are equal differ in 16 bits

Inputs = dict[str, torch.Tensor]
Shape = tuple[int, int]


def stepped_shape(rows: int, width: int) -> Shape | None:
    """(rows, width) of the smallest step that holds a pass; None where no recorded pass does."""
    step = next((n for n in ROWS if n >= rows), None)
    if step is None:
        return None
    multiple = max(ALIGNED, SMALLEST // step)
    width = -(-width // multiple) * multiple
    return (step, width) if step * width <= TOKENS else None


def stepped_shapes(shortest: int, longest: int) -> list[Shape]:
    """The steps of all passes whose widths lie between two, the largest first, as memory is best shared."""
    widths = range(-(-shortest // ALIGNED) * ALIGNED, longest + ALIGNED, ALIGNED)
    shapes = {stepped_shape(rows, width) for rows in ROWS for width in widths} - {None}
    return sorted(shapes, key=lambda shape: -shape[0] * shape[1])


class LabelGraphs(Recordings):
    """The recorded passes of one scorer. A key is a shape and what else makes another pass of it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(model.device, "scoring labels", MOST)
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.patience, self.uses = PATIENCE, Counter()
        if self.enabled and (why := unrecordable(self.base)):
            self.disable(why)

    def key(self, rows: int, width: int, *kind: bool) -> tuple | None:
        """The key of the recording to use for a pass of this shape; None where it should be computed as it is."""
        shape = stepped_shape(rows, width)
        if shape is None or not (self.enabled or self.kept):
            return None
        key = (*shape, *kind)
        self.uses[key] += 1
        return key if key in self.kept or (self.enabled and self.uses[key] > self.patience) else None

    def scores(self, key: tuple, inputs: Inputs, compute: Callable[[Inputs], torch.Tensor]) -> torch.Tensor | None:
        """compute(inputs) [B, L], replayed; None where it cannot be.

        inputs: tensors of at most key[0] rows, key[1] columns wide, on the CPU or the model's device.
        """
        try:
            recording = self.get(key, lambda: self.capture(key[0], inputs, compute))
        except torch.OutOfMemoryError:
            self.disable("no memory is left for them")
            torch.cuda.empty_cache()
            return None
        if recording is None:
            self.base.label_graphs_failed = True
            return None
        rows = len(inputs["input_ids"])
        load(inputs, recording.inputs, rows)
        return recording.replay()[:rows].clone()

    def capture(self, rows: int, inputs: Inputs, compute: Callable[[Inputs], torch.Tensor]) -> Recording:
        """Record compute() for `rows` rows on blank inputs, and compare a replay on the given ones with compute().

        An input that was copied into the recording, instead of being read anew, therefore does not go unnoticed.
        Error: RuntimeError where they differ.
        """
        device = self.base.device
        own = {name: torch.zeros(rows, *t.shape[1:], dtype=t.dtype, device=device) for name, t in inputs.items()}
        compute(own)
        recording = self.record(lambda: compute(own))
        load(inputs, own, len(inputs["input_ids"]))
        if not torch.allclose(recording.replay(), compute(own), atol=ROUNDING, equal_nan=True):
            raise RuntimeError(f"a recorded pass of {rows} rows gives other scores than the pass itself")
        recording.inputs = own
        return recording

    def disable(self, why: str) -> None:
        """Record nothing more for this scorer; the reason is printed once per model."""
        if getattr(self.base, "label_graphs_notice", None) == why:
            self.enabled = False
        else:
            self.base.label_graphs_notice = why
            super().disable(why)


def load(inputs: Inputs, own: Inputs, rows: int) -> None:
    """Copy inputs of `rows` rows, or of one for all of them, to a recording's own."""
    for name, tensor in inputs.items():
        own[name][:rows].copy_(tensor, non_blocking=True)


def unrecordable(model: torch.nn.Module) -> str | None:
    """Why passes of a model on a GPU cannot be recorded, as part of a sentence, or None."""
    if getattr(model, "label_graphs_failed", False):
        return model.label_graphs_notice
    if any(p.is_meta for p in model.parameters()):
        return "some of its layers are offloaded"
    if len({p.device for p in model.parameters()}) > 1:
        return "its layers are on several devices"
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return "several processes train it together"
    return None

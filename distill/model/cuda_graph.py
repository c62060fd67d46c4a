"""Passes recorded as CUDA graphs: launching the kernels one by one takes several times as long as a small pass itself.

A recorded pass reads its inputs from where they were when it was recorded. Recordings share one memory pool, so they
take little more memory together than the largest of them; torch counts it under the cap of this process.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

from distill.files import one_line

Step = Callable[[], torch.Tensor | None]


class Recording:
    """A recorded pass. `output` is what step() gave; each replay writes it anew.

    inputs: tensors that it reads, where whoever records it keeps them for the next replay.
    """

    def __init__(self, step: Step, pool: tuple[int, int]):
        self.inputs: dict[str, torch.Tensor] = {}
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # other threads may use the GPU meanwhile
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.output = step()
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails would leave its own one behind

    def replay(self) -> torch.Tensor | None:
        self.graph.replay()
        return self.output


class Recordings:
    """Recordings by key. Of more than `most` the least recently used one goes.

    device: nothing is recorded unless it is a GPU. passes: what the notice calls them where they cannot be recorded.
    """

    def __init__(self, device: torch.device, passes: str, most: int):
        self.enabled, self.passes, self.most = device.type == "cuda", passes, most
        self.kept: OrderedDict[Hashable, Recording] = OrderedDict()
        self.pool = None

    def __len__(self) -> int:
        return len(self.kept)

    def record(self, step: Step) -> Recording:
        """A recording of step(), which has run before: kernels load when they are first used."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        return Recording(step, self.pool)

    def get(self, key: Hashable, make: Callable[[], Recording]) -> Recording | None:
        """The recording of `key`, by make() where there is none; None where nothing can be recorded.

        Error: torch.OutOfMemoryError from make().
        """
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        if not self.enabled:
            return None
        while len(self.kept) >= self.most:
            self.kept.popitem(last=False)
        try:
            self.kept[key] = make()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            self.kept.clear()
            self.pool = None
            self.disable(one_line(e)[:160])
            return None
        return self.kept[key]

    def disable(self, why: str) -> None:
        """Record nothing more, and say why."""
        self.enabled = False
        print(f"{self.passes} without {'more ' if self.kept else ''}CUDA graphs: {why}", file=sys.stderr)

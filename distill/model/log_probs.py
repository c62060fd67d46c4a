"""The log-probabilities that a model gives to a text that is already written (teacher forcing)."""

import numpy as np
import torch
from transformers import PreTrainedModel

from distill.model.fp32_logits import fp32_logits


@torch.inference_mode()
def completion_log_probs(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> np.ndarray:
    """The log-probability of each token of a completion after a prompt, float array [T], in one forward pass."""
    ids = torch.tensor([prompt + completion[:-1]], device=model.device)
    with fp32_logits(model):
        logits = model(input_ids=ids, logits_to_keep=len(completion), use_cache=False).logits[0]
    targets = torch.tensor(completion, device=logits.device)[:, None]
    # in parts: fp32 copies of all logits over a large vocabulary would take more memory than the pass itself
    parts = zip(logits.split(256), targets.split(256), strict=True)
    return torch.cat([x.float().log_softmax(-1).gather(1, t)[:, 0] for x, t in parts]).cpu().numpy()

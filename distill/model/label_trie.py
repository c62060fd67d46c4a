"""Labels as a tree of tokens after a prompt."""

import torch


class LabelTrie:
    """Labels as a tree of tokens after a prompt. The last token of a label is only predicted, so it is no node.

    nodes: M segments (ids, parent); parent -1 is the prompt's last token.
    column, token, weight [L, n]: the i-th token of label l is predicted at column[l, i] (0 = the prompt's last token,
    k = node k - 1) and counts weight[l, i] = 1/n, or 0 beyond the label's end.
    """

    def __init__(self, label_ids: list[list[int]]):
        """label_ids: L token id lists, none of them a prefix of another."""
        number = {(): 0}
        for ids in label_ids:
            for n in range(1, len(ids)):
                number.setdefault(tuple(ids[:n]), len(number))
        self.nodes = [([path[-1]], number[path[:-1]] - 1) for path in number if path]
        shape = len(label_ids), max(map(len, label_ids))
        self.column, self.token = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        self.weight = torch.zeros(shape)
        for row, ids in enumerate(label_ids):
            for i, token in enumerate(ids):
                self.column[row, i], self.token[row, i] = number[tuple(ids[:i])], token
                self.weight[row, i] = 1 / len(ids)

    def to(self, device: torch.device) -> "LabelTrie":
        """Move the tables to a device, in place."""
        self.column, self.token, self.weight = (t.to(device) for t in (self.column, self.token, self.weight))
        return self

    def after(self, segment: int, at: int) -> list[tuple[list[int], int]]:
        """The nodes as segments number `at`, `at + 1`, ... of a tree in which the prompt ends with `segment`."""
        return [(ids, segment if parent < 0 else at + parent) for ids, parent in self.nodes]

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Length-normalised log-likelihoods [B, L] from the logits [B, 1 + M, V] at prompt end and nodes."""
        logp = logits.float().log_softmax(-1)
        device = logits.device
        return (logp[:, self.column.to(device), self.token.to(device)] * self.weight.to(device)).sum(-1)

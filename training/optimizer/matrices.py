"""Which matrices a parameter consists of: most are one, some hold several that act by themselves.

Muon evens out the singular values of a matrix, so it matters what counts as one. Queries, keys and values that share a
tensor are three functions of the same input; each expert of a stack is one; GPT-2 stores its matrices transposed. A
`Split` says how to take such a tensor apart, in the one form that all of them have: rows, in repetitions of the same
parts. The price of a split is a copy of the tensor apart and together again at each step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """How a parameter (m, n), or a stack of experts (E, m, n), holds its matrices.

    transposed: stored as (inputs, outputs), not as (outputs, inputs) like nn.Linear.
    repeats: how often the parts follow one another along the outputs: 1 for [q k v], the number of heads where each
        head has its own [q k v].
    parts: rows of each part in one repetition; None for a matrix that is whole.
    """

    transposed: bool = False
    repeats: int = 1
    parts: Sequence[int] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is one matrix as it stands."""
        return not self.transposed and self.parts is None

    def check(self, shape: torch.Size) -> None:
        """`ValueError` unless a parameter of this shape can be taken apart so."""
        rows = shape[-1] if self.transposed else shape[-2]
        if self.parts is not None and self.repeats * sum(self.parts) != rows:
            raise ValueError(
                f"a parameter of shape {tuple(shape)} has {rows} rows, expected {self.repeats} x {sum(self.parts)} for "
                f"the parts {tuple(self.parts)}"
            )

    def take_apart(self, stack: Tensor) -> list[Tensor]:
        """(K, m, n) or (K, E, m, n) to its matrices, part by part: (K * E, rows of the part, n)."""
        x = stack.mT if self.transposed else stack
        x = x.flatten(0, 1) if x.ndim == 4 else x
        if self.parts is None:
            return [x]
        repeated = x.unflatten(1, (self.repeats, sum(self.parts)))  # (K * E, repeats, rows, n)
        return [part.flatten(1, 2) for part in repeated.split(list(self.parts), dim=2)]

    def put_together(self, matrices: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """The opposite: a stack (K, *shape)."""
        x = matrices[0]
        if self.parts is not None:
            repeated = [each.unflatten(1, (self.repeats, part)) for each, part in zip(matrices, self.parts)]
            x = torch.cat(repeated, dim=2).flatten(1, 2)
        x = x.mT if self.transposed else x
        return x.reshape(-1, *shape)


WHOLE = Split()

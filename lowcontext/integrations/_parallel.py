"""Tensor parallelism: sums over the ranks that hold the other heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed, nn


@dataclass(frozen=True, eq=False)
class RankSum:
    """Sums a tensor in place over the tensor-parallel ranks of a model; all ranks must call it.

    Args:
        model: carries transformers' device mesh. Kept in the place of the process group, which
            can be neither copied nor pickled.
    """

    model: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """The sum, on every rank bit for bit the same."""
        distributed.all_reduce(x, group=_mesh(self.model).get_group())
        return x


def rank_sum(model: nn.Module) -> RankSum | None:
    """The sum over the ranks that share the heads of `model`; None where one rank has them all."""
    for module in model.modules():
        mesh = _mesh(module)
        if mesh is not None and mesh.size() > 1:
            return RankSum(module)
    return None


def _mesh(module: nn.Module) -> Any:
    """The tensor-parallel dimension of the mesh that transformers left on a model, or None."""
    mesh = getattr(module, "_device_mesh", None)
    if mesh is None or mesh.mesh_dim_names is None:
        return mesh
    return mesh["tp"] if "tp" in mesh.mesh_dim_names else None

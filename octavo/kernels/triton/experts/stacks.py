"""A layer's experts as its kernels take them: whole stacks, and a shared expert beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.triton.product.matrices import numbers_of
from octavo.kernels.weights import ExpertBiases, ExpertWeights, SharedExpert, Weight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StackedExperts:
    """The experts of a layer as strided [E, rows, cols] views of whole stacks."""

    gate_EFM: Tensor
    up_EFM: Tensor
    down_EMF: Tensor
    biases: ExpertBiases | None = None

    @property
    def count(self) -> int:
        return len(self.gate_EFM)

    @property
    def inner_size(self) -> int:
        return self.gate_EFM.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.gate_EFM.shape[2]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedParts:
    """A shared expert as `count` experts more: gate and up [count * F, M], down [M, count * F]."""

    gate_NM: Tensor
    up_NM: Tensor
    down_MN: Tensor
    gate_T1: Tensor | None
    """Logits of the gate that scales it."""
    count: int


def gate_up_arguments(
    experts: StackedExperts, shared: SharedParts | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns gate and up, those of the shared expert, and the experts' biases; anything where
    there are none."""
    routed = experts.gate_EFM, experts.up_EFM
    of_shared = routed if shared is None else (shared.gate_NM, shared.up_NM)
    biases = experts.biases
    return *routed, *of_shared, *(routed if biases is None else (biases.gate_EF, biases.up_EF))


def down_arguments(
    experts: StackedExperts, shared: SharedParts | None, topk_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns down, that of the shared expert and its gate, or anything where there is none."""
    if shared is None:
        return experts.down_EMF, experts.down_EMF, topk_weights
    gate_T1 = topk_weights if shared.gate_T1 is None else shared.gate_T1
    return experts.down_EMF, shared.down_MN, gate_T1


def count_of_shared(shared: SharedParts | None) -> int:
    """Returns the parts of a shared expert."""
    return 0 if shared is None else shared.count


def has_gate(shared: SharedParts | None) -> bool:
    """Whether a gate scales the shared expert."""
    return shared is not None and shared.gate_T1 is not None


def stacked_experts(experts: ExpertWeights) -> StackedExperts:
    """Returns the experts of a layer as whole stacks; see `stacked_view`."""
    return StackedExperts(
        gate_EFM=stacked_view(experts.gate),
        up_EFM=stacked_view(experts.up),
        down_EMF=stacked_view(experts.down),
        biases=experts.biases,
    )


def stacked_view(weights: Sequence[Weight]) -> Tensor:
    """Returns the experts' matrices as one [E, rows, cols] view.

    Raises AssertionError where they are not views at one constant stride of one tensor: the
    loader must put a layer's experts into one stack.
    """
    tensors = [numbers_of(weight) for weight in weights]
    first = tensors[0]
    start, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    stride = tensors[1].storage_offset() - start if len(tensors) > 1 else first.numel()
    for expert, tensor in enumerate(tensors):
        is_at = tensor.untyped_storage().data_ptr() == storage
        is_at = is_at and tensor.storage_offset() == start + expert * stride
        is_at = is_at and (expert == 0 or stride >= first.numel())
        is_at = is_at and tensor.shape == first.shape and tensor.dtype == first.dtype
        is_at = is_at and tensor.is_contiguous()
        assert is_at, (
            f"expert {expert} of {len(tensors)} does not lie at a constant stride from expert 0 "
            "in the same tensor; load the experts of a layer as views of one [E, rows, cols] stack"
        )
    return first.as_strided((len(tensors), *first.shape), (stride, *first.stride()), start)


def shared_parts(
    shared: SharedExpert | None, gate_T1: Tensor | None, inner_size: int
) -> SharedParts | None:
    """Returns the shared expert as experts of `inner_size`, or None where it is not some of them
    side by side."""
    if shared is None or shared.gate.rows % inner_size:
        return None
    gate, up, down = numbers_of(shared.gate), numbers_of(shared.up), numbers_of(shared.down)
    assert gate.is_contiguous()
    assert up.is_contiguous()
    assert down.is_contiguous()
    count = len(gate) // inner_size
    return SharedParts(gate_NM=gate, up_NM=up, down_MN=down, gate_T1=gate_T1, count=count)

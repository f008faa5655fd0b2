"""The sampling kernels as the back end offers them."""

from octavo.kernels.backend import SamplingKernels
from octavo.kernels.triton.sampling.draw import choose
from octavo.kernels.triton.sampling.params import ROW_PARAMS
from octavo.kernels.triton.sampling.penalties import penalise
from octavo.kernels.triton.sampling.restrict import bias_logits, mask_logits
from octavo.kernels.triton.sampling.thresholds import find_thresholds

KERNELS = SamplingKernels(
    row_params=ROW_PARAMS,
    mask_logits=mask_logits,
    bias_logits=bias_logits,
    penalise=penalise,
    find_thresholds=find_thresholds,
    choose=choose,
)

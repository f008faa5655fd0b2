"""Quantised checkpoints as they are published, one file a family of formats.

| file | formats | in memory (`octavo.formats`) |
| --- | --- | --- |
| `ints` | AWQ, GPTQ, AutoRound, compressed-tensors pack- and int-quantized | int4, int8 |
| `floats` | FP8 by block, channel or tensor; MXFP4; NVFP4 of both dialects | fp8, mxfp4, nvfp4 |
| `repack` | | codes and scales to rows of blocks |
| `source` | gpt-oss's stacks of MXFP4, stacks of FP8 | the TensorSource of a checkpoint |
"""

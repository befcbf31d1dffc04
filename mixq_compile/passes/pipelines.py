"""The named pipelines, as text."""

JIT = (
    "strip-guards,canonicalize-linear,select-scheme,annotate-outliers,rewrite-mixed-linear,"
    "share-quantize,fuse-epilogue,merge-siblings,fuse-gate,fuse-activation,select-kernels,"
    "prune-dead-weights,verify"
)
"""A Dynamo graph of an ordinary model; the backend's default."""

SWAPPED = (
    "strip-guards,expand-linear,share-quantize,fuse-epilogue,merge-siblings,fuse-gate,fuse-activation,"
    "select-kernels,prune-dead-weights,verify"
)
"""A graph of a model whose linears are MixqLinears already."""

AOT = JIT
"""An exported 16-bit model."""

PIPELINES = {"jit": JIT, "swapped": SWAPPED, "aot": AOT}

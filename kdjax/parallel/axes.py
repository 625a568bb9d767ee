"""The mesh's axes: their names, and which of them split what."""

AXES = PIPE, DATA, FSDP, TENSOR = ("pipe", "data", "fsdp", "tensor")

BATCH_AXES = (DATA, FSDP)  # split the global batch
STATE_AXES = (FSDP, DATA)  # split gradients and optimiser state, major to minor; the first alone splits parameters
VOCABULARY_AXES = (TENSOR, PIPE)  # split the rows of embedding and head: all devices that share a microbatch

# What one axis of a parameter counts, and the mesh axes that split it.
LAYERS, WIDTH, VOCABULARY = "layers", "width", "vocabulary"
SPLITS = {LAYERS: (PIPE,), WIDTH: (TENSOR,), VOCABULARY: VOCABULARY_AXES}

"""PyTorch's file formats, read and written without torch. Nothing in a pickle is executed."""

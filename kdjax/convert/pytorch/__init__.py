"""PyTorch's file formats, read and written without torch; nothing in a pickle is executed."""

"""The files of a checkpoint, and which tensors of a model they hold."""

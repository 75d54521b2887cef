"""Adapters and models as files: looking into a checkpoint, and merging one into a model's folder tensor by tensor."""

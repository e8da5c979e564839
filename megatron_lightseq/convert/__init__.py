"""Models in and out: Hugging Face folders and GGUF files to checkpoints with recipes, and back, tensor by tensor."""

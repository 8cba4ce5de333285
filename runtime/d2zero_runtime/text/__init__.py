"""Class names as text embeddings: prompts, a tokenizer, and a CLIP text encoder in ONNX Runtime; no torch."""

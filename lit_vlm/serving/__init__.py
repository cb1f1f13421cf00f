"""OpenAI-compatible server of a model: chat completions with images, streaming, and continuous batching."""

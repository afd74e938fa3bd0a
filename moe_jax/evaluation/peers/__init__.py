"""Other engines on the same weights, prompt and token count: llama.cpp, `transformers`, `accelerate`."""

"""An OpenAI-compatible HTTP server for looking at a model; the scheduler batches requests token by token."""

"""Who answers a benchmark's questions: this project's engine, stock transformers, another engine, or a server."""

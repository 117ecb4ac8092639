"""Other ways to score candidates, on the same model, data, threads and optimizer state (`-m benchmarks.peers`)."""

"""The teacher-training loop: one module per stage, and one short driver for the round."""

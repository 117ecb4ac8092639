"""GPU kernels. In a checkout they stand in kernels/ at its root, in an installed package beside this file."""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parents[2] / "kernels"))

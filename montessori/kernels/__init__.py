"""GPU kernels. In a checkout they stand in kernels/ at its root, in an installed package beside this file."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
if (_ROOT / "csrc").is_dir():
    # Beside an installed package another one may be called kernels.
    __path__.append(str(_ROOT / "kernels"))

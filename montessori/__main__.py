"""`python -m montessori`, and with it `torchrun -m montessori`."""

from montessori.cli import main

main()

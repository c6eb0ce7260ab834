"""Mutated files through every command: the only outcomes are success, or one line of error.

    cd tests/analysis && python -m fuzz --seed 0 --count 20000 --commands spectra,diagnose,results

Each mutation starts from a healthy run and spoils one file of a kind (see ``KINDS``): its bytes, or values in it by
others that are likely to hurt. It then goes through one of the commands given, in this process, as the command line
would call it. What was made, and what went wrong, can be made again from its seed.
"""

from fuzz.run import KINDS, fuzz

__all__ = ["KINDS", "fuzz"]

"""`python -m fedcmr_shared` is `fedcmr`, for places where scripts are not on the path."""

from fedcmr_shared.cli import main

main()

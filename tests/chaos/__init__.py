"""Kill -9 of the service and of ComfyUI at random moments, and a judge who reads what ComfyUI really did.

`python -m tests.chaos --kills 200 --seed 1`: `plan` (what shall happen, from the seed alone), `run` with
`processes` and `clients` (it happens), `evidence` (what everybody says about it), `history` and `judge` (whether that
is right).
"""

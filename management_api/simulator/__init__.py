"""A stand-in for ComfyUI: it speaks the recorded protocol (HTTP, WebSocket, files) and draws real pictures.

It serves the demo, the tests and the benchmarks. It runs no model; what its sampler paints carries the word
"simulated". It must never be started unless somebody asked for it by name, and never listens elsewhere than told.
"""

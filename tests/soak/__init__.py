"""A light load for a long time: memory, file descriptors, threads and tasks of the service must stay flat.

`python -m tests.soak --minutes 10`: `load` (who asks), `samples` (what is measured, and whether it grew).
"""

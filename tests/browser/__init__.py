"""The live page in a real browser, against the real service and a simulated ComfyUI, each a process of its own."""

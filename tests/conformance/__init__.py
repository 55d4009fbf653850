"""Replays recorded conversations with a real ComfyUI against a server and compares what comes back."""

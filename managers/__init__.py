"""What the service is for: the queue, ComfyUI, events, files. Must never import a web framework."""

"""Programs that the service starts, and finds again: tasks (CONTRACT 7), and ComfyUI itself."""

"""One ComfyUI: its protocol, its socket, one attempt run to its verdict. Knows nothing of queues or stores."""
